"""The caller's end of a running request: events out, cancellation in."""

from __future__ import annotations

import asyncio
import queue
from types import TracebackType
from typing import TYPE_CHECKING

from ming_rt.errors import MingError
from ming_rt.pipelines.events import Done, Event

if TYPE_CHECKING:
    from ming_rt.runtime.engine import Engine
    from ming_rt.runtime.request import Request


class Outbox:
    """Unbounded queue of one request's events: the engine never waits for the reader.

    It takes no lock of its own, so the engine cannot be blocked by a reader that was stopped in the middle.
    One reader at a time, from a thread or from an event loop.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event | MingError] = queue.SimpleQueue()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, item: Event | MingError) -> None:
        """Add an event, or the error that ends the request, and wake the reader."""
        self._queue.put(item)
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, ready = waiter
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the reader's event loop is closed: nobody is waiting any more
                return

    def get(self) -> Event | MingError:
        """The next item; blocks the calling thread."""
        return self._queue.get()

    async def aget(self) -> Event | MingError:
        """The next item; waits without blocking the event loop."""
        while True:
            ready = asyncio.Event()
            self._waiter = (asyncio.get_running_loop(), ready)
            try:  # after the waiter is set, so an item put in between is not missed
                item = self._queue.get_nowait()
            except queue.Empty:
                await ready.wait()
            else:
                self._waiter = None
                return item


class Handle:
    """A submitted request: an iterator, sync or async, of ``TextDelta`` events and a final ``Done``.

    A failed request raises its typed error from the iterator. Leaving a ``with`` block, calling ``cancel`` or
    dropping the last reference ends the request and frees its memory; other requests are not affected.
    """

    def __init__(self, engine: Engine, request: Request, outbox: Outbox) -> None:
        self._engine = engine
        self._request = request
        self._outbox = outbox
        self._end: Done | MingError | None = None

    def cancel(self) -> None:
        """Stop generating; the iterator then ends with ``Done(finish_reason="cancelled")``. Never blocks."""
        self._engine.cancel(self._request)

    def result(self) -> Done:
        """Wait for the end and return it; raises the request's error."""
        while self._end is None:
            self._note(self._outbox.get())
        return self._finished()

    async def aresult(self) -> Done:
        """``result`` for event loops; cancelling the task that waits cancels the request."""
        try:
            while self._end is None:
                self._note(await self._outbox.aget())
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._finished()

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> Event:
        if self._end is not None:
            raise StopIteration
        return self._deliver(self._outbox.get())

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Event:
        if self._end is not None:
            raise StopAsyncIteration
        try:
            return self._deliver(await self._outbox.aget())
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _note(self, item: Event | MingError) -> None:
        if isinstance(item, Done | MingError):
            self._end = item

    def _deliver(self, item: Event | MingError) -> Event:
        self._note(item)
        if isinstance(item, MingError):
            raise item.with_traceback(None)
        return item

    def _finished(self) -> Done:
        assert self._end is not None
        if isinstance(self._end, MingError):
            raise self._end.with_traceback(None)  # it may be raised again
        return self._end

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Handle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
