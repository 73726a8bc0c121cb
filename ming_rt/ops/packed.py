"""Packed weights: the memory that ``linear`` and the experts read (layouts: csrc/ops/gemm/gemm.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ming_rt.ops._native import kernels, on_device

Layout = Literal["panels", "rows"]
Quant = Literal["int8", "int4"]

PANEL = 64  # output columns of one packed panel; a gated panel holds 32 of gate and the same 32 of up
GROUP = 64  # values of k that share a scale in a quantised weight
FORMATS = {None: 0, "int8": 1, "int4": 2}
LEVELS = {"int8": 127, "int4": 7}  # largest magnitude of a quantised value


def layout_of(x: Tensor) -> Layout:
    """The layout of packed weights on the device of ``x``: "panels" on the CPU (and meta), "rows" on CUDA."""
    return "rows" if on_device(x) else "panels"


def packed_elements(
    n: int, k: int, dtype: torch.dtype, gated: bool, layout: Layout = "panels", quant: Quant | None = None
) -> int:
    """Elements of a packed [n, k] weight (gated: of two of them), padding included; quantised: bytes."""
    if layout == "panels":
        outputs = PANEL // 2 if gated else PANEL
        return -(-n // outputs) * PANEL * (-(-k // 2) * 2 if dtype == torch.bfloat16 else k)
    rows = 2 * n if gated else n
    if quant is None:
        return rows * _round_up(k, 16 // dtype.itemsize)
    return rows * _round_up(k, GROUP) // (1 if quant == "int8" else 2)


def scale_elements(n: int, k: int, gated: bool) -> int:
    """Scales of a quantised [n, k] weight (gated: of two of them)."""
    return (2 * n if gated else n) * -(-k // GROUP)


def _round_up(k: int, unit: int) -> int:
    return -(-k // unit) * unit


def _unpack_panels(data: Tensor, n: int, k: int, gated: bool) -> Tensor:
    pair = 2 if data.dtype == torch.bfloat16 else 1
    panels = (
        data.view(-1, -(-k // pair), PANEL, pair).permute(0, 2, 1, 3).reshape(-1, PANEL, -(-k // pair) * pair)
    )
    if not gated:
        return panels.reshape(-1, panels.shape[-1])[:n, :k].contiguous()
    halves = panels.view(-1, 2, PANEL // 2, panels.shape[-1]).transpose(0, 1)
    return halves.reshape(2, -1, panels.shape[-1])[:, :n, :k].reshape(2 * n, k)


def _dequantise(data: Tensor, scales: Tensor, rows: int, quant: Quant) -> Tensor:
    """scale * q, exact in float32: [rows, kp]."""
    if quant == "int8":
        q = data.view(torch.int8)
    else:
        q = torch.stack([data & 15, data >> 4], dim=-1).to(torch.int8) - 8
    return (q.float().view(rows, -1, GROUP) * scales.float().view(rows, -1, 1)).flatten(1)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k] as the kernels of its device read it; gated: gate [n, k] and up [n, k] side by side.

    ``data`` is the packed memory, one-dimensional, of ``dtype`` (quantised: uint8, with bfloat16 ``scales``
    beside it); it may be a meta tensor (sizes only). ``layout`` is "panels" for the CPU, "rows" for CUDA.
    """

    data: Tensor
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False
    layout: Layout = "panels"
    quant: Quant | None = None
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed memory, padding and scales included."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales) if t is not None)

    def rows(self) -> Tensor:
        """A view of the memory, [n, k] or [2n, k] (gate and up rows in turn), of plain weights in rows."""
        return self.data.view(2 * self.n if self.gated else self.n, -1)[:, : self.k]

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight: [n, k], or [2n, k] (gate rows, then up rows) of a gated one.

        ``dtype`` None = the weight's. A quantised weight is what the kernels multiply with, exact in float32.
        """
        if self.layout == "panels":
            return _unpack_panels(self.data, self.n, self.k, self.gated).to(dtype or self.dtype)
        if self.quant is None:
            rows = self.rows()
        else:
            count = 2 * self.n if self.gated else self.n
            rows = _dequantise(self.data, self.scales, count, self.quant)[:, : self.k]
        if self.gated:
            rows = rows.unflatten(0, (self.n, 2)).transpose(0, 1).flatten(0, 1)
        return rows.to(dtype or self.dtype, memory_format=torch.contiguous_format, copy=True)


def check_quant(quant: Quant | None, layout: Layout) -> None:
    """Raise ValueError unless weights of this layout can be packed as ``quant``."""
    if quant not in FORMATS:
        raise ValueError(f"pack_weight: expected quant None, 'int8' or 'int4', got {quant!r}")
    if quant is not None and layout != "rows":
        raise ValueError("quantised weights need a CUDA device")


def packed_memory(
    n: int,
    k: int,
    dtype: torch.dtype,
    gated: bool,
    layout: Layout,
    quant: Quant | None,
    device: torch.device | str,
    count: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised ``data`` and ``scales`` of a packed weight, or of ``count`` of them."""
    size = packed_elements(n, k, dtype, gated, layout, quant)
    data = torch.empty((*count, size), dtype=torch.uint8 if quant else dtype, device=device)
    if quant is None:
        return data, None
    groups = scale_elements(n, k, gated)
    return data, torch.empty((*count, groups), dtype=torch.bfloat16, device=device)


