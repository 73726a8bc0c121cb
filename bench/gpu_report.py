"""The report of a run on a GPU: each row beside its best competitor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from .report import Ceilings, Report
from .timing import Row


@dataclass(frozen=True)
class GpuCeilings(Ceilings):
    """What this GPU could do at best: ``read_gb_s`` is the better of reading and copying."""

    copy_gb_s: float


@dataclass(frozen=True)
class GpuReport(Report):
    """All rows of one run, and the names of those the time did not suffice for (``left_out``)."""

    ceilings: GpuCeilings
    left_out: list[str] = field(default_factory=list)

    def command(self, row: Row) -> str:
        """The shell command that measures this row again."""
        part = "thinker" if row.op == "thinker" else "ops"
        return f"ming-rt bench {part} --device cuda --only '{row.op} {row.shape} {row.dtype}'"

    def markdown(self) -> str:
        """Environment, the whole model, a table of all op rows, and what is missing."""
        c, e = self.ceilings, self.environment
        smi = e["before"]
        lines = [
            f"{e['gpu']} (sm {e['capability']}), driver {smi.get('driver_version', 'unknown')}, "
            f"CUDA {e['cuda']}, torch {e['torch']}, Triton {e['triton'] or 'none'}, ming_rt {e['ming_rt']} "
            f"at {e['commit']}, {e['date']}. Clocks before and after: SM {smi.get('clocks.sm', '?')} and "
            f"{e['after'].get('clocks.sm', '?')} (at most {smi.get('clocks.max.sm', '?')}), memory "
            f"{smi.get('clocks.mem', '?')}.",
            "",
            f"Ceilings of this run: read {c.read_gb_s:.0f} GB/s, copy {c.copy_gb_s:.0f} GB/s, "
            f"bf16 {c.bf16_tflop_s:.0f} TFLOP/s, fp32 {c.fp32_tflop_s:.1f} TFLOP/s.",
        ]
        whole = [r for r in self.rows if r.op == "thinker"]
        if whole:
            lines += ["", "| whole model | time | rate | of the roofline |", "|---|---:|---:|---:|"]
            for r in whole:
                speed = r.extra.get("tokens_per_second")
                lines.append(
                    f"| {r.shape} | {r.median_us / 1e3:.2f} ms | {f'{speed:.0f} tok/s' if speed else ''} "
                    f"| {_percent(self.roofline_share(r))} |"
                )
        ops = [r for r in self.rows if r.op != "thinker"]
        if ops:
            lines += [
                "",
                "Times with a cold cache; hot: back to back. Ratio: the best competitor's time over ours. * "
                "marks a competitor that was not captured into a graph, so that its launches count.",
                "",
                "| op | shape | dtype | us | p20-p80 | hot us | best competitor | its us | ratio | GB/s "
                "| TFLOP/s | roofline | error |",
                "|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
            ]
            lines += [self._line(r) for r in ops]
        for title, items in (
            ("Failed", [f"`{name}`: {reason}" for name, reason in self.failed.items()]),
            ("Competitors that did not run", self._skips()),
            ("Left out, the time was up", [f"`{name}`" for name in self.left_out]),
        ):
            if items:
                lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
        if self.rows:
            lines += ["", f"Repeat a row, for example the first: `{self.command(self.rows[0])}`."]
        return "\n".join(lines) + "\n"

    def _line(self, r: Row) -> str:
        x = r.extra
        peer, ratio = x.get("best_peer"), x.get("ratio_to_best")
        star = "*" if peer in x.get("eager", {}) else ""
        error = x.get("relative_error")
        its = f"{x['cold_us_by_peer'][peer]:.1f}" if peer else ""
        return (
            f"| {r.op} | {r.shape} | {r.dtype} | {r.median_us:.1f} | {r.p20_us:.1f}-{r.p80_us:.1f} "
            f"| {x.get('hot_us', math.nan):.1f} | {peer or ''}{star} "
            f"| {its} "
            f"| {f'**{ratio:.2f}**' if ratio else ''} | {r.gb_s:.0f} | {r.tflop_s:.2f} "
            f"| {_percent(self.roofline_share(r))} | {'' if error is None else f'{error:.0e}'} |"
        )

    def _skips(self) -> list[str]:
        """One line per competitor and reason, with the number of rows it was missing in."""
        counts: dict[tuple[str, str, str], int] = {}
        for row in self.rows:
            for name, reason in row.extra.get("skipped", {}).items():
                key = (row.op, name, reason)
                counts[key] = counts.get(key, 0) + 1
        return [f"{op}, {name}, {n} rows: {reason}" for (op, name, reason), n in counts.items()]

    def write(self, folder: Path, name: str = "bench") -> list[Path]:
        """Write ``name``.{md,json,csv,png} into ``folder`` (the picture needs matplotlib)."""
        paths = super().write(folder, name)
        body = json.loads(paths[1].read_text(encoding="utf-8"))
        body.update(failed=self.failed, left_out=self.left_out)
        for record in body["rows"]:  # NaN, of a row without a torch composition, is no JSON
            record.update({key: None for key, value in record.items() if value != value})
        paths[1].write_text(json.dumps(body, indent=1), encoding="utf-8")
        return paths

    def plot(self, path: Path) -> None:
        """Left: each row's speed against its best competitor. Right: the rows under the roofline."""
        from matplotlib import pyplot

        rows = [r for r in self.rows if r.extra.get("ratio_to_best")]
        ops = list(dict.fromkeys(r.op for r in rows))
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 2.4 + 0.34 * len(ops)))
        for y, op in enumerate(ops):
            ratios = [r.extra["ratio_to_best"] for r in rows if r.op == op]
            left.scatter(ratios, [y] * len(ratios), s=34, color="#2a7ab9", alpha=0.6, linewidths=0)
            worst = min(ratios)
            left.annotate(f"{worst:.2f}", (worst, y), (0, 6), textcoords="offset points", ha="center", size=6)
        left.set_yticks(range(len(ops)), ops, fontsize=8)
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set_xlabel("times the speed of the best competitor, lowest named")
        left.invert_yaxis()
        self._roofline(right)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.grid(which="both", linewidth=0.3)
        figure.suptitle(f"{self.environment['gpu']}, torch {self.environment['torch']}", fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def _roofline(self, axes) -> None:  # type: ignore[no-untyped-def]
        """Rate over intensity, and the measured ceilings."""
        c = self.ceilings
        points = [r for r in self.rows if r.gb_s > 0 and r.tflop_s > 0]
        for op in dict.fromkeys(r.op for r in points):
            mine = [r for r in points if r.op == op]
            intensity = [r.tflop_s * 1e3 / r.gb_s for r in mine]
            axes.scatter(intensity, [r.tflop_s for r in mine], s=16, alpha=0.7, linewidths=0, label=op)
        knee = c.bf16_tflop_s * 1e3 / c.read_gb_s
        axes.plot([0.1, knee], [0.1 * c.read_gb_s / 1e3, c.bf16_tflop_s], color="black", linewidth=0.8)
        axes.plot([knee, knee * 100], [c.bf16_tflop_s] * 2, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("TFLOP/s")
        if points:
            axes.legend(fontsize=6)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
