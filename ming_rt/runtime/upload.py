"""Checkpoint files to a device at the speed of the slower of disk and bus, whatever the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

STAGING_BYTES = 32 << 20  # of each of the two pinned buffers


class Event(Protocol):
    """A point in the work of a device that the host can wait for."""

    def synchronize(self) -> None: ...


class Lane(Protocol):
    """Where an ``Uploader`` gets its memory from and sends its copies to."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """u8 host memory that the device reads by itself."""
        ...

    def begin(self) -> None:
        """Copies enqueued from now on come after the device's work so far."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Enqueues ``target.copy_(source)``; the event says when ``source`` may be written again."""
        ...

    def end(self) -> None:
        """The device's work enqueued from now on comes after the copies so far."""
        ...


class CudaLane:
    """A copy stream of a GPU beside its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def end(self) -> None:
        # The copied tensors belong to the current stream: what reuses their memory waits for the copies, too.
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Uploader:
    """Copies host tensors to a device through two staging buffers: one is filled while the other travels.

    The host waits only for a buffer that is still on its way, never for a tensor.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None, nbytes: int = STAGING_BYTES) -> None:
        self.device, self.lane = device, lane or CudaLane(device)
        self._buffers = [self.lane.pinned(nbytes) for _ in range(2)]
        self._travels: list[Event | None] = [None, None]
        self._turn = 0

    def __call__(self, host: torch.Tensor, taken: Callable[[], None] = lambda: None) -> torch.Tensor:
        """``host`` on the device, same shape and dtype; ``taken`` is called after each piece was read."""
        out = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        source, target = (t.view(-1).view(torch.uint8) for t in (host.contiguous(), out))
        step = len(self._buffers[0])
        self.lane.begin()
        for begin in range(0, len(source), step):
            piece = source[begin : begin + step]
            buffer = self._buffers[self._turn][: len(piece)]
            if travels := self._travels[self._turn]:
                travels.synchronize()
            buffer.copy_(piece)
            taken()
            self._travels[self._turn] = self.lane.copy(target[begin : begin + step], buffer)
            self._turn ^= 1
        self.lane.end()
        return out
