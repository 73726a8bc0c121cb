"""Timing that survives a noisy machine: ours and the baseline run in turn, in one process, and the ratio of
their medians is what counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

WARM_UP = 0.005
SETTLE = 0.006  # seconds between two timed calls


@dataclass(frozen=True)
class Case:
    """One bench row to be: two callables that do the same work.

    ``bytes`` counts each input and output byte once, ``flops`` the multiplications and additions. ``peers``
    (on a GPU only) are other ways to do that work: each entry makes its callable, or raises ``SkippedError``.
    """

    op: str
    shape: str
    dtype: str
    ours: Callable[[], object]
    torch: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    peers: Mapping[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)


def on_gpu(generator: torch.Generator) -> bool:
    """Whether the rows of a case table, whose tensors lie where the generator is, are for a GPU."""
    return generator.device.type == "cuda"


@dataclass(frozen=True)
class Row:
    """A measured case; times in microseconds."""

    op: str
    shape: str
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    torch_us: float
    gb_s: float
    tflop_s: float
    extra: dict = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times faster than the torch composition."""
        return self.torch_us / self.median_us


def quantile(sorted_values: list[float], q: float) -> float:
    """The value below which a share ``q`` of the sorted values lies."""
    return sorted_values[min(len(sorted_values) - 1, int(q * len(sorted_values)))]


def interleave(*calls: Callable[[], object], seconds: float = 0.5, least: int = 5) -> list[list[float]]:
    """Time the calls in turn (A B A B ...) for about ``seconds``, after one warm-up of each.

    Very short calls are repeated inside one sample. Returns the sorted samples of each, in seconds per call.
    """
    repeats, short = [], []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        took = time.perf_counter() - begin
        repeats.append(max(1, int(5e-4 / max(took, 1e-7))))
        short.append(took < 0.02)
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < least:
        for call, n, again, out in zip(calls, repeats, short, samples, strict=True):
            # OpenMP's idle workers spin for milliseconds and would take a core from the next call. A short
            # call then runs untimed for a while, so that both sides find their threads awake and spread over
            # the cores.
            time.sleep(SETTLE)
            ready = time.perf_counter() + WARM_UP
            while again and time.perf_counter() < ready:
                call()
            begin = time.perf_counter()
            for _ in range(n):
                call()
            out.append((time.perf_counter() - begin) / n)
    return [sorted(s) for s in samples]


def measure(case: Case, seconds: float = 0.5) -> Row:
    """Run one case against its torch composition."""
    ours, torch = interleave(case.ours, case.torch, seconds=seconds)
    median = quantile(ours, 0.5)
    return Row(
        case.op,
        case.shape,
        case.dtype,
        median * 1e6,
        quantile(ours, 0.2) * 1e6,
        quantile(ours, 0.8) * 1e6,
        quantile(torch, 0.5) * 1e6,
        case.bytes / median / 1e9,
        case.flops / median / 1e12,
    )
