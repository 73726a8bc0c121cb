"""rope_scaling and its companions: the thinker's rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ming_rt.errors import ConfigError
from ming_rt.strict_json import REQUIRED, Fields

RopeType = Literal["plain", "linear", "dynamic", "yarn", "3D", "video_rope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the thinker.

    ``type`` "plain" (rope_scaling null) rotates by one position; "3D" and "video_rope" take (t, h, w)
    positions and split the ``rotary_dim / 2`` frequencies into ``sections``. ``factor`` is 1.0 where unused.
    """

    type: RopeType
    theta: float
    rotary_dim: int
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def sections(self) -> tuple[int, int, int] | None:
        """Frequencies per axis (t, h, w); None for the one-dimensional types."""
        if self.type not in ("3D", "video_rope"):
            return None
        return (16, 24, 24) if self.rotary_dim == 128 else (8, 12, 12)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, arch: str | None = None) -> RopeConfig:
        """Reads rope_scaling, rope_theta, head_dim and partial_rotary_factor of an LLM config.

        ``arch`` "moe" or "moe_v2" decides which types exist; by default partial_rotary_factor tells.
        """
        fields = Fields(data, "")
        head_dim = fields.integer("head_dim", lo=2, hi=1024)
        arch = arch or ("moe_v2" if "partial_rotary_factor" in data else "moe")
        return read_rope(fields, head_dim, arch)


def read_rope(llm: Fields, head_dim: int, arch: str) -> RopeConfig:
    """The rotary embedding of an LLM config whose head_dim and architecture are known."""
    theta = llm.number("rope_theta", 10000.0, hi=1e12)
    max_positions = llm.integer("max_position_embeddings", 2048, hi=1 << 30)
    v2 = arch == "moe_v2"
    partial = llm.number("partial_rotary_factor", 0.5, hi=1.0) if v2 else 1.0
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise llm.fail("head_dim", f"an even number of rotated dims, not {head_dim} x {partial:g}")
    # The original code has constant sections: 64 frequencies (v1.5) or 32 (flash).
    fixed = 64 if v2 else 128
    scaling = llm.section("rope_scaling")
    if scaling is None:
        return RopeConfig("plain", theta, rotary_dim, max_position_embeddings=max_positions)
    allowed = ("video_rope", "3D") if v2 else ("linear", "dynamic", "yarn", "3D")
    # The original code reads "type"; newer library versions write the same value as "rope_type".
    also = scaling.choice("rope_type", allowed, None)
    kind = scaling.choice("type", allowed, also if also is not None else REQUIRED)
    if kind in ("3D", "video_rope"):
        if rotary_dim != fixed:
            raise ConfigError(
                f"rope_scaling type {kind!r}: found {rotary_dim} rotated dims (head_dim {head_dim} x "
                f"partial_rotary_factor {partial:g}), expected {fixed}"
            )
        return RopeConfig(kind, theta, rotary_dim, max_position_embeddings=max_positions)
    return RopeConfig(
        kind,
        theta,
        rotary_dim,
        factor=scaling.number("factor", hi=1e6),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=scaling.integer(
            "original_max_position_embeddings", 4096, hi=1 << 30
        ),
        beta_fast=scaling.number("beta_fast", 32.0, hi=1e6),
        beta_slow=scaling.number("beta_slow", 1.0, hi=1e6),
        mscale=scaling.number("mscale", 1.0, zero=True, hi=1e6),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, zero=True, hi=1e6),
    )
