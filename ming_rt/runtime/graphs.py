"""Decode steps that follow each other without the host.

On a GPU the host needs longer to launch the kernels of a decode step than the GPU to run them. A step that
only decodes is therefore recorded once per batch size (*bucket*) as a CUDA graph over buffers that stay where
they are, and one call replays it. Sampling is inside, and ``ops.advance`` at the beginning takes every row
from the token chosen last to its next position: the host may launch a step before it knows that token.

Rows of a bucket that no request uses mirror row 0, but write nothing to the cache. They choose its experts,
so that they read no weights that are not read anyway.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence

import torch

from ming_rt import ops
from ming_rt.errors import EngineError
from ming_rt.models.thinker import Thinker
from ming_rt.runtime import transfer
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.sampler import Sample, row_settings, samples, uniforms
from ming_rt.runtime.scheduler import Chunk

BUCKETS = (1, 2, 4, 8, 16, 32)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a step, a function over static buffers, one that repeats it at small cost; may run it to do so."""


def run_directly(step: Callable[[], None]) -> Callable[[], None]:
    """The capture of devices without graphs: the step itself."""
    return step


class CudaCapture:
    """Records steps as CUDA graphs; to be called in a stream other than the device's default one.

    The graphs share one pool of memory: they never run at once, and leave nothing there for each other.
    """

    _one_at_a_time = threading.Lock()  # torch records one graph at a time in a process

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        step()  # what happens only once, such as loading kernels, must not happen while recording
        graph = torch.cuda.CUDAGraph()
        # In the thread's own stream; what other threads do meanwhile is not part of it and does not end it.
        stream = torch.cuda.current_stream()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with self._one_at_a_time, recording:
            step()
        return graph.replay


