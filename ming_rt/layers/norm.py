"""Normalisation layers."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.runtime.weights import WeightSource


class RMSNorm:
    """Root-mean-square norm in fp32.

    ``weight_in_fp32`` multiplies by the weight before the one rounding to the activation dtype (v1.5);
    otherwise the normalised value is rounded first and the product again (preview, v1, flash).
    """

    def __init__(
        self, src: WeightSource, name: str, size: int, eps: float, *, weight_in_fp32: bool = False
    ) -> None:
        self.weight = src.tensor(f"{name}.weight", (size,), src.dtype)
        self.eps = eps
        self.weight_in_fp32 = weight_in_fp32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` -> the same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps, weight_in_fp32=self.weight_in_fp32)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(norm(r), r)`` with ``r = x + residual``, in one pass."""
        return ops.rms_norm(x, self.weight, self.eps, weight_in_fp32=self.weight_in_fp32, residual=residual)


class LayerNorm:
    """Layer norm with weight and bias, computed in fp32 and cast back."""

    def __init__(self, src: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight = src.tensor(f"{name}.weight", (size,), src.dtype)
        self.bias = src.tensor(f"{name}.bias", (size,), src.dtype)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` -> the same shape and dtype."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
