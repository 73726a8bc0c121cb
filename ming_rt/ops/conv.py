"""The input of convolutions over frames (contract: csrc/ops/conv/conv.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ming_rt.ops._native import kernels

ACTIVATIONS = {None: 0, "leaky": 1, "snake": 2}


def conv_frames(
    x: Tensor | Sequence[Tensor],
    frames: int | None = None,
    *,
    act: str | None = None,
    alpha: Tensor | None = None,
    slope: float = 0.0,
    scale: float = 1.0,
    pad: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> Tensor:
    """``act(scale * sum of x)``, padded with zero frames and laid out for a dilated convolution.

    Frames ``dilation`` apart come to lie next to each other: each of the ``dilation`` phases is an item of
    its own for ``Conv1d(..., padded=True)``, whose result can be given here again as it is.

    Args:
        x: float32 [S, R, C], one to three of them with the same strides; frame t is ``x[t % S, t // S]``.
        frames: their number, at most S * R; None: all.
        act: None; "leaky", ``slope * v`` below 0; "snake", ``v + sin(alpha v)^2 / (alpha + 1e-9)``.
        alpha: float32 [C], of "snake".
        pad: frames of zeros before and after.
        dilation: that of the convolution which follows.

    Returns:
        [dilation, ceil((pad[0] + frames + pad[1]) / dilation), C] float32: frame u of the padded ones,
        counted from the first zero, is ``y[u % dilation, u // dilation]``. The rest is zeros.

    Raises:
        ValueError: wrong dtype, shape or number of inputs, negative padding.
    """
    inputs = [x] if isinstance(x, Tensor) else list(x)
    if act not in ACTIVATIONS:
        raise ValueError(f"conv_frames: expected act None, 'leaky' or 'snake', got {act!r}")
    if not inputs or inputs[0].dim() != 3 or dilation < 1 or min(pad) < 0:
        raise ValueError(
            f"conv_frames: expected tensors [S, R, C], padding of 0 or more and a dilation of 1 or more, got "
            f"{[list(t.shape) for t in inputs]}, {pad} and {dilation}"
        )
    count, rows, channels = inputs[0].shape
    frames = count * rows if frames is None else frames
    if not 0 <= frames <= count * rows:
        raise ValueError(f"conv_frames: expected at most the {count * rows} frames of x, got {frames}")
    out_rows = -(-(pad[0] + frames + pad[1]) // dilation)
    y = torch.empty((dilation, out_rows, channels), dtype=torch.float32, device=inputs[0].device)
    kernels(inputs[0]).conv_frames(inputs, frames, ACTIVATIONS[act], alpha, slope, scale, pad[0], y)
    return y


def conv_frames_torch(
    x: Tensor | Sequence[Tensor],
    frames: int | None = None,
    *,
    act: str | None = None,
    alpha: Tensor | None = None,
    slope: float = 0.0,
    scale: float = 1.0,
    pad: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> Tensor:
    """``conv_frames`` as a plain torch composition."""
    inputs = [x] if isinstance(x, Tensor) else list(x)
    v = sum(inputs[1:], inputs[0]) * scale
    v = v.transpose(0, 1).flatten(0, 1)[:frames]
    if act == "leaky":
        v = torch.nn.functional.leaky_relu(v, slope)
    elif act == "snake":
        v = v + (v * alpha).sin().square() / (alpha + 1e-9)
    before, after = pad
    rest = -(before + len(v) + after) % dilation
    v = torch.nn.functional.pad(v, (0, 0, before, after + rest))
    return v.unflatten(0, (-1, dilation)).transpose(0, 1).contiguous()
