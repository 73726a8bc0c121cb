"""Timing on a GPU: replayed graphs between events, with a cold second-level cache and back to back.

Every competitor of a row is captured into graphs of several calls, so that launches cost what they cost
inside a model. "Cold" puts a read of a large buffer before each call and takes off the time of that read
alone; "hot" runs the calls back to back. A call that cannot be captured (it waits for the device) is timed as
it is. The competitors take turns (A B C A B C ...), so that a drift of the clocks meets all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .timing import Case, Row, quantile

Call = Callable[[], object]

FLUSH_BYTES = 320 << 20  # five times the largest second-level cache (60 MB)
GRAPH_SECONDS = 1e-3  # about the length of one timed graph
MOST_CALLS = 40  # in one graph
COLD_CALLS = 8
WARM_UP = 0.025  # seconds
LEAST_ROUNDS = 5


class NotCapturableError(Exception):
    """A call cannot become part of a graph; the message says why."""


class Clock(Protocol):
    """What timing needs of a device."""

    def seconds(self, run: Call) -> float:
        """Device time of ``run``, waited for."""

    def graph(self, call: Call | None, times: int, *, flush: bool) -> Call:
        """A replay of ``times`` calls, each after a flush of the cache if asked for; None: flushes only.

        Raises:
            NotCapturableError: the call cannot be captured.
        """

    def flush(self) -> None:
        """Makes the cache forget what the calls left in it."""


class CudaClock:
    """Events and graphs of the current CUDA device."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, run: Call) -> float:
        """Device time of ``run``, waited for."""
        begin, end = self._events
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def graph(self, call: Call | None, times: int, *, flush: bool) -> Call:
        """A replay of ``times`` captured calls; see ``Clock``."""
        graph = torch.cuda.CUDAGraph()
        try:
            if call is not None:
                _refuse_waits(call)
            with torch.cuda.graph(graph):
                for _ in range(times):
                    if flush:
                        self.flush()
                    if call is not None:
                        call()
        except Exception as error:
            torch.cuda.synchronize()
            raise NotCapturableError(first_line(error)) from error
        return graph.replay

    def flush(self) -> None:
        """Reads a large buffer: what is left in the cache then is clean, so no write-back is timed."""
        torch.sum(self._buffer, dim=0, out=self._sum)


