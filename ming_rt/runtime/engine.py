"""The engine: many requests over one model, on a thread of its own."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from ming_rt.errors import InvalidRequestError, shown
from ming_rt.runtime.device import Device
from ming_rt.runtime.handle import Handle, Outbox
from ming_rt.runtime.options import EngineOptions, EngineStats
from ming_rt.runtime.request import Request, SamplingParams
from ming_rt.runtime.worker import Worker

if TYPE_CHECKING:
    from ming_rt.inputs.processor import Prompt
    from ming_rt.inputs.tokenizer import Tokenizer
    from ming_rt.models.omni import Omni

__all__ = ["Engine", "EngineOptions", "EngineStats"]


class Engine:
    """Serves any number of requests over one model; safe to use from any thread or event loop.

    The worker thread starts with the first request. ``close`` (or leaving the ``with`` block, or dropping the
    last reference to engine and handles) ends it; requests still running fail with ``EngineClosedError``.

    Args:
        model: ``plan(prompt)``, ``encode(prompt, memo)``, ``thinker.forward(batch, kv)``, ``config.thinker``.
        tokenizer: ``stream()`` gives an incremental detokeniser.
        stop_ids: tokens that end an answer.
        dtype: element type of the cached keys and values (the model's compute dtype).
        device: where the model is.
    """

    def __init__(
        self,
        model: Omni,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        dtype: torch.dtype = torch.float32,
        options: EngineOptions | None = None,
        device: Device | None = None,
    ) -> None:
        self._worker = Worker(
            model, tokenizer, frozenset(stop_ids), dtype, options or EngineOptions(), device or Device()
        )
        self._ids = itertools.count()
        # Runs when the engine is dropped without close, and at interpreter exit.
        self._finalizer = weakref.finalize(self, Worker.stop, self._worker)

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and answer together, that a request can reach."""
        return self._worker.max_len

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, return_hidden: bool = False
    ) -> Handle:
        """Queue a request and return at once.

        Args:
            prompt: token ids and media arrays of the processor.
            params: sampling; greedy by default.
            return_hidden: add the hidden states of all prompt tokens to ``Done`` (the prompt is then computed
                whole, without prefix reuse).

        Raises:
            InvalidRequestError: the prompt is empty or has a token id outside the vocabulary.
            CapacityError: the prompt can never fit.
            EngineClosedError: the engine is closed.
        """
        if not isinstance(return_hidden, bool):
            raise InvalidRequestError(f"return_hidden: expected true or false, got {shown(return_hidden)}")
        params = params or SamplingParams()
        worker = self._worker
        worker.validate(prompt, params)
        request = Request(next(self._ids), prompt, params, worker.max_len, return_hidden)
        outbox = Outbox()
        worker.enqueue(request, outbox)
        handle = Handle(self, request, outbox)
        weakref.finalize(handle, worker.cancel, request).atexit = False
        return handle

    def cancel(self, request: Request) -> None:
        """End a request at the next step; one that has ended already is left alone."""
        self._worker.cancel(request)

    def stats(self) -> EngineStats:
        """Queue lengths, KV usage and counters."""
        return self._worker.stats

    def close(self) -> None:
        """Stop after the current step, fail what still runs, and wait for the worker thread."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
