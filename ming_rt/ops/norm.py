"""RMSNorm and LayerNorm over the last dimension (contract: csrc/ops/norm/norm.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_in_fp32: bool = False, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm, computed in fp32.

    Args:
        x: [..., D] float32 or bfloat16.
        weight: [D], dtype of x.
        eps: added to the mean square.
        weight_in_fp32: multiply by the weight before the one rounding to the dtype (Ming-Lite-Omni v1.5,
            flash's vision tower); otherwise the normalised value is rounded first (all other generations).
        residual: [..., D]; if given, ``r = x + residual`` (rounded to the dtype) is normalised instead.

    Returns:
        y [..., D], or (y, r) when a residual is given.
    """
    if x.dim() != 2:
        flat = None if residual is None else residual.reshape(-1, x.shape[-1])
        out = rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, weight_in_fp32=weight_in_fp32, residual=flat)
        return out.view(x.shape) if residual is None else (out[0].view(x.shape), out[1].view(x.shape))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        kernels(x).rms_norm(x, weight, y, None, None, eps, weight_in_fp32)
        return y
    total = torch.empty_like(y)
    kernels(x).rms_norm(x, weight, y, residual, total, eps, weight_in_fp32)
    return y, total


def rms_norm_torch(
    x: Tensor, weight: Tensor, eps: float, *, weight_in_fp32: bool = False, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm`` as a plain torch composition."""
    z = x if residual is None else x + residual
    n = z.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight.float() * n).to(x.dtype) if weight_in_fp32 else weight * n.to(x.dtype)
    return y if residual is None else (y, z)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm in fp32, one rounding to the dtype. x: [..., D]; weight, bias: [D], dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kernels(x).layer_norm(rows, weight, bias, y, eps)
    return y.view(x.shape)


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``layer_norm`` as a plain torch composition."""
    return torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(
        x.dtype
    )
