"""Picture resizing and patch extraction (contract: csrc/ops/image/image.h).

Two resizers of one shape, separable with the horizontal pass first and the same window rule (an output pixel
i is centred on (i + 0.5) * in / out and its kernel is widened by the shrink factor):

* ``resize_u8`` is Pillow's (before version 13), bit exact: 22-bit fixed-point weights, each pass rounded;
* ``resize_frames`` is torch's antialiased interpolation: float32 weights and sums, no rounding in between.

They run on the CPU only: pictures are decoded there, and a resized one is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ming_rt.ops._native import cpu, kernels

Kind = Literal["bicubic", "bilinear"]

PATCH = 14
TEMPORAL_PATCH = 2
MERGE = 2
_FIXED_BITS = 22
_CHUNK_BYTES = 16 << 20  # intermediate memory of resize_frames, so that a clip's passes stay near the cache


def _kernel(kind: Kind, x: np.ndarray) -> np.ndarray:
    """The interpolation kernel at distance x, float64; Keys' cubic has a = -0.5."""
    x = np.abs(x)
    if kind == "bilinear":
        return np.maximum(1 - x, 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _fused(a: np.ndarray, b: np.ndarray | float, c: float) -> np.ndarray:
    """a * b + c of float32 values with one rounding, as torch's kernels compute it."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _kernel_f32(kind: Kind, x: np.ndarray) -> np.ndarray:
    """The same in float32, rounded where torch rounds."""
    x = np.abs(x)
    if kind == "bilinear":
        return np.maximum(1 - x, np.float32(0))
    near = _fused(_fused(x, 1.5, -2.5) * x, x, 1.0)
    far = _fused(_fused(_fused(x, -0.5, 2.5), x, -4.0), x, 2.0)
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _windows(centre: np.ndarray, support: float, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """First input index and number of inputs of every output."""
    lo = np.maximum(np.trunc(centre - support + 0.5), 0).astype(np.int64)
    hi = np.minimum(np.trunc(centre + support + 0.5), n_in).astype(np.int64)
    return lo, hi - lo


def _table(
    weights: np.ndarray, lo: np.ndarray, count: np.ndarray, n_in: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gives every output the same number of taps inside the input, by zero weights before its window."""
    taps = weights.shape[1]
    start = np.minimum(lo, n_in - taps)
    index = np.arange(taps) - (lo - start)[:, None]
    inside = (index >= 0) & (index < count[:, None])
    table = np.where(
        inside, np.take_along_axis(weights, np.clip(index, 0, taps - 1), 1), weights.dtype.type(0)
    )
    return start.astype(np.int32), table


@lru_cache(maxsize=256)
def _fixed_table(n_in: int, n_out: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Window starts int32 [n_out] and 22-bit weights int32 [n_out, taps] of Pillow's resampler."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    centre = (np.arange(n_out) + 0.5) * scale
    lo, count = _windows(centre, (2.0 if kind == "bicubic" else 1.0) * stretch, n_in)
    j = np.arange(count.max())
    weights = _kernel(kind, (lo[:, None] + j - centre[:, None] + 0.5) * (1.0 / stretch))
    weights[j >= count[:, None]] = 0.0
    weights /= np.cumsum(weights, 1)[:, -1:]  # summed one by one, as the original does
    fixed = np.trunc(weights * (1 << _FIXED_BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    start, table = _table(fixed, lo, count, n_in)
    return torch.from_numpy(start), torch.from_numpy(np.ascontiguousarray(table))


@lru_cache(maxsize=256)
def _float_table(n_in: int, n_out: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Window starts int32 [n_out] and float32 weights [n_out, taps], rounded where torch rounds them."""
    f32 = np.float32
    scale = f32(n_in) / f32(n_out)
    stretch = max(scale, f32(1))
    centre = ((np.arange(n_out) + 0.5) * np.float64(scale)).astype(f32)
    lo, count = _windows(
        centre.astype(np.float64), np.float64(f32(2.0 if kind == "bicubic" else 1.0) * stretch), n_in
    )
    j = np.arange(count.max())
    offset = (lo[:, None] + j).astype(f32) - centre[:, None]
    weights = _kernel_f32(
        kind, ((offset.astype(np.float64) + 0.5) * np.float64(f32(1) / stretch)).astype(f32)
    )
    weights[j >= count[:, None]] = 0.0
    weights /= np.cumsum(weights, 1, dtype=f32)[:, -1:]
    start, table = _table(weights, lo, count, n_in)
    return torch.from_numpy(start), torch.from_numpy(np.ascontiguousarray(table))


def _check_size(op: str, height: int, width: int, kind: str) -> None:
    if kind not in ("bicubic", "bilinear"):
        raise ValueError(f"{op}: expected kind bicubic or bilinear, got {kind!r}")
    if height < 1 or width < 1:
        raise ValueError(f"{op}: expected a positive height and width, got {height} x {width}")


def resize_u8(image: Tensor, height: int, width: int, kind: Kind = "bicubic") -> Tensor:
    """Resizes a picture as Pillow before version 13 does, bit exact.

    Args:
        image: [H, W, C] uint8, C in 1..4.
        height, width: size of the result.

    Returns:
        [height, width, C] uint8; the picture itself when it has that size already.
    """
    _check_size("resize_u8", height, width, kind)
    h, w, c = image.shape
    if (h, w) == (height, width):
        return image
    image = image.contiguous()
    out = torch.empty(height, width, c, dtype=torch.uint8)
    temp = torch.empty(h, width, c, dtype=torch.uint8) if h != height and w != width else None
    xs = _fixed_table(w, width, kind) if w != width else (None, None)
    ys = _fixed_table(h, height, kind) if h != height else (None, None)
    cpu.resize_u8(image, out, temp, *xs, *ys)
    return out


def resize_u8_torch(image: Tensor, height: int, width: int, kind: Kind = "bicubic") -> Tensor:
    """``resize_u8`` as a plain torch composition: one dense float64 product per pass, all integers exact."""
    _check_size("resize_u8", height, width, kind)
    x = image.double()
    for dim, size in ((1, width), (0, height)):
        n = image.shape[dim]
        if n == size:
            continue
        start, weights = _fixed_table(n, size, kind)
        columns = start.long()[:, None] + torch.arange(weights.shape[1])
        dense = torch.zeros(size, n, dtype=torch.float64).scatter_(1, columns, weights.double())
        x = torch.einsum("on,nwc->owc" if dim == 0 else "on,hnc->hoc", dense, x)
        x = ((x + (1 << _FIXED_BITS - 1)) / (1 << _FIXED_BITS)).floor().clamp(0, 255)
    return x.to(torch.uint8)


def resize_frames(
    frames: Tensor, height: int, width: int, kind: Kind = "bicubic", *, to_uint8: bool = False
) -> Tensor:
    """Resizes frames as torch's antialiased ``interpolate`` does.

    Args:
        frames: [T, H, W, C] uint8 or float32, C in 1..4.
        height, width: size of the result.
        to_uint8: clamp to 0..255 and round half to even at the end.

    Returns:
        [T, height, width, C] float32, or uint8 with ``to_uint8``.
    """
    _check_size("resize_frames", height, width, kind)
    frames = frames.contiguous()
    t, h, w, c = frames.shape
    out = torch.empty(t, height, width, c, dtype=torch.uint8 if to_uint8 else torch.float32)
    chunk = max(1, min(t, _CHUNK_BYTES // (4 * h * width * c)))
    temp = torch.empty(chunk, h, width, c)
    cpu.resize_frames(frames, out, temp, *_float_table(w, width, kind), *_float_table(h, height, kind))
    return out


def resize_frames_torch(
    frames: Tensor, height: int, width: int, kind: Kind = "bicubic", *, to_uint8: bool = False
) -> Tensor:
    """``resize_frames`` as a plain torch composition."""
    _check_size("resize_frames", height, width, kind)
    x = interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode=kind, antialias=True)
    if to_uint8:
        x = x.clamp(0, 255).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous()


def _grid(frames: Tensor) -> tuple[int, int, int]:
    t, h, w, c = frames.shape
    cell = PATCH * MERGE
    if c != 3 or t < 1 or h < 1 or w < 1 or h % cell or w % cell or (t > 1 and t % TEMPORAL_PATCH):
        raise ValueError(
            f"patchify: frames: expected [1 or even T, multiple of {cell}, multiple of {cell}, 3], "
            f"got {list(frames.shape)}"
        )
    return -(-t // TEMPORAL_PATCH), h // PATCH, w // PATCH


def patchify(
    frames: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalises frames and cuts them into the vision tower's patch rows.

    ``v = (float32(pixel * (1/255)) - mean) / std``; rows run over time blocks, merged rows, merged columns
    and the 2x2 block inside; the 1176 values of a row over channel 3, time 2, y 14, x 14.

    Args:
        frames: [T, H, W, 3] uint8 or float32 (0..255), H and W divisible by 28, T even, or 1 (then doubled).
        mean, std: per channel.

    Returns:
        Patch rows [t*h*w, 1176] float32 and the grid (t, h, w) in patches.
    """
    t, h, w = _grid(frames)
    rows = torch.empty(t * h * w, 3 * TEMPORAL_PATCH * PATCH * PATCH, device=frames.device)
    kernels(frames).patchify(frames.contiguous(), rows, tuple(mean), tuple(std))
    return rows, (t, h, w)


def patchify_torch(
    frames: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, tuple[int, int, int]]:
    """``patchify`` as a plain torch composition."""
    t, h, w = _grid(frames)
    x = (frames.double() * (1 / 255)).float()
    mean, std = (torch.tensor(v, dtype=torch.float32, device=frames.device) for v in (mean, std))
    x = (x - mean) / std
    if len(x) == 1:
        x = x.expand(TEMPORAL_PATCH, -1, -1, -1)
    x = x.reshape(t, TEMPORAL_PATCH, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), (t, h, w)
