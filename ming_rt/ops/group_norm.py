"""Normalisation between the convolutions over frames (contract: csrc/ops/group_norm/group_norm.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels

ACTIVATIONS = {None: 0, "mish": 1}


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: int = 1,
    *,
    per_frame: bool = False,
    act: str | None = None,
    shift: Tensor | None = None,
    pad: tuple[int, int] = (0, 0),
) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias) + shift`` with zero frames around it, in fp32.

    Mean and variance are those of a group of channels over all frames (GroupNorm), or ``per_frame`` over that
    frame alone (with one group: LayerNorm over the channels).

    Args:
        x: [B, T, C] float32 or bfloat16; items and frames may be strided.
        weight, bias: [C], dtype of x.
        groups: of C / groups neighbouring channels each.
        act: None or "mish", ``x tanh(softplus(x))``.
        shift: [B, C], dtype of x, added after the activation.
        pad: frames of zeros before and after each item, as the next convolution takes them.

    Returns:
        [B, pad[0] + T + pad[1], C] in x's dtype, one rounding; an item's bits do not depend on the others.

    Raises:
        ValueError: wrong dtype or shape, a number of groups that does not divide C.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"group_norm: expected act None or 'mish', got {act!r}")
    batch, frames, channels = x.shape
    before, after = pad
    y = torch.empty((batch, before + frames + after, channels), dtype=x.dtype, device=x.device)
    kernels(x).group_norm(x, weight, bias, shift, eps, groups, per_frame, ACTIVATIONS[act], before, y)
    return y


def group_norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: int = 1,
    *,
    per_frame: bool = False,
    act: str | None = None,
    shift: Tensor | None = None,
    pad: tuple[int, int] = (0, 0),
) -> Tensor:
    """``group_norm`` as a plain torch composition."""
    batch, frames, channels = x.shape
    parameters = weight.float(), bias.float(), eps
    if per_frame:
        rows = x.float().reshape(batch * frames, channels, 1)
        y = torch.nn.functional.group_norm(rows, groups, *parameters).view(x.shape)
    else:
        y = torch.nn.functional.group_norm(x.float().mT, groups, *parameters).mT
    if act == "mish":
        y = torch.nn.functional.mish(y)
    if shift is not None:
        y = y + shift.float()[:, None]
    return torch.nn.functional.pad(y, (0, 0, *pad)).to(x.dtype).contiguous()
