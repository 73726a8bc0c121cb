"""A generation request: validated sampling parameters and the state the scheduler and sampler work on."""

from __future__ import annotations

import numbers
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ming_rt.errors import InvalidRequestError, shown
from ming_rt.pipelines.events import Hidden
from ming_rt.runtime.kv_cache import chain_key

if TYPE_CHECKING:
    from ming_rt.inputs.processor import Prompt
    from ming_rt.models.fusion import MediaEmbeds

MIN_TOP_P = 1e-6
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_NEW_TOKENS = 1 << 20


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise InvalidRequestError(f"{name}: expected an integer from {low} to {high}, got {shown(value)}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # NaN fails the comparison
        raise InvalidRequestError(f"{name}: expected a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when generation ends; greedy by default.

    Every field is checked on construction; ``InvalidRequestError`` names the field, what was found and what
    is expected.
    """

    temperature: float = 0.0
    """0 = greedy; otherwise the logits are divided by it (up to 100)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this (1e-6 to 1)."""
    repetition_penalty: float = 1.0
    """Scores of tokens already seen in prompt or answer are divided by it, or multiplied where negative.

    0.01 to 100; 1 = off.
    """
    no_repeat_ngram_size: int = 0
    """Forbid completing an n-gram that prompt + answer already contain; 0 = off."""
    seed: int | None = None
    """Seed of this request's own random numbers; None = a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; none of their characters is returned. A single string is accepted."""
    max_tokens: int = 512
    """Upper bound on generated tokens."""
    logprobs: int | None = None
    """None = off; n = log-probability of each generated token and of the n most likely ones (n <= 20)."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", _number("temperature", self.temperature, 0.0, 100.0))
        put("top_k", _integer("top_k", self.top_k, 0, (1 << 31) - 1))
        put("top_p", _number("top_p", self.top_p, MIN_TOP_P, 1.0))
        penalty = _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        put("repetition_penalty", penalty)
        put("no_repeat_ngram_size", _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 1 << 20))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, (1 << 63) - 1))
        put("stop", self._stops(self.stop))
        put("max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_NEW_TOKENS))
        if self.logprobs is not None:
            put("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))

    @property
    def reads_history(self) -> bool:
        """Whether the choice of a token depends on the tokens before it beyond the logits."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    @staticmethod
    def _stops(stop: Any) -> tuple[str, ...]:
        if stop is None:
            return ()
        stops = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, (tuple, list)):
            raise InvalidRequestError(f"stop: expected a string or a list of strings, got {shown(stop)}")
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop: expected at most {MAX_STOP_STRINGS} strings, got {len(stops)}")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"stop: expected strings of 1 to {MAX_STOP_CHARS} characters, got {shown(text)}"
                )
        return tuple(stops)


@dataclass
class RequestClock:
    """Monotonic seconds at which a request reached each stage; None = not yet."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    """First scheduled."""
    first_token: float | None = None
    finished: float | None = None
    encode: float = 0.0
    """Seconds spent in the media encoders for this request (0 on a hit of the media cache)."""


class Request:
    """State of one request inside the engine thread.

    ``limit`` is the number of tokens (prompt and answer) the sequence may reach. ``plan`` fills the arrays
    that depend on the model; until then only ``tokens`` is valid.
    """

    def __init__(
        self, request_id: int, prompt: Prompt, params: SamplingParams, limit: int, return_hidden: bool = False
    ) -> None:
        ids = np.asarray(prompt.input_ids, np.int64)
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.return_hidden = return_hidden
        self.num_prompt = len(ids)
        self.limit = min(limit, len(ids) + params.max_tokens)
        self.clock = RequestClock()

        self._tokens = np.empty(self.limit, np.int64)
        self._tokens[: len(ids)] = ids
        self.num_tokens = len(ids)
        self.num_computed = 0
        """Tokens whose keys and values are in ``pages``."""
        self.num_prefix_hit = 0
        """Prompt tokens found in the cache at the first admission."""
        self.preemptions = 0
        self.pages: list[int] = []

        self.prepared = False
        self.positions = np.empty((3, 0), np.int32)
        self.modality = np.empty(0, np.uint8)
        self.media_rows = np.empty(0, np.int64)
        self.media_feats: torch.Tensor | None = None
        self.hidden: Hidden | None = None
        self._keys: list[bytes] = []

        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.Philox(seed))

    def plan(
        self, positions: np.ndarray, delta: int, modality: np.ndarray | None, media: MediaEmbeds | None = None
    ) -> None:
        """Store what the model derives from the prompt.

        positions i32 ``[3, S]``; token ``i >= S`` gets ``i + delta`` on all axes. modality u8 ``[S]``
        (None = all text); generated tokens are text. media: embeddings of placeholders, rows ascending.
        """
        s, n = self.num_prompt, self.limit
        self.positions = np.empty((3, n), np.int32)
        self.positions[:, :s] = positions
        self.positions[:, s:] = np.arange(s, n) + delta
        self.modality = np.zeros(n, np.uint8)
        if modality is not None:
            self.modality[:s] = modality
        if media is not None:
            self.media_rows, self.media_feats = media.rows, media.feats
        self.prepared = True

    @property
    def tokens(self) -> np.ndarray:
        """i64 ``[num_tokens]``: prompt and generated tokens (a view)."""
        return self._tokens[: self.num_tokens]

    @property
    def output(self) -> np.ndarray:
        """i64: the generated tokens (a view)."""
        return self._tokens[self.num_prompt : self.num_tokens]

    @property
    def num_output(self) -> int:
        """Number of generated tokens."""
        return self.num_tokens - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens that still have to go through the model; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def has_media(self) -> bool:
        """Whether the prompt carries images, videos or audio that need an encoder."""
        prompt = self.prompt
        visual = prompt.pixel_values is not None or prompt.pixel_values_videos is not None
        return visual or bool(prompt.audio_feats)

    def append(self, token: int) -> None:
        """Add a sampled token; the caller has checked ``num_tokens < limit``."""
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own stream, whatever else runs beside it."""
        return float(self._random.random(dtype=np.float32))  # a rounded float64 could become 1

    def media_slice(self, start: int, stop: int) -> slice:
        """Range of ``media_rows`` that lies in tokens ``start..stop``."""
        low, high = np.searchsorted(self.media_rows, (start, stop))
        return slice(int(low), int(high))

    def page_key(self, index: int, page_size: int) -> bytes:
        """Content key of page ``index``, all of whose tokens are known."""
        while len(self._keys) <= index:
            start = len(self._keys) * page_size
            stop = start + page_size
            media = self.media_slice(start, stop)
            self._keys.append(
                chain_key(
                    self._keys[-1] if self._keys else b"",
                    self._tokens[start:stop],
                    self.positions[:, start:stop],
                    self.modality[start:stop],
                    self.media_rows[media] - start,
                    None if self.media_feats is None else self.media_feats[media],
                )
            )
        return self._keys[index]

    def prefix_keys(self, page_size: int) -> Iterator[bytes]:
        """Keys of the full pages that may be reused: the last token is always computed, for its logits."""
        for index in range((self.num_tokens - 1) // page_size):
            yield self.page_key(index, page_size)
