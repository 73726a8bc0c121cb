"""The engine's thread: it encodes media, schedules, runs the model, samples, and sends events."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ming_rt import ops
from ming_rt.errors import (
    CapacityError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    MingError,
)
from ming_rt.pipelines.events import Done, FinishReason, Hidden, Timings, Usage
from ming_rt.runtime import transfer
from ming_rt.runtime.batch import Batch, pack_batch
from ming_rt.runtime.device import Device
from ming_rt.runtime.graphs import CudaCapture, DecodeGraphs, run_directly
from ming_rt.runtime.handle import Outbox
from ming_rt.runtime.kv_cache import KVCache, PagePool
from ming_rt.runtime.media_cache import MediaCache
from ming_rt.runtime.options import EngineOptions, EngineStats
from ming_rt.runtime.request import Request, SamplingParams
from ming_rt.runtime.sampler import Answer, Sample, draw
from ming_rt.runtime.scheduler import Chunk, Scheduler

if TYPE_CHECKING:
    from ming_rt.models.fusion import MediaEmbeds


@dataclass
class _Live:
    """What the worker keeps of a request beside its scheduling state."""

    answer: Answer
    outbox: Outbox


@dataclass
class _Flight:
    """A step that was launched and whose tokens the host has not read yet.

    Its requests may end meanwhile, of themselves or cancelled; what it computes for them is dropped. Their
    pages are free at once: whoever gets them writes them in a later step, and steps run one after the other.
    """

    chunks: list[Chunk]
    sampling: list[Request]
    in_graph: bool
    read: Callable[[], list[Sample | EngineError]] = list
    """Waits for the step and gives the tokens of ``sampling``."""
    output: Any = None
    """Of the model, where hidden states are wanted."""
    problem: Exception | None = None
    """Why the launch failed."""


class Worker:
    """Everything the engine thread owns. Other threads use ``enqueue``, ``cancel``, ``stop`` and ``stats``.

    A step is launched and then collected. On a device that works beside the host, steps that only decode run
    from ``DecodeGraphs``, and the next is launched before the last is collected where it is certain to come:
    the device then never waits for the host.

    Commands travel through a ``SimpleQueue``, whose ``put`` may be called from finalizers at any moment.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stop_ids: frozenset[int],
        dtype: torch.dtype,
        options: EngineOptions,
        device: Device,
    ) -> None:
        config = model.config.thinker
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.vocab_size = config.vocab_size
        self.max_len = min(options.max_model_len, options.num_pages * options.page_size)
        self.kv = KVCache(
            config.num_hidden_layers,
            options.num_pages,
            options.page_size,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
            device.torch,
        )
        self.pool = PagePool(options.num_pages, options.page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
        self.device = device
        self.graphs: DecodeGraphs | None = None
        if device.kind != "cpu":
            capture = CudaCapture() if device.kind == "cuda" else run_directly
            self.graphs = DecodeGraphs(
                model.thinker, self.kv, options.max_num_seqs, self.max_len, device.torch, capture
            )
        self.flight: _Flight | None = None
        self.unread: Callable[[], object] = list
        """Waits for the last step without tokens."""
        self.media = MediaCache(options.media_cache_bytes)
        self.live: dict[Request, _Live] = {}
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.inbox: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        # Reentrant: dropping the engine may call stop from a garbage collection on the thread that holds it.
        self.gate = threading.RLock()
        self.ended: EngineClosedError | None = None
        self.thread: threading.Thread | None = None
        self.stats = EngineStats(kv_pages=self.pool.num_pages)
        if device.kind == "cuda":  # model and cache were made in the caller's stream, the thread has its own
            torch.cuda.current_stream(device.torch).synchronize()

    # Called from any thread.

    def validate(self, prompt: Any, params: SamplingParams) -> None:
        """Refuse a prompt that no state of the engine could serve."""
        ids = np.asarray(prompt.input_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequestError(f"input_ids: expected a list of integers, got {ids.dtype} {ids.shape}")
        if not len(ids):
            raise InvalidRequestError("input_ids: expected at least one token, got an empty prompt")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InvalidRequestError(
                f"input_ids: expected ids from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}"
            )
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params: expected SamplingParams, got {type(params).__name__}")
        if len(ids) >= self.max_len:
            raise CapacityError(
                f"the prompt has {len(ids)} tokens; expected fewer than {self.max_len}, the longest sequence "
                "this engine holds"
            )

    def enqueue(self, request: Request, outbox: Outbox) -> None:
        """Hand a request to the thread, starting it if need be; ``EngineClosedError`` after its end."""
        with self.gate:
            if self.ended is not None:
                raise EngineClosedError(str(self.ended))
            self.inbox.put(("submit", request, outbox))
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="ming-rt-engine", daemon=True)
                self.thread.start()

    def cancel(self, request: Request) -> None:
        """Ask for the end of a request; allowed in finalizers."""
        self.inbox.put(("cancel", request, None))

    def stop(self) -> None:
        """End the worker and wait for it, unless called on the worker itself."""
        self.inbox.put(("stop", None, None))
        with self.gate:
            thread = self.thread
            if thread is None:
                self.ended = EngineClosedError("the engine is closed")
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # The worker thread.

    def run(self) -> None:
        """Serve commands until told to stop; whatever happens, no request is left without an answer."""
        problem = EngineClosedError("the engine is closed")
        try:
            with torch.inference_mode(), device_stream(self.device):
                while self._take_commands():
                    self._step()
                    self._snapshot()
                if self.flight is not None:  # the memory it works in may be freed next
                    self._collect(self.flight)
        except BaseException as cause:
            problem = EngineClosedError(f"the engine stopped: {type(cause).__name__}: {cause}")
            problem.__cause__ = cause
        finally:
            with self.gate:
                self.ended = problem
            while not self.inbox.empty():  # nothing is submitted any more
                kind, _request, outbox = self.inbox.get()
                if kind == "submit":
                    outbox.put(problem)
            for request in list(self.live):
                self._fail(request, problem)

    def _take_commands(self) -> bool:
        """Apply all pending commands, waiting for one when there is nothing to do; False = stop."""
        while not self.inbox.empty() or not (len(self.scheduler) or self.flight):
            kind, request, outbox = self.inbox.get()
            if kind == "stop":
                return False
            if kind == "submit":
                answer = Answer(self.tokenizer.stream(), request.params.stop, self.stop_ids)
                self.live[request] = _Live(answer, outbox)
                self.scheduler.add(request)
            elif request in self.live:
                self._finish(request, "cancelled")
        return True

    def _step(self) -> None:
        """Launch a step unless one is in flight, launch the one behind it if that is certain, collect."""
        flight, self.flight = self.flight or self._launch_next(), None
        if flight is not None:
            self.flight = self._launch_ahead(flight)
            self._collect(flight)

    def _launch_next(self) -> _Flight | None:
        """Prepare what can be admitted and launch the next step; None = nothing can run."""
        self._prepare()
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        now = time.perf_counter()
        for chunk in chunks:
            chunk.request.clock.started = chunk.request.clock.started or now
        return self._launch(chunks, self.graphs is not None and self.graphs.fits(chunks))

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """Launch the step after one in flight, if its tokens and the commands that wait cannot change it."""
        if not flight.in_graph or flight.problem is not None or not self.inbox.empty():
            return None
        chunks = self.scheduler.ahead(flight.chunks)
        return None if chunks is None else self._launch(chunks, in_graph=True)

    def _launch(self, chunks: list[Chunk], in_graph: bool) -> _Flight:
        """Hand a step to the device; on the CPU it is computed here."""
        sampling = [c.request for c in chunks if in_graph or c.samples]
        flight = _Flight(chunks, sampling, in_graph)
        try:
            if self.graphs is not None and in_graph:
                flight.read = self.graphs.launch(chunks)
                return flight
            if self.graphs is not None:
                self.graphs.forget()
            batch = pack_batch(chunks, self.pool.page_size, self.device.torch)
            output = self.model.thinker.forward(batch, self.kv)
            if sampling:
                flight.read = draw(output.logits, sampling)
            elif self.graphs is not None:
                flight.read = self._keep_pace(batch)
            if batch.want_hidden:
                flight.output = output
        except Exception as problem:
            flight.problem = problem
        return flight

    def _keep_pace(self, batch: Batch) -> Callable[[], list[Sample | EngineError]]:
        """What to wait for after a step without tokens, in the middle of a prompt: the one before it.

        The device then has a step to work on, and the host hears of commands between two of them.
        """
        before, self.unread = self.unread, transfer.fetch([batch.kv_lens])

        def read() -> list[Sample | EngineError]:
            before()
            return []

        return read

    def _collect(self, flight: _Flight) -> None:
        """Wait for a step and give its tokens to those of its requests that still run.

        A step without tokens is waited for when the next one is under way: a fault in it shows then.
        """
        try:
            if flight.problem is not None:
                raise flight.problem
            results = flight.read()
            if self.device.kind != "cpu":
                ops.check_device()
            self._keep_hidden(flight)
        except Exception as problem:
            for chunk in flight.chunks:
                self._fail(chunk.request, _as_error("the model step failed", problem))
            return
        chunks = [c for c in flight.chunks if c.request in self.live]
        self.scheduler.commit(chunks)
        self.counts["steps"] += 1
        self.counts["prompt_tokens"] += sum(
            min(c.stop, c.request.num_prompt) - min(c.start, c.request.num_prompt) for c in chunks
        )
        for request, result in zip(flight.sampling, results, strict=True):
            if request not in self.live:
                continue
            if isinstance(result, EngineError):
                self._fail(request, result)
                continue
            try:
                self._accept(request, result)
            except Exception as problem:
                self._fail(request, _as_error("reading the generated token failed", problem))

    def _prepare(self) -> None:
        """Encode and plan the requests at the head of the queue, at most one with media per step.

        One at a time, so that running requests go on between two pictures or recordings.
        """
        encoded = False
        for request in self.scheduler.next_to_prepare():
            if request.has_media and encoded:
                break
            encoded = encoded or request.has_media
            try:
                plan = self.model.plan(request.prompt)
                media = self._encode(request) if request.has_media else None
                request.plan(plan.positions, plan.delta, plan.modality, media)
            except Exception as problem:
                self._fail(request, _as_error("preparing the prompt failed", problem))

    def _encode(self, request: Request) -> MediaEmbeds | None:
        """Embeddings that replace the request's placeholders, checked."""
        begin = time.perf_counter()
        media = self.model.encode(request.prompt, self.media)
        request.clock.encode = time.perf_counter() - begin
        if media is not None and not bool(torch.isfinite(media.feats.sum(-1)).all()):
            raise InvalidRequestError("media: expected finite features, the encoder produced NaN or infinity")
        return media

    def _keep_hidden(self, flight: _Flight) -> None:
        """Copy the hidden states of prompt tokens to the requests that want them."""
        begin, output = 0, flight.output
        for chunk in flight.chunks:
            request, length = chunk.request, chunk.stop - chunk.start
            count = min(chunk.stop, request.num_prompt) - chunk.start
            if request.return_hidden and count > 0:
                if request.hidden is None:
                    shape = (request.num_prompt, output.hidden0.shape[1])
                    with torch.inference_mode(False):  # the caller gets ordinary tensors
                        request.hidden = Hidden(
                            *(torch.empty(shape, dtype=output.hidden0.dtype) for _ in range(2))
                        )
                where = slice(chunk.start, chunk.start + count)
                request.hidden.input[where] = output.hidden0[begin : begin + count]
                request.hidden.last[where] = output.hidden_last[begin : begin + count]
            begin += length

    def _accept(self, request: Request, chosen: Sample) -> None:
        """Append a sampled token, send the text it made certain, and end the request if it is over."""
        live = self.live[request]
        if request.num_output == 0:
            request.clock.first_token = time.perf_counter()
        request.append(chosen.token)
        self.counts["generated_tokens"] += 1
        delta, reason = live.answer.push(chosen, is_last=request.num_tokens >= request.limit)
        if delta is not None:
            live.outbox.put(delta)
        if reason is not None:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free a request's memory and send its end."""
        live = self._retire(request, reason)
        if reason == "cancelled" and (delta := live.answer.flush()) is not None:
            live.outbox.put(delta)
        live.outbox.put(
            Done(
                finish_reason=reason,
                text=live.answer.text,
                usage=Usage(request.num_prompt, request.num_output, request.num_prefix_hit),
                timings=_timings(request),
                token_ids=tuple(request.output.tolist()),
                logprobs=tuple(live.answer.logprobs),
                hidden=request.hidden,
            )
        )

    def _fail(self, request: Request, problem: MingError) -> None:
        """Free a request's memory and send the error that ended it; one that has ended is left alone."""
        if request in self.live:
            self._retire(request, "error").outbox.put(problem)

    def _retire(self, request: Request, reason: str) -> _Live:
        live = self.live.pop(request)
        self.scheduler.remove(request)
        request.clock.finished = time.perf_counter()
        self.counts["prefix_hit_tokens"] += request.num_prefix_hit
        self.finished[reason] += 1
        self._snapshot()
        return live

    def _snapshot(self) -> None:
        self.stats = EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_pages=self.pool.num_pages,
            kv_pages_used=self.pool.used,
            kv_pages_cached=self.pool.idle,
            preemptions=self.scheduler.preemptions,
            finished=dict(self.finished),
            media_cache_hits=self.media.hits,
            **self.counts,
        )