def _pack(
    w: Tensor, up: Tensor | None, dtype: torch.dtype, quant: Quant | None, layout: Layout | None
) -> PackedWeight:
    layout = layout or ("rows" if w.is_meta and quant else layout_of(w))
    check_quant(quant, layout)
    (n, k), gated = w.shape, up is not None
    data, scales = packed_memory(n, k, dtype, gated, layout, quant, w.device)
    if not w.is_meta:
        kernels(w).pack_weight(w, up, data, scales, FORMATS[quant])
    return PackedWeight(data, n, k, dtype, gated, layout, quant, scales)


def pack_weight(
    w: Tensor, dtype: torch.dtype, *, quant: Quant | None = None, layout: Layout | None = None
) -> PackedWeight:
    """Pack a weight on its device, converting on the way.

    Args:
        w: [N, K] float32, float16 or bfloat16, rows may be strided; a meta tensor gives a packed meta weight.
        dtype: float32 or bfloat16, the dtype of activations the weight is multiplied with.
        quant: None, "int8" or "int4" (CUDA devices): symmetric in groups of 64 inputs, bfloat16 scales.
        layout: of a meta tensor, that of the device meant; otherwise it follows from the device.

    Raises ValueError: quantised on the CPU.
    """
    return _pack(w, None, dtype, quant, layout)


def pack_gate_up(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    *,
    quant: Quant | None = None,
    layout: Layout | None = None,
) -> PackedWeight:
    """Pack gate [I, K] and up [I, K] (as ``pack_weight``) into one gated weight with I outputs."""
    return _pack(gate, up, dtype, quant, layout)


def check_layout(op: str, x: Tensor, layout: Layout) -> None:
    """Raise ValueError unless the kernels for ``x`` read weights of ``layout``."""
    if layout != layout_of(x):
        raise ValueError(f"{op}: w: expected a weight packed on the device of x, got one in {layout}")


def pack_weight_torch(w: Tensor, dtype: torch.dtype, layout: Layout = "panels") -> Tensor:
    """The packed memory of ``pack_weight`` as a plain torch composition."""
    n, k = w.shape
    if layout == "rows":
        return torch.nn.functional.pad(w.to(dtype), (0, -k % (16 // dtype.itemsize))).flatten()
    pair = 2 if dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(w.to(dtype), (0, -k % pair, 0, -n % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2).flatten()


def pack_gate_up_torch(gate: Tensor, up: Tensor, dtype: torch.dtype, layout: Layout = "panels") -> Tensor:
    """The packed memory of ``pack_gate_up`` as a plain torch composition."""
    if layout == "rows":
        return pack_weight_torch(torch.stack([gate, up], dim=1).flatten(0, 1), dtype, layout)
    half = PANEL // 2
    padded = torch.nn.functional.pad(torch.stack([gate, up]), (0, 0, 0, -gate.shape[0] % half))
    rows = padded.view(2, -1, half, gate.shape[1]).transpose(0, 1).reshape(-1, gate.shape[1])
    return pack_weight_torch(rows, dtype)


def quantise_torch(w: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    """``data`` and ``scales`` of ``pack_weight(w, quant=quant)`` as a plain torch composition."""
    groups = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % GROUP)).view(w.shape[0], -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / LEVELS[quant]).bfloat16()
    q = (groups / scales.float()).round().clamp(-LEVELS[quant], LEVELS[quant])
    q = q.where(scales != 0, 0.0).to(torch.int8).flatten()
    if quant == "int4":
        low, high = (q + 8).to(torch.uint8).view(-1, 2).unbind(-1)
        return low | high << 4, scales.flatten()
    return q.view(torch.uint8), scales.flatten()
