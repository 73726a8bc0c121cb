"""Writes bench results as CSV, JSON, a Markdown table and a picture."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .timing import Row

_COLOURS = {("bf16",): "#2a7ab9", ("fp32",): "#d98c21", ("u8", "i32"): "#6a6a6a"}


@dataclass(frozen=True)
class Ceilings:
    """What this machine could do at best, measured in the same run."""

    read_gb_s: float
    bf16_tflop_s: float
    fp32_tflop_s: float


@dataclass(frozen=True)
class Report:
    """All rows of one run with what is needed to read them."""

    rows: list[Row]
    ceilings: Ceilings
    environment: dict
    failed: dict[str, str] = field(default_factory=dict)  # rows that could not be measured, and why

    def roofline_share(self, row: Row) -> float | None:
        """The fraction of the roofline a row reached: its unavoidable time over its measured time."""
        peak = self.ceilings.bf16_tflop_s if row.dtype == "bf16" else self.ceilings.fp32_tflop_s
        share = max(row.gb_s / self.ceilings.read_gb_s, row.tflop_s / peak)
        return share if share > 0 else None

    def command(self, row: Row) -> str:
        """The shell command that measures this row again."""
        return f"ming-rt bench --only '{row.op} {row.shape}' --threads {self.environment['threads']}"

    def markdown(self) -> str:
        """Environment, table of all rows, and how to repeat one."""
        c, e = self.ceilings, self.environment
        lines = [
            f"{e['cpu']}, {e['threads']} threads, isa {e['isa']}, torch {e['torch']}, "
            f"ming_rt {e['ming_rt']}, seed {e['seed']}. Ceilings of this run: read {c.read_gb_s:.1f} GB/s, "
            f"bf16 {c.bf16_tflop_s:.2f} TFLOP/s, fp32 {c.fp32_tflop_s:.2f} TFLOP/s.",
            "",
            "| op | shape | dtype | median us | p20-p80 us | torch us | ratio | GB/s | TFLOP/s | roofline |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for r in self.rows:
            share = self.roofline_share(r)
            lines.append(
                f"| {r.op} | {r.shape} | {r.dtype} | {r.median_us:.1f} | {r.p20_us:.1f}-{r.p80_us:.1f} "
                f"| {r.torch_us:.1f} | **{r.ratio:.2f}** | {r.gb_s:.1f} | {r.tflop_s:.3f} "
                f"| {'' if share is None else f'{100 * share:.0f} %'} |"
            )
        if self.rows:
            lines += ["", f"Repeat a row, for example the first: `{self.command(self.rows[0])}`."]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, name: str = "bench") -> list[Path]:
        """Write ``name``.{md,json,csv,png} into ``folder`` (the picture needs matplotlib)."""
        folder.mkdir(parents=True, exist_ok=True)
        records = [
            {**asdict(r), "ratio": r.ratio, "roofline": self.roofline_share(r), "command": self.command(r)}
            for r in self.rows
        ]
        paths = [folder / f"{name}.{suffix}" for suffix in ("md", "json", "csv")]
        paths[0].write_text(self.markdown(), encoding="utf-8")
        body = {"environment": self.environment, "ceilings": asdict(self.ceilings), "rows": records}
        paths[1].write_text(json.dumps(body, indent=1), encoding="utf-8")
        with open(paths[2], "w", newline="", encoding="utf-8") as file:
            fields = [f for f in records[0] if f != "extra"] if records else []
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(records)
        try:
            import matplotlib
        except ImportError:
            return paths
        matplotlib.use("Agg")
        paths.append(folder / f"{name}.png")
        self.plot(paths[-1])
        return paths

    def plot(self, path: Path) -> None:
        """How many times faster than the torch composition each row is, a band of dots per op."""
        from matplotlib import pyplot

        ops = list(dict.fromkeys(r.op for r in self.rows))
        figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.34 * len(ops)))
        for y, op in enumerate(ops):
            for dtype, colour in _COLOURS.items():
                ratios = [r.ratio for r in self.rows if r.op == op and r.dtype in dtype]
                axes.scatter(ratios, [y] * len(ratios), s=34, color=colour, alpha=0.6, linewidths=0)
            worst = min(r.ratio for r in self.rows if r.op == op)
            axes.annotate(f"{worst:.2f}", (worst, y), (0, 6), textcoords="offset points", ha="center", size=6)
        axes.set_yticks(range(len(ops)), ops, fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.grid(axis="x", which="both", linewidth=0.3)
        for dtype, colour in _COLOURS.items():
            axes.scatter([], [], color=colour, label=", ".join(dtype))
        axes.legend(fontsize=7, loc="lower right")
        e = self.environment
        axes.set_xlabel(f"times the speed of the torch {e['torch']} composition, lowest named")
        axes.set_title(f"{e['cpu']}, {e['threads']} threads, {e['isa']}", fontsize=9)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
