"""Typed events of a generation and the numbers that come with its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token and of the most likely ones in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """Text that became certain since the last delta, never half a character or part of a stop string."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Tokens generated since the last delta; text held back arrives with a later delta."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of ``token_ids``, when asked for."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were reused from earlier requests."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in seconds; None = that stage was not reached."""

    queued: float | None
    """From submission until the engine took the request up."""
    encode: float
    """In the vision and audio encoders."""
    ttft: float | None
    """From submission to the first generated token."""
    total: float
    """From submission to the end."""
    decode_tokens_per_second: float | None
    """Rate of the tokens after the first; None with fewer than two."""
    preemptions: int = 0
    """How often the request gave up its cache pages and was computed again."""


@dataclass(frozen=True)
class Hidden:
    """Hidden states of all prompt tokens."""

    input: torch.Tensor
    """``[S, H]``: input embeddings, media features in place (hidden state 0)."""
    last: torch.Tensor
    """``[S, H]``: after the final norm."""


@dataclass(frozen=True)
class Done:
    """End of an answer."""

    finish_reason: FinishReason
    """"stop" = end token or stop string, "length" = max_tokens or the model's length, "cancelled"."""
    text: str
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...] = ()
    """All generated tokens, an end token and those of a stop string included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of ``token_ids``, when asked for."""
    hidden: Hidden | None = field(default=None, repr=False, compare=False)
    """Hidden states of the prompt, when asked for."""


@dataclass(frozen=True)
class Transcript:
    """Result of a transcription."""

    text: str
    language: str | None
    """Language the model named or was told; None where the generation does not name one."""
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


Event: TypeAlias = TextDelta | Done