def _timings(request: Request) -> Timings:
    clock, tokens = request.clock, request.num_output
    finished = clock.finished or time.perf_counter()
    rate = None
    if clock.first_token is not None and tokens > 1:
        rate = (tokens - 1) / max(finished - clock.first_token, 1e-9)
    return Timings(
        queued=None if clock.started is None else clock.started - clock.submitted - clock.encode,
        encode=clock.encode,
        ttft=None if clock.first_token is None else clock.first_token - clock.submitted,
        total=finished - clock.submitted,
        decode_tokens_per_second=rate,
        preemptions=request.preemptions,
    )


@contextmanager
def device_stream(device: Device) -> Iterator[None]:
    """Runs the thread's work on a GPU in a stream of its own, behind what has prepared model and cache.

    Waits for that work in the end: then model and cache may be freed, on whatever stream.
    """
    if device.kind != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device.torch)
    stream.wait_stream(torch.cuda.default_stream(device.torch))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def _as_error(what: str, problem: Exception) -> MingError:
    """The error a request ends with: a typed one as it is, any other inside an ``EngineError``."""
    if isinstance(problem, MingError):
        return problem
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        # Without its cause, whose frames hold the memory of the failed step.
        return CapacityError(f"{what}: the device has not enough memory: {problem}")
    error = EngineError(f"{what}: {type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error
