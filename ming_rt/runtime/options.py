"""What an engine is made with and what it tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ming_rt.errors import InvalidRequestError, shown


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; checked on construction (``InvalidRequestError`` names the field)."""

    num_pages: int = 1024
    page_size: int = 32
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int = 32768
    """Upper bound of prompt + answer; lowered to what the pages hold."""
    media_cache_bytes: int = 256 << 20
    """Encoded media kept for prompts that repeat them."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name == "media_cache_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 48:
                raise InvalidRequestError(
                    f"{name}: expected an integer of at least {low}, got {shown(value)}"
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens: expected at least max_num_seqs = {self.max_num_seqs}, "
                f"got {self.max_num_batched_tokens}"
            )


@dataclass(frozen=True)
class EngineStats:
    """A consistent snapshot, taken between two steps."""

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0
    """Unreferenced pages that a later prompt with the same beginning can reuse."""
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, recomputation after preemption included."""
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    media_cache_hits: int = 0
    preemptions: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    """Ended requests by reason: stop, length, cancelled, error."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages if self.kv_pages else 0.0
