"""Rotary position embedding: frequencies of every upstream type, angle tables, fused rotation + KV append.

Convention everywhere: half-split. With F frequencies, dims j and j+F of the first 2F dims form a pair
    out[j]   = x[j]   cos a_j - x[j+F] sin a_j
    out[j+F] = x[j+F] cos a_j + x[j]   sin a_j
and dims >= 2F pass unchanged. Tables and rotation are fp32 whatever the activation dtype.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from ming_rt.ops._native import kernels

ROPE_TYPES = ("plain", "linear", "dynamic", "yarn", "3D", "video_rope")


class RopeSettings(Protocol):
    """What the frequency helpers read (satisfied by `ming_rt.config.RopeConfig`)."""

    type: str
    theta: float
    rotary_dim: int
    factor: float | None
    max_position_embeddings: int
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


def inv_freq(theta: float, rotary_dim: int) -> torch.Tensor:
    """Inverse frequencies theta^(-2j/R), j < R/2 -> float32 [R/2].

    Computed in fp32 as 1 / theta^(2j/R), power first: another evaluation order moves cos/sin by up to 3e-4 at
    positions of 3000.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"inv_freq: expected an even positive rotary_dim, got {rotary_dim}")
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def _yarn_inv_freq(cfg: RopeSettings, factor: float) -> torch.Tensor:
    """YaRN: interpolate the low frequencies by `factor`, keep the high ones, blend linearly in between."""
    rotary_dim, extrapolated = cfg.rotary_dim, inv_freq(cfg.theta, cfg.rotary_dim)
    interpolated = 1.0 / (
        factor * cfg.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    )

    def correction(rotations: float) -> float:
        turns = cfg.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(cfg.theta))

    low = float(max(math.floor(correction(cfg.beta_fast)), 0))
    high = float(min(math.ceil(correction(cfg.beta_slow)), rotary_dim - 1))
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return interpolated * ramp + extrapolated * (1 - ramp)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def axis_table(rope_type: str, num_freqs: int) -> torch.Tensor:
    """Which position axis (0 = t, 1 = h, 2 = w) drives each frequency -> uint8 [F].

    "3D": sections t, h, w of F/4, 3F/8, 3F/8 in that order (16/24/24 of 64, 8/12/12 of 32). "video_rope": the
    first 3F/4 frequencies alternate h, w and the F/4 lowest take t. Every other type has one axis (0).
    """
    axis = torch.zeros(num_freqs, dtype=torch.uint8)
    if rope_type not in ("3D", "video_rope"):
        return axis
    if num_freqs % 8:
        raise ValueError(f"axis_table: expected a multiple of 8 frequencies for {rope_type}, got {num_freqs}")
    time, space = num_freqs // 4, 3 * num_freqs // 8
    if rope_type == "3D":
        axis[time : time + space] = 1
        axis[time + space :] = 2
    else:
        axis[0 : 2 * space : 2] = 1
        axis[1 : 2 * space : 2] = 2
    return axis


