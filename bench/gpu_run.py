"""The runner behind ``ming-rt bench --device cuda``. A failing row is reported and does not end the run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import ming_rt
from ming_rt.runtime.device import resolve

from . import gpu_thinker
from .gpu_report import GpuCeilings, GpuReport
from .gpu_timing import Clock, CudaClock, measure
from .run import op_cases
from .timing import Row

PARTS = ("thinker", "ops")
COPY_BYTES = 4 << 30  # read and written
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
    "memory.total,persistence_mode"
)


def rate(clock: Clock, call: Callable[[], object], work: float, seconds: float = 0.3) -> float:
    """``work`` per second at the median of repeated calls."""
    for _ in range(3):
        call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(clock.seconds(call))
    return work / sorted(times)[len(times) // 2]


def measure_ceilings(clock: Clock, device: str = "cuda", scale: int = 1) -> GpuCeilings:
    """Bandwidths and matrix rates of this device on random data; ``scale`` divides the sizes, for tests."""

    def matrix_rate(dtype: torch.dtype, size: int) -> float:
        x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return rate(clock, lambda: x @ w.T, 2 * size**3) / 1e12

    def bandwidths() -> tuple[float, float]:
        source = torch.randn(COPY_BYTES // 8 // scale, device=device)
        copy, total = torch.empty_like(source), torch.zeros((), device=device)
        copied = rate(clock, lambda: copy.copy_(source), 2 * source.nbytes)
        read = rate(clock, lambda: torch.sum(source, dim=0, out=total), source.nbytes)
        return copied / 1e9, read / 1e9

    copied, read = bandwidths()
    return GpuCeilings(
        read_gb_s=max(read, copied),
        bf16_tflop_s=matrix_rate(torch.bfloat16, 8192 // scale),
        fp32_tflop_s=matrix_rate(torch.float32, 4096 // scale),
        copy_gb_s=copied,
    )


def query_gpu(run: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> dict[str, str]:
    """What nvidia-smi says of the first GPU: name, driver, clocks, power; what went wrong otherwise."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        answer = run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(QUERY.split(","), (value.strip() for value in answer.split(",")), strict=False))


def commit(folder: Path, run: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> str:
    """The git commit ``folder`` is at, "+" behind it where files differ; ``MING_RT_COMMIT`` says otherwise.

    "unknown" outside a checkout.
    """
    if given := os.environ.get("MING_RT_COMMIT"):
        return given
    try:
        asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        head, changes = (
            run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            for command in asked
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changes else "")


def version(module: str) -> str | None:
    """The version of an installed package; None where there is none."""
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


@dataclass
class Progress:
    """Collects rows, tells of each, writes each to a file at once, and knows when the time is up."""

    log: Path | None = None
    budget: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() - self.started > self.budget

    def attempt(self, name: str, make: Callable[[], Row]) -> None:
        """Measure a row unless the time is up; a failure is noted and the run goes on."""
        if self.over():
            self.left_out.append(name)
            return
        try:
            row = make()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: failed: {self.failed[name]}", file=sys.stderr, flush=True)
            return
        self.rows.append(row)
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        peer, ratio = row.extra.get("best_peer"), row.extra.get("ratio_to_best")
        against = f"x{ratio:.2f} of {peer}" if ratio is not None else ""
        print(
            f"{row.op:<22} {row.shape:<40} {row.dtype:<5} {row.median_us:>11.1f} us   {against}",
            file=sys.stderr,
            flush=True,
        )


@torch.no_grad()
def run(
    parts: tuple[str, ...] = PARTS,
    device: str = "cuda",
    only: str = "",
    seconds: float = 0.1,
    budget: float = float("inf"),
    out: Path | None = None,
) -> GpuReport:
    """Measure the chosen parts, printing each row as it is done.

    Args:
        parts: of ``thinker`` (the whole model at full size, through the engine) and ``ops``.
        device: "cuda" or "cuda:N".
        only: keep only rows whose "op shape dtype" contains this text.
        seconds: measuring time per row and competitor.
        budget: seconds after which no further row is begun.
        out: folder whose ``rows.jsonl`` gets each row at once.

    Raises:
        UnsupportedError: no GPU can be used.
    """
    place = resolve(device)
    torch.cuda.set_device(place.torch)
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = CudaClock()
    before = query_gpu()
    ceilings = measure_ceilings(clock)
    progress = Progress(out / "rows.jsonl" if out else None, budget)
    if "thinker" in parts:
        gpu_thinker.measure(progress, place, only)
        torch.cuda.empty_cache()
    if "ops" in parts:
        with torch.device(place.torch):  # where the torch compositions make their tensors
            for case in op_cases(str(place.torch), first=("moe",)):  # what matters most, if time is short
                name = f"{case.op} {case.shape} {case.dtype}"
                if progress.over():
                    progress.left_out.append(f"{name} and all after it")
                    break
                if only in name:
                    progress.attempt(name, lambda: measure(clock, case, seconds))  # noqa: B023
    environment = {
        "gpu": place.name,
        "capability": ".".join(map(str, place.capability or ())),
        "before": before,
        "after": query_gpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "fbgemm-gpu-genai": version("fbgemm-gpu-genai"),
        "python": platform.python_version(),
        "ming_rt": ming_rt.__version__,
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
    }
    return GpuReport(progress.rows, ceilings, environment, progress.failed, progress.left_out)
