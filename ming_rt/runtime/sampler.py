"""From logits to text: token choice per request, stop conditions, and text that is safe to send."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ming_rt.errors import EngineError
from ming_rt.ops import sampling
from ming_rt.pipelines.events import FinishReason, TextDelta, TokenLogprob
from ming_rt.runtime import transfer
from ming_rt.runtime.request import Request, SamplingParams


@dataclass(frozen=True)
class Sample:
    """One chosen token; ``logprob`` is set when the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


class TextStream(Protocol):
    """Incremental detokeniser: text that became certain with a token, and the rest at the end."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[Sample | EngineError]:
    """The next token of each request from its row of ``logits``; see ``draw``."""
    return draw(logits, requests)()


def draw(logits: torch.Tensor, requests: Sequence[Request]) -> Callable[[], list[Sample | EngineError]]:
    """Begin to choose the next token of each request from its row of ``logits`` (f32 ``[B, V]``).

    Every row uses only its own request's parameters, history and random numbers, so the result does not
    depend on which requests share the batch. The function returned waits for the device and gives
    the tokens; a row without a usable one (logits that are no numbers, or every token excluded) has an error
    in its place.
    """
    params = [r.params for r in requests]
    # Penalties read the whole sequence; other rows get an empty history.
    histories = [r.tokens if p.reads_history else r.tokens[:0] for r, p in zip(requests, params, strict=True)]
    ends = np.cumsum([0, *map(len, histories)])
    settings = row_settings(requests)
    bounds = np.stack([ends[:-1], ends[1:]], axis=1)
    *values, history, bounds = transfer.send(
        [*settings.values(), np.concatenate(histories), bounds], logits.device
    )
    chosen = sampling.sample(
        logits,
        **dict(zip(settings, values, strict=True)),
        history=history,
        history_bounds=bounds,
        n_logprobs=min(max(p.logprobs or 0 for p in params), logits.shape[1]),
    )
    wants = any(p.logprobs is not None for p in params)
    fetched = transfer.fetch(chosen if wants else chosen[:1])
    return lambda: samples(params, *fetched())


def row_settings(requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """The arguments of ``ops.sample`` that are one number per row, ``[B]`` each; draws the uniforms."""
    params = [r.params for r in requests]
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "repetition_penalty": np.array([p.repetition_penalty for p in params], np.float32),
        "no_repeat_ngram_size": np.array([p.no_repeat_ngram_size for p in params], np.int32),
        "uniforms": uniforms(requests),
    }


def uniforms(requests: Sequence[Request]) -> np.ndarray:
    """f32 ``[B]``: the next random number of each request that draws, 0 for the others."""
    return np.array([r.uniform() if r.params.temperature else 0.0 for r in requests], np.float32)


def samples(
    params: Sequence[SamplingParams], ids: torch.Tensor, *scores: torch.Tensor
) -> list[Sample | EngineError]:
    """What ``ops.sample`` chose; ``scores``: its other results, given if a row wants log-probabilities."""
    chosen: list[Sample | EngineError] = []
    for row, (token, p) in enumerate(zip(ids.tolist(), params, strict=True)):
        if token < 0:
            why = "the logits hold NaN or infinity, or leave no token that may be chosen"
            chosen.append(EngineError(f"choosing the next token failed: {why}"))
        elif p.logprobs is None:
            chosen.append(Sample(token))
        else:
            logprob, best, best_logprobs = (t[row].tolist() for t in scores)
            top = zip(best[: p.logprobs], best_logprobs[: p.logprobs], strict=True)
            chosen.append(Sample(token, TokenLogprob(token, logprob, tuple(top))))
    return chosen


class StopFilter:
    """Passes text on until one of ``stops`` appears in it, holding back whatever may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now safe; sets ``stopped`` when a stop string is complete (it is not returned)."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held-back text at the end of an answer that did not stop."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Answer:
    """Turns a request's tokens into deltas and decides when the answer is over."""

    def __init__(self, stream: TextStream, stops: Sequence[str], stop_ids: Collection[int]) -> None:
        self._stream = stream
        self._filter = StopFilter(stops)
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        """Of all tokens pushed, when asked for."""

    @property
    def text(self) -> str:
        """All text of the deltas so far."""
        return "".join(self._text)

    def push(self, sample: Sample, is_last: bool) -> tuple[TextDelta | None, FinishReason | None]:
        """Take the next token; ``is_last`` = no further one is allowed. Returns new text and the verdict."""
        self._tokens.append(sample.token)
        if sample.logprob is not None:
            self._logprobs.append(sample.logprob)
            self.logprobs.append(sample.logprob)
        if sample.token in self._stop_ids:
            return self.flush(), "stop"
        delta = self._emit(self._filter.push(self._stream.push(sample.token)))
        if self._filter.stopped:
            return delta, "stop"
        if not is_last:
            return delta, None
        tail = self.flush()
        if delta is not None and tail is not None:
            delta = TextDelta(
                delta.text + tail.text, delta.token_ids + tail.token_ids, delta.logprobs + tail.logprobs
            )
        return delta or tail, "stop" if self._filter.stopped else "length"

    def flush(self) -> TextDelta | None:
        """Text that was held back; to be called once when the answer ends."""
        safe = self._filter.push(self._stream.flush())
        return self._emit(safe + self._filter.flush())

    def _emit(self, text: str) -> TextDelta | None:
        if not text:
            return None
        self._text.append(text)
        delta = TextDelta(text, tuple(self._tokens), tuple(self._logprobs))
        self._tokens, self._logprobs = [], []
        return delta
