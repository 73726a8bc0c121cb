"""The runner behind ``ming-rt bench``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import ming_rt
from ming_rt import ops

from . import load, thinker
from . import ops as op_benches
from .report import Ceilings, Report
from .timing import Case, Row, interleave, measure

SEED = 0
PARTS = ("ops", "thinker", "load")


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def measure_ceilings() -> Ceilings:
    """Read bandwidth and matrix rates: the better of torch and ours, so that shares of it are honest."""
    block = torch.ones(64 << 20, dtype=torch.float32)
    (seconds,) = interleave(lambda: block.sum(), seconds=1.0)
    read = block.numel() * 4 / seconds[0] / 1e9
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, w = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        packed = ops.pack_weight(w, dtype)
        best = min(s[0] for s in interleave(lambda: ops.linear(x, packed), lambda: x @ w.T, seconds=1.5))  # noqa: B023
        rates[dtype] = 2 * 1024 * 2048 * 2048 / best / 1e12
    return Ceilings(read, rates[torch.bfloat16], rates[torch.float32])


def op_cases(device: str = "cpu", first: tuple[str, ...] = ()) -> Iterator[Case]:
    """The rows of every module under bench/ops, those of ``first`` first; their tensors are on ``device``."""
    names = [module.name for module in pkgutil.iter_modules(op_benches.__path__)]
    for name in sorted(names, key=lambda name: name not in first):
        bench = importlib.import_module(f"{op_benches.__name__}.{name}")
        yield from bench.cases(torch.Generator(device).manual_seed(SEED))


def run(parts: tuple[str, ...] = PARTS, threads: int = 2, only: str = "", seconds: float = 0.5) -> Report:
    """Measure the chosen parts, printing each row as it is done.

    Args:
        parts: of ``ops`` (every kernel), ``thinker`` (prefill and decode of four real-size layers),
            ``load`` (checkpoint loading).
        threads: used by the kernels and by torch alike.
        only: keep only rows whose "op shape dtype" contains this text.
        seconds: measuring time per row.
    """
    torch.set_num_threads(threads)
    ops.set_num_threads(threads)
    torch.set_grad_enabled(False)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        print(
            f"{row.op:<28} {row.shape:<34} {row.dtype:<5} {row.median_us:>11.1f} us"
            f"   torch {row.torch_us:>11.1f} us   x{row.ratio:.2f}",
            file=sys.stderr,
            flush=True,
        )

    ceilings = measure_ceilings()
    if "ops" in parts:
        for case in op_cases():
            if only in f"{case.op} {case.shape} {case.dtype}":
                keep(measure(case, seconds))
    if "thinker" in parts:
        for row in thinker.rows(seconds=4 * seconds, only=only):
            keep(row)
    if "load" in parts:
        for row in load.rows(only=only):
            keep(row)
    environment = {
        "cpu": cpu_name(),
        "threads": threads,
        "isa": ops.isa(),
        "torch": torch.__version__,
        "ming_rt": ming_rt.__version__,
        "seed": SEED,
    }
    return Report(rows, ceilings, environment)