class DecodeGraphs:
    """Recorded decode steps and the device's state between them; used by one thread on one stream.

    The state holds, row by row, what ``ops.advance`` makes the next step of: the last token, the position and
    length before it, the sampling parameters, the history. It is *staged* from the host when the requests of
    a step are not those of the step before; otherwise only new pages and random numbers are sent.

    Args:
        max_seqs: requests that run at most.
        max_len: tokens a request has at most.
        device: where thinker and cache live.
        capture: how a step is recorded.
    """

    def __init__(
        self,
        thinker: Thinker,
        kv: KVCache,
        max_seqs: int,
        max_len: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._thinker, self._kv, self._device, self._capture = thinker, kv, device, capture
        self._max_len = max_len
        self._rows = rows = next((b for b in BUCKETS if b >= max_seqs), BUCKETS[-1])
        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        # The first two come from the host in every step: a head of the buffer is sent.
        self._layout = transfer.Layout(
            {
                "uniforms": (f32, (rows,)),
                "page_table": (i32, (rows, -(-max_len // kv.page_size))),
                "ids": (i64, (rows,)),
                "slots": (i64, (rows,)),
                "positions": (i32, (3, rows)),
                "kv_lens": (i32, (rows,)),
                "history_bounds": (i64, (rows, 2)),
                "temperature": (f32, (rows,)),
                "top_k": (i32, (rows,)),
                "top_p": (f32, (rows,)),
                "repetition_penalty": (f32, (rows,)),
                "no_repeat_ngram_size": (i32, (rows,)),
            }
        )
        self._buffer = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
        self._state = self._layout.views(self._buffer)
        self._history = torch.zeros(rows * max_len, dtype=i64, device=device)
        self._cu_seqlens = torch.arange(rows + 1, dtype=i32, device=device)
        self._logit_rows = torch.arange(rows, device=device)
        self._mirror = torch.zeros(self._layout.nbytes, dtype=torch.uint8)
        self._host = {name: view.numpy() for name, view in self._layout.views(self._mirror).items()}
        self._steps: dict[int, Callable[[], None]] = {}
        self._last: Sequence[Chunk] = ()
        self._num_pages: list[int] = []

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether ``launch`` can run this step: only generated tokens, each of which gives the next one.

        Log-probabilities and hidden states (which are the prompt's) are not part of the recorded step.
        """
        return len(chunks) <= self._rows and all(
            c.start >= c.request.num_prompt
            and c.stop - c.start == 1
            and c.samples
            and c.request.params.logprobs is None
            for c in chunks
        )

    def forget(self) -> None:
        """Stage the next step whole, because something else has run or failed."""
        self._last = ()

    def launch(self, chunks: Sequence[Chunk]) -> Callable[[], list[Sample | EngineError]]:
        """Launch a step that ``fits``; the function returned waits for it and gives its tokens.

        The step may follow the last one launched before that one's tokens are known: the chunks of both are
        then of the same requests, each a token further.
        """
        params = [c.request.params for c in chunks]
        bucket = next(b for b in BUCKETS if b >= len(chunks))
        if bucket not in self._steps:
            self._record(bucket)
        last, self._last = self._last, ()  # staged anew if anything fails
        follows = [(c.request, c.start) for c in chunks] == [(c.request, c.stop) for c in last]
        if follows:
            self._refresh(chunks, bucket)
        else:
            self._stage(chunks, bucket)
        self._steps[bucket]()
        self._last = chunks
        fetched = transfer.fetch([self._state["ids"][: len(chunks)]])
        return lambda: samples(params, *fetched())

    def _record(self, bucket: int) -> None:
        """Capture the step of a bucket, with rows that write to nobody's memory: a capture may run it."""
        state = {
            name: view[:, :bucket] if name == "positions" else view[:bucket]
            for name, view in self._state.items()
        }
        batch = Batch(
            input_ids=state["ids"],
            positions=state["positions"],
            slots=state["slots"],
            page_table=state["page_table"],
            cu_seqlens_q=self._cu_seqlens[: bucket + 1],
            kv_lens=state["kv_lens"],
            logit_rows=self._logit_rows[:bucket],
        )
        settings = {
            name: state[name]
            for name in (
                "temperature",
                "top_k",
                "top_p",
                "repetition_penalty",
                "no_repeat_ngram_size",
                "uniforms",
                "history_bounds",
            )
        }

        def step() -> None:
            ops.advance(
                batch.input_ids,
                batch.positions,
                batch.kv_lens,
                batch.slots,
                batch.page_table,
                self._history,
                state["history_bounds"],
                self._kv.page_size,
            )
            logits = self._thinker.forward(batch, self._kv).logits
            chosen, *_ = ops.sample(logits, history=self._history, **settings)
            batch.input_ids.copy_(chosen)

        self._buffer.zero_()
        for name, value in (("slots", -1), ("top_p", 1), ("repetition_penalty", 1)):
            self._state[name].fill_(value)
        self.forget()
        try:
            self._steps[bucket] = self._capture(step)
        except RuntimeError as problem:  # running out of memory is one
            # Slower, but right; to try again at every step would stop the device every time.
            warnings.warn(f"decode steps of {bucket} rows run without a graph: {problem}", stacklevel=2)
            self._steps[bucket] = step

    def _stage(self, chunks: Sequence[Chunk], bucket: int) -> None:
        """Send the whole state of a step's requests."""
        host, rows = self._host, len(chunks)
        self._num_pages = [0] * rows
        self._note_pages(chunks)
        for row, chunk in enumerate(chunks):
            request, begin = chunk.request, row * self._max_len
            host["ids"][row] = request.tokens[chunk.start]
            host["positions"][:, row] = request.positions[:, chunk.start] - 1
            host["kv_lens"][row] = chunk.start
            # Without penalties a row's history is written, but never read.
            host["history_bounds"][row] = begin, begin + chunk.start * request.params.reads_history
        for name, values in row_settings([c.request for c in chunks]).items():
            host[name][:rows] = values
        host["slots"][:rows] = 0
        for name, values in host.items():
            values = values.T if name == "positions" else values
            values[rows:bucket] = values[0]
        host["slots"][rows:bucket] = -1
        self._send(self._layout.nbytes)
        tokens = [
            (row * self._max_len, c.request.tokens[: c.start])
            for row, c in enumerate(chunks)
            if c.request.params.reads_history
        ]
        if tokens:
            sent = transfer.send([past for _, past in tokens], self._device)
            for (begin, _), past in zip(tokens, sent, strict=True):
                self._history[begin : begin + len(past)] = past

    def _refresh(self, chunks: Sequence[Chunk], bucket: int) -> None:
        """Send what the device cannot know of the next step of the same requests."""
        end = 0
        if any(c.request.params.temperature for c in chunks):
            values = self._host["uniforms"]
            values[: len(chunks)] = uniforms([c.request for c in chunks])
            values[len(chunks) : bucket] = values[0]
            end = self._layout.end("uniforms")
        if self._note_pages(chunks):
            self._host["page_table"][len(chunks) : bucket] = self._host["page_table"][0]
            end = self._layout.end("page_table")
        if end:
            self._send(end)

    def _note_pages(self, chunks: Sequence[Chunk]) -> bool:
        """Enter the requests' pages into the host's page table; False = nothing new."""
        counts = [len(c.request.pages) for c in chunks]
        if counts == self._num_pages:
            return False
        for row, (chunk, known) in enumerate(zip(chunks, self._num_pages, strict=True)):
            self._host["page_table"][row, known : counts[row]] = chunk.request.pages[known:]
        self._num_pages = counts
        return True

    def _send(self, nbytes: int) -> None:
        """Copy the head of the host's state to the device, after the steps launched so far."""
        staging = transfer.host_buffer(nbytes, self._device)
        staging.copy_(self._mirror[:nbytes])
        self._buffer[:nbytes].copy_(staging, non_blocking=True)
