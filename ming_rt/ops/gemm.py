"""Linear layers with packed weights (contract and packed layout: csrc/ops/gemm/gemm.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ming_rt.ops._native import cpu

PANEL = 64  # output columns of one packed panel; a gated panel holds 32 of gate and the same 32 of up
ACTIVATIONS = {None: 0, "gelu": 1, "silu": 2, "relu": 3}


def panel_elements(n: int, k: int, dtype: torch.dtype, gated: bool) -> int:
    """Elements of a packed [n, k] weight (gated: of two of them), padding included."""
    outputs = PANEL // 2 if gated else PANEL
    return -(-n // outputs) * PANEL * (-(-k // 2) * 2 if dtype == torch.bfloat16 else k)


def unpack_panels(data: Tensor, n: int, k: int, gated: bool) -> Tensor:
    """The plain [n, k] weight, or [2n, k] (gate rows, then up rows), of one packed weight."""
    pair = 2 if data.dtype == torch.bfloat16 else 1
    panels = (
        data.view(-1, -(-k // pair), PANEL, pair).permute(0, 2, 1, 3).reshape(-1, PANEL, -(-k // pair) * pair)
    )
    if not gated:
        return panels.reshape(-1, panels.shape[-1])[:n, :k].contiguous()
    halves = panels.view(-1, 2, PANEL // 2, panels.shape[-1]).transpose(0, 1)
    return halves.reshape(2, -1, panels.shape[-1])[:, :n, :k].reshape(2 * n, k)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k] in the kernels' panel layout; gated: gate [n, k] and up [n, k] side by side.

    ``data`` is the packed memory, one-dimensional, of ``dtype``; it may be a meta tensor (sizes only).
    """

    data: Tensor
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the packed memory, padding included."""
        return self.data.numel() * self.data.element_size()

    def unpack(self) -> Tensor:
        """The plain weight: [n, k], or [2n, k] (gate rows, then up rows) of a gated one."""
        return unpack_panels(self.data, self.n, self.k, self.gated)


def _empty_packed(like: Tensor, dtype: torch.dtype, gated: bool) -> PackedWeight:
    n, k = like.shape
    data = torch.empty(panel_elements(n, k, dtype, gated), dtype=dtype, device=like.device)
    return PackedWeight(data, n, k, dtype, gated)


def pack_weight(w: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Pack a weight, converting on the way.

    Args:
        w: [N, K] float32, float16 or bfloat16, rows may be strided; a meta tensor gives a packed meta weight.
        dtype: float32 or bfloat16.
    """
    packed = _empty_packed(w, dtype, False)
    if not w.is_meta:
        cpu.pack_weight(w, None, packed.data)
    return packed


def pack_gate_up(gate: Tensor, up: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Pack gate [I, K] and up [I, K] (as ``pack_weight``) into one gated weight with I outputs."""
    packed = _empty_packed(gate, dtype, True)
    if not gate.is_meta:
        cpu.pack_weight(gate, up, packed.data)
    return packed


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

    A row's result does not depend on the other rows or on the number of threads, bit for bit.

    Args:
        x: [M, K], dtype of the weight, rows may be strided (and may overlap).
        bias: [N], dtype of x.
        act: None, "gelu" (exact, with erf), "silu" or "relu".
        residual: [M, N] of the output dtype, added after a rounding to that dtype.
        out_dtype: float32 or bfloat16; None: dtype of x.

    Returns:
        [M, N].
    """
    y = torch.empty((x.shape[0], w.n), dtype=out_dtype or x.dtype)
    cpu.linear(x, w.data, w.n, False, bias, _activation(act), residual, y)
    return y


def linear_swiglu(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``silu(x Wg^T + bg) * (x Wu^T + bu)`` in fp32 with one rounding to x's dtype.

    x: [M, K]; w: gated, [I, K] twice; bias: [2I], gate then up. Returns [M, I].
    """
    y = torch.empty((x.shape[0], w.n), dtype=x.dtype)
    cpu.linear(x, w.data, w.n, True, bias, 0, None, y)
    return y


def _activation(act: str | None) -> int:
    if act not in ACTIVATIONS:
        raise ValueError(f"linear: expected act None, 'gelu', 'silu' or 'relu', got {act!r}")
    return ACTIVATIONS[act]


def pack_weight_torch(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed memory of ``pack_weight`` as a plain torch composition."""
    n, k = w.shape
    pair = 2 if dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(w.to(dtype), (0, -k % pair, 0, -n % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2).flatten()


def pack_gate_up_torch(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed memory of ``pack_gate_up`` as a plain torch composition."""
    half = PANEL // 2
    padded = torch.nn.functional.pad(torch.stack([gate, up]), (0, 0, 0, -gate.shape[0] % half))
    rows = padded.view(2, -1, half, gate.shape[1]).transpose(0, 1).reshape(-1, gate.shape[1])
    return pack_weight_torch(rows, dtype)


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