def rope_frequencies(
    cfg: RopeSettings, seq_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """All that `rope_table` needs for a model: (inv_freq float32 [F], axis uint8 [F], cos/sin scale).

    `seq_len` is the KV length that sizes the table and matters to type "dynamic" only (None: within
    `max_position_embeddings`). Position interpolation of type "linear" is folded into the frequencies.
    Raises ValueError for an unknown type or a missing factor.
    """
    if cfg.type not in ROPE_TYPES:
        raise ValueError(f"rope_frequencies: expected a type of {', '.join(ROPE_TYPES)}, got {cfg.type!r}")
    axis = axis_table(cfg.type, cfg.rotary_dim // 2)
    if cfg.type in ("plain", "3D", "video_rope"):
        return inv_freq(cfg.theta, cfg.rotary_dim), axis, 1.0
    if cfg.factor is None or not cfg.factor > 0:
        raise ValueError(f"rope_frequencies: type {cfg.type!r} needs a positive factor, got {cfg.factor}")
    factor = float(cfg.factor)
    if cfg.type == "linear":
        return inv_freq(cfg.theta, cfg.rotary_dim) / factor, axis, 1.0
    if cfg.type == "dynamic":
        theta, length = cfg.theta, seq_len or 0
        if length > cfg.max_position_embeddings:
            stretch = factor * length / cfg.max_position_embeddings - (factor - 1)
            theta = theta * stretch ** (cfg.rotary_dim / (cfg.rotary_dim - 2))
        return inv_freq(theta, cfg.rotary_dim), axis, 1.0
    scale = _yarn_mscale(factor, cfg.mscale) / _yarn_mscale(factor, cfg.mscale_all_dim)
    return _yarn_inv_freq(cfg, factor), axis, scale


def rope_table(
    positions: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles.

    positions int32 [3, N] (t, h, w; may be negative), inv_freq float32 [F], axis uint8 [F] (values 0..2)
    -> cos, sin float32 [N, F] of positions[axis[j], n] * inv_freq[j] (fp32 product), both times `scale`.
    Raises ValueError on wrong dtypes or shapes or an axis above 2.
    """
    shape = (positions.shape[-1], inv_freq.shape[0])
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=positions.device) for _ in range(2))
    kernels(positions).rope_table(positions, inv_freq, axis, scale, cos, sin)
    return cos, sin


def rope_table_torch(
    positions: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch composition of `rope_table`."""
    angles = positions[axis.long()].float().t() * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Optional per-head q/k RMSNorm, rotation of q and k, write of k and v into the paged cache, q returned.

    qkv float32|bfloat16 [N, (Hq + 2 Hkv) * D] (heads q, k, v; strided rows allowed);
    cos, sin float32 [N, F], 2F <= D;
    k_pages, v_pages float32|bfloat16 [P, Hkv, page, D] contiguous, written in place in their own dtype;
    slots int64 [N], slot = page_index * page + offset, all within the pages and each used once, or -1: the
    token's k and v are not written;
    q_norm, k_norm [D] in qkv's dtype, both or neither: normalised in fp32, cast to qkv's dtype, times weight.
    -> q [N, Hq, D] in qkv's dtype.
    Raises ValueError, before anything is written, on a wrong dtype, shape or (on the CPU) slot.
    """
    head_dim = k_pages.shape[-1]
    q = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    kernels(qkv).rope_append(qkv, cos, sin, k_pages, v_pages, slots, q_norm, k_norm, eps, q)
    return q


def rope_append_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Plain torch composition of `rope_append`."""
    pages, kv_heads, page_size, head_dim = k_pages.shape
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= pages * page_size):
        raise ValueError(f"rope_append: expected slots in [0, {pages * page_size}) or -1, got one outside")
    q, k, v = qkv.view(-1, num_heads + 2 * kv_heads, head_dim).split([num_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = _head_norm(q, q_norm, eps), _head_norm(k, k_norm, eps)
    kept = slots >= 0
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k_pages[page, :, offset] = _rotate(k, cos, sin, k_pages.dtype)[kept]
    v_pages[page, :, offset] = v[kept].to(v_pages.dtype)
    return _rotate(q, cos, sin, q.dtype)


def rope_qk_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotate the q and k parts in place (vision attention, one cos/sin row per patch).

    qkv float32|bfloat16 [N, 3 * H * D] (parts q, k, v; strided rows allowed);
    cos, sin float32 [N, F], 2F <= D.
    Returns qkv. Raises ValueError on wrong dtypes or shapes.
    """
    kernels(qkv).rope_qk_(qkv, cos, sin, num_heads)
    return qkv


def rope_qk_torch_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Plain torch composition of `rope_qk_`."""
    parts = qkv.view(qkv.shape[0], 3 * num_heads, -1)
    parts[:, : 2 * num_heads] = _rotate(parts[:, : 2 * num_heads], cos, sin, qkv.dtype)
    return qkv


def _head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    z = x.float()
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return weight * z.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [N, H, D], cos/sin [N, F] -> the first 2F dims rotated in fp32, the whole cast to dtype."""
    freqs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., :freqs].float(), x[..., freqs : 2 * freqs].float()
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(dtype)
    return torch.cat((rotated, x[..., 2 * freqs :].to(dtype)), dim=-1)
