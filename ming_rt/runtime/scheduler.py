"""Which tokens of which requests go through the model next.

Continuous batching with chunked prefill: every step first continues the running requests that decode, then
running prefills, then admits waiting requests strictly in order of arrival, all under one token budget.
When pages run out the newest running request is preempted: its pages go back, its tokens stay, and it is
computed again once there is room. The oldest request is never preempted for another, so work always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ming_rt.runtime.kv_cache import PagePool
from ming_rt.runtime.request import Request


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start..stop`` of a request, computed in one step."""

    request: Request
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that its logits give the next one."""
        return self.stop == self.request.num_tokens


class Scheduler:
    """Queues of waiting and running requests over one page pool (not thread-safe; engine thread only)."""

    def __init__(self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                "Scheduler: expected 1 <= max_num_seqs <= max_num_batched_tokens, got "
                f"{max_num_seqs} and {max_num_batched_tokens}"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a new request behind all others."""
        self.waiting.append(request)

    def next_to_prepare(self) -> Iterator[Request]:
        """Waiting requests that could be admitted now but are not prepared, in order."""
        room = self.max_num_seqs - len(self.running)
        for request in list(islice(self.waiting, room)):  # one that fails leaves the queue meanwhile
            if not request.prepared:
                yield request

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and give them pages; empty when nothing can run."""
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        before = self.preemptions
        # Only the newest running request can still be in its prompt (those behind it wait for budget), so the
        # order of arrival is also: decodes first.
        for request in list(self.running):
            if budget == 0:
                break
            if request not in self.running:  # preempted a moment ago, for an older one
                continue
            stop = request.num_computed + min(request.remaining, budget)
            if self._grow(request, stop):
                chunks.append(Chunk(request, request.num_computed, stop))
                budget -= stop - request.num_computed
        if self.preemptions == before:
            self._admit(chunks, budget)
        return chunks

    def ahead(self, chunks: list[Chunk]) -> list[Chunk] | None:
        """The step after ``chunks``, which decode, before their tokens are known; None = it depends on them.

        That is one more token of every running request, unless one is at its limit, one that waits might join
        or somebody would be preempted for pages. A request may still end with the token it gets now; what is
        computed for it then is in vain.
        """
        may_join = self.waiting and len(self.running) < self.max_num_seqs
        if may_join or [c.request for c in chunks] != self.running:
            return None
        if any(c.stop + 1 >= c.request.limit for c in chunks):
            return None
        missing = [self.pool.pages_for(c.stop + 1) - len(c.request.pages) for c in chunks]
        if sum(missing) > self.pool.available:
            return None
        for chunk, count in zip(chunks, missing, strict=True):
            chunk.request.pages += self.pool.allocate(count)
        return [Chunk(c.request, c.stop, c.stop + 1) for c in chunks]

    def commit(self, chunks: list[Chunk]) -> None:
        """Record that the chunks were computed and make the pages they filled reusable."""
        size = self.pool.page_size
        for chunk in chunks:
            request = chunk.request
            request.num_computed = chunk.stop
            for index in range(chunk.start // size, chunk.stop // size):
                self.pool.publish(request.pages[index], request.page_key(index, size))

    def remove(self, request: Request) -> None:
        """Take a finished, failed or cancelled request out, whatever its state, and free its pages."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._free(request)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        pool = self.pool
        # Pages the running requests still need for what they already know, and one more for each: an
        # admission must not be undone a few steps later.
        owed = sum(pool.pages_for(r.num_tokens) - len(r.pages) + 1 for r in self.running)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not request.prepared:
                break
            # Hidden states of all prompt tokens need all of them computed.
            hits = [] if request.return_hidden else pool.lookup(request.prefix_keys(pool.page_size))
            needed = pool.pages_for(request.num_tokens) - len(hits)
            if pool.available < needed + owed:
                pool.release(hits)
                break
            self.waiting.popleft()
            self.running.append(request)
            start = len(hits) * pool.page_size
            stop = min(request.num_tokens, start + budget)
            request.pages = hits + pool.allocate(pool.pages_for(stop) - len(hits))
            request.num_computed = start
            if request.num_output == 0:
                request.num_prefix_hit = start
            chunks.append(Chunk(request, start, stop))
            budget -= stop - start
            owed += pool.pages_for(request.num_tokens) - len(request.pages) + 1

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give ``request`` pages for ``tokens`` tokens, preempting the newest; False = that was itself."""
        missing = self.pool.pages_for(tokens) - len(request.pages)
        while missing > self.pool.available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if missing > 0:
            request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _free(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.num_computed = 0