def _refuse_waits(call: Call) -> None:
    """Raise where a call waits for the device: cheaper to find out here than in a capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass
class Runner:
    """One competitor and its samples, in seconds per call."""

    name: str
    call: Call
    hot_graph: Call | None = None
    hot_calls: int = 1
    cold_graph: Call | None = None
    eager_because: str | None = None
    hot: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)

    def prepare(self, clock: Clock) -> None:
        """Run once, choose the length of the graphs, capture them.

        Raises:
            Exception: whatever the call raises.
        """
        self.call()
        took = max(clock.seconds(self.call), 1e-7)
        self.hot_calls = max(1, min(MOST_CALLS, int(GRAPH_SECONDS / took)))
        try:
            self.hot_graph = clock.graph(self.call, self.hot_calls, flush=False)
            self.cold_graph = clock.graph(self.call, COLD_CALLS, flush=True)
        except NotCapturableError as error:
            self.hot_graph = self.cold_graph = None
            self.eager_because = str(error)

    def sample(self, clock: Clock, flushes: Call) -> None:
        """One hot and one cold sample. ``flushes``: a graph of COLD_CALLS flushes."""
        if self.hot_graph is not None and self.cold_graph is not None:
            self.hot.append(clock.seconds(self.hot_graph) / self.hot_calls)
            # A replay's first kernel starts late; both graphs begin with the same one.
            alone = clock.seconds(flushes)
            self.cold.append(max(0.0, clock.seconds(self.cold_graph) - alone) / COLD_CALLS)
        else:
            self.hot.append(clock.seconds(self.call))
            clock.flush()
            self.cold.append(clock.seconds(self.call))

    def forget(self) -> None:
        """Drop the samples of the warm-up."""
        self.hot.clear()
        self.cold.clear()


def run_all(clock: Clock, runners: list[Runner], seconds: float) -> None:
    """Samples of all runners in turn: a warm-up, then about ``seconds`` for each."""
    flushes = clock.graph(None, COLD_CALLS, flush=True)
    for budget, least in ((WARM_UP, 1), (seconds, LEAST_ROUNDS)):
        for runner in runners:
            runner.forget()
        end, rounds = time.perf_counter() + budget * len(runners), 0
        while rounds < least or time.perf_counter() < end:
            for runner in runners:
                runner.sample(clock, flushes)
            rounds += 1
    for runner in runners:
        runner.hot.sort()
        runner.cold.sort()


class SkippedError(Exception):
    """A peer cannot run here; the message says why."""


def competitors(clock: Clock, case: Case) -> tuple[list[Runner], dict[str, str]]:
    """Those of a case that run, ours first, and why the others do not.

    Raises:
        Exception: ours does not run.
    """
    ours = Runner("ours", case.ours)
    ours.prepare(clock)
    runners, skipped = [ours], {}
    others: Mapping[str, Callable[[], Call]] = {"torch": lambda: case.torch, **case.peers}
    for name, make in others.items():
        try:
            runner = Runner(name, make())
            runner.prepare(clock)
            runners.append(runner)
        except SkippedError as reason:
            skipped[name] = str(reason)
        except Exception as error:
            skipped[name] = f"failed: {type(error).__name__}: {first_line(error)}"
    return runners, skipped


def relative_error(ours: object, other: object) -> float | None:
    """``|ours - other| / |other|`` of two results of one shape (of their first tensors); None elsewhere."""
    if isinstance(ours, tuple | list) and isinstance(other, tuple | list) and ours and other:
        return relative_error(ours[0], other[0])
    if not isinstance(ours, torch.Tensor) or not isinstance(other, torch.Tensor) or ours.shape != other.shape:
        return None
    a, b = ours.double(), other.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def measure(clock: Clock, case: Case, seconds: float = 0.1) -> Row:
    """One row: the cold median is its time, ``extra`` holds the hot one and every competitor's.

    ``torch_us`` is NaN where the torch composition does not run.

    Raises:
        Exception: ours does not run.
    """
    runners, skipped = competitors(clock, case)
    error = None
    if "torch" not in skipped:
        error = relative_error(case.ours(), case.torch())
    run_all(clock, runners, seconds)
    ours, *others = runners
    cold = {r.name: quantile(r.cold, 0.5) * 1e6 for r in runners}
    hot = {r.name: quantile(r.hot, 0.5) * 1e6 for r in runners}
    median = cold["ours"] * 1e-6
    best = min(others, key=lambda r: cold[r.name], default=None)
    best_hot = min((hot[r.name] for r in others), default=None)
    extra = {
        "hot_us": hot["ours"],
        "cold_us_by_peer": {r.name: cold[r.name] for r in others},
        "hot_us_by_peer": {r.name: hot[r.name] for r in others},
        "skipped": skipped,
        "eager": {r.name: r.eager_because for r in runners if r.eager_because},
        "best_peer": best.name if best else None,
        "ratio_to_best": cold[best.name] / cold["ours"] if best and cold["ours"] else None,
        "hot_ratio_to_best": best_hot / hot["ours"] if best_hot and hot["ours"] else None,
        "relative_error": error,
    }
    return Row(
        case.op,
        case.shape,
        case.dtype,
        median * 1e6,
        quantile(ours.cold, 0.2) * 1e6,
        quantile(ours.cold, 0.8) * 1e6,
        cold.get("torch", float("nan")),
        case.bytes / median / 1e9 if median else 0.0,
        case.flops / median / 1e12 if median else 0.0,
        extra,
    )


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
