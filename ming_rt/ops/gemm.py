"""Linear layers with packed weights (contract: csrc/ops/gemm/gemm.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels
from ming_rt.ops.packed import FORMATS, PackedWeight, check_layout

# Dense bfloat16 products of so many rows or more go to cuBLAS on CUDA, which is bound by arithmetic there. It
# chooses its order of summation by the shape; below, and in decode steps, a row's bits are its own.
LIBRARY_ROWS = 128
ACTIVATIONS = {None: 0, "gelu": 1, "silu": 2, "relu": 3}


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(x W^T + bias) + residual``; sums and activation in fp32.

    A row's result does not depend on the other rows or on the number of threads, bit for bit. On CUDA that
    holds among up to 32 rows, and among more, below ``LIBRARY_ROWS`` (csrc/ops/gemm/heuristics.h).

    Args:
        x: [M, K], dtype of the weight, rows may be strided (and may overlap).
        bias: [N], dtype of x.
        act: None, "gelu" (exact, with erf), "silu" or "relu".
        residual: [M, N] of the output dtype, added after a rounding to that dtype.
        out_dtype: float32 or bfloat16; None: dtype of x.

    Returns:
        [M, N].
    """
    return _linear(x, w, False, bias, _activation(act), residual, out_dtype or x.dtype)


def linear_swiglu(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``silu(x Wg^T + bg) * (x Wu^T + bu)`` in fp32 with one rounding to x's dtype.

    x: [M, K]; w: gated, [I, K] twice; bias: [2I], gate then up. Returns [M, I].
    """
    return _linear(x, w, True, bias, 0, None, x.dtype)


def _linear(
    x: Tensor,
    w: PackedWeight,
    gated: bool,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    check_layout("linear", x, w.layout)
    if x.is_cuda and x.shape[0] >= LIBRARY_ROWS and _library_takes(x, w, gated):
        plain = bias is None and residual is None and not act and not gated
        if plain and out_dtype == x.dtype:
            return torch.mm(x, w.rows().t())
        sums = torch.mm(x, w.rows().t(), out_dtype=torch.float32)
        return linear_epilogue(sums, x.dtype, gated, bias, act, residual, out_dtype)
    y = torch.empty((x.shape[0], w.n), dtype=out_dtype, device=x.device)
    kernels(x).linear(x, w.data, w.scales, FORMATS[w.quant], w.n, gated, bias, act, residual, y)
    return y


def _library_takes(x: Tensor, w: PackedWeight, gated: bool) -> bool:
    """Whether this is a product for cuBLAS; what is wrong with the others, our kernels say."""
    same = x.dtype == w.dtype == torch.bfloat16 and x.shape[1] == w.k and gated == w.gated
    return same and w.quant is None


def linear_epilogue(
    sums: Tensor,
    dtype: torch.dtype,
    gated: bool,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The last step of ``linear`` or ``linear_swiglu`` alone, on CUDA.

    Args:
        sums: float32 [M, N], or [M, 2I] with gate and up in turn.
        dtype: of the bias; the other arguments are those of ``linear``, ``act`` as a number.
    """
    y = torch.empty(
        (sums.shape[0], sums.shape[1] // (2 if gated else 1)), dtype=out_dtype, device=sums.device
    )
    kernels(sums).linear_epilogue(sums, dtype == torch.bfloat16, gated, bias, act, residual, y)
    return y


def _activation(act: str | None) -> int:
    if act not in ACTIVATIONS:
        raise ValueError(f"linear: expected act None, 'gelu', 'silu' or 'relu', got {act!r}")
    return ACTIVATIONS[act]


def _plain(w: PackedWeight | Tensor) -> Tensor:
    return w.unpack() if isinstance(w, PackedWeight) else w


def linear_torch(
    x: Tensor,
    w: PackedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``linear`` as a plain torch composition; w may also be the plain [N, K] weight."""
    functions = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "relu": torch.relu}
    y = torch.nn.functional.linear(x, _plain(w), bias)
    if act is not None:
        y = functions[act](y)
    y = y.to(out_dtype or x.dtype)
    return y if residual is None else y + residual


def linear_swiglu_torch(x: Tensor, w: PackedWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_swiglu`` as a plain torch composition; w may also be the plain [2I, K] weight."""
    gate, up = torch.nn.functional.linear(x, _plain(w), bias).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
