"""The experts of a mixture: packed weights and the grouped products (contract: csrc/ops/moe/moe.h)."""

from __future__ import annotations

import itertools
import warnings
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ming_rt.ops._native import kernels
from ming_rt.ops.gemm import linear_swiglu_torch
from ming_rt.ops.packed import (
    FORMATS,
    Layout,
    PackedWeight,
    Quant,
    check_layout,
    check_quant,
    layout_of,
    packed_memory,
)

PrefillKernel = Literal["auto", "mma", "cutlass"]


class ExpertWeights:
    """All experts of one layer in packed form: ``gate_up`` and ``down``, each [E, packed elements].

    Filled expert by expert with ``set``, straight into the final memory. Quantised experts have bfloat16
    ``gate_up_scales`` and ``down_scales`` [E, scales] beside it, else None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None
    down_scales: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        *,
        quant: Quant | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.num_experts, self.hidden, self.width, self.dtype = num_experts, hidden, width, dtype
        self.quant: Quant | None = quant
        self._allocate("meta", layout or ("rows" if quant else "panels"))

    def _allocate(self, device: torch.device | str, layout: Layout) -> None:
        check_quant(self.quant, layout)
        self.layout: Layout = layout
        (self.gate_up, self.gate_up_scales), (self.down, self.down_scales) = (
            packed_memory(n, k, self.dtype, gated, layout, self.quant, device, (self.num_experts,))
            for n, k, gated in ((self.width, self.hidden, True), (self.hidden, self.width, False))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed memory, padding and scales included."""
        parts = (self.gate_up, self.down, self.gate_up_scales, self.down_scales)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def set(self, index: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Pack one expert: gate, up [width, hidden] and down [hidden, width], float32, float16 or bfloat16.

        Memory is allocated at the first expert that is not a meta tensor, on its device.
        """
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index}: expected 0..{self.num_experts - 1}")
        shapes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        for name, w, shape in zip(("gate", "up", "down"), (gate, up, down), shapes, strict=True):
            if w.shape != shape:
                raise ValueError(f"expert {name}: expected shape {list(shape)}, got {list(w.shape)}")
        if gate.is_meta:
            return
        if self.gate_up.is_meta:
            self._allocate(gate.device, layout_of(gate))
        gate_up, down_ = self._expert(index)
        for packed, first, second in ((gate_up, gate, up), (down_, down, None)):
            kernels(first).pack_weight(first, second, packed.data, packed.scales, FORMATS[self.quant])

    def _expert(self, index: int) -> tuple[PackedWeight, PackedWeight]:
        gate_up_scales, down_scales = (
            None if scales is None else scales[index] for scales in (self.gate_up_scales, self.down_scales)
        )
        common = (self.layout, self.quant)
        return (
            PackedWeight(
                self.gate_up[index], self.width, self.hidden, self.dtype, True, *common, gate_up_scales
            ),
            PackedWeight(self.down[index], self.hidden, self.width, self.dtype, False, *common, down_scales),
        )

    def unpack(self, index: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Plain weights of one expert: gate and up [2 * width, hidden], down [hidden, width].

        ``dtype`` as in ``PackedWeight.unpack``.
        """
        gate_up, down = self._expert(index)
        return gate_up.unpack(dtype), down.unpack(dtype)


def pack_experts(
    num_experts: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    quant: Quant | None = None,
    layout: Layout | None = None,
) -> ExpertWeights:
    """Empty ``ExpertWeights``, to be filled with ``set``.

    dtype: float32 or bfloat16; quant: None, "int8" or "int4" (CUDA devices), see ``pack_weight``; layout:
    that of the device meant, as long as there are only meta tensors.
    """
    return ExpertWeights(num_experts, hidden, width, dtype, quant=quant, layout=layout)


_prefill: PrefillKernel = "auto"
_hopper_agrees: dict[torch.device, bool] = {}


def set_prefill_kernel(name: PrefillKernel) -> None:
    """Which kernel multiplies many bfloat16 rows per expert on CUDA.

    "auto": CUTLASS on Hopper where it pays, if it agrees with the general kernel on a small product, which is
    tried once per device and process; "mma": always the general kernel; "cutlass": CUTLASS wherever it can
    run (it needs compute capability 9.0, plain weights and dimensions divisible by 8).
    """
    global _prefill
    if name not in ("auto", "mma", "cutlass"):
        raise ValueError(f"set_prefill_kernel: expected 'auto', 'mma' or 'cutlass', got {name!r}")
    _prefill = name


def grouped_gemm_swiglu(
    x: Tensor, rows: Tensor, offsets: Tensor, top_k: int, experts: ExpertWeights
) -> Tensor:
    """``silu(x Wg^T) * (x Wu^T)`` of every slot with its expert, in fp32 with one rounding.

    x: [N, H], dtype of the experts; rows, offsets: from ``moe_permute``.
    Returns [N * top_k, width] in the order of ``rows``.
    """
    check_layout("grouped_gemm_swiglu", x, experts.layout)
    y = torch.empty((rows.shape[0], experts.width), dtype=x.dtype, device=x.device)
    product = (x, experts.gate_up, experts.gate_up_scales, FORMATS[experts.quant], rows, offsets, top_k, y)
    module = kernels(x)
    module.grouped_gemm_swiglu(*product, _workspace(module, True, product))
    return y


def grouped_gemm_down(h: Tensor, rows: Tensor, offsets: Tensor, experts: ExpertWeights) -> Tensor:
    """``h Wd^T`` of every slot with its expert.

    h: [N * top_k, width] in the order of ``rows``. Returns [N * top_k, hidden] in slot order.
    """
    check_layout("grouped_gemm_down", h, experts.layout)
    y = torch.empty((rows.shape[0], experts.hidden), dtype=h.dtype, device=h.device)
    product = (h, experts.down, experts.down_scales, FORMATS[experts.quant], rows, offsets, 1, y)
    module = kernels(h)
    module.grouped_gemm_down(*product, _workspace(module, False, product))
    return y


def _workspace(module: ModuleType, gated: bool, product: tuple) -> Tensor | None:
    """Memory for Hopper's kernel, or None: the general kernels run."""
    x = product[0]
    if not x.is_cuda or _prefill == "mma":
        return None
    size = module.grouped_gemm_workspace(gated, *product, _prefill == "cutlass")
    if not size or (_prefill == "auto" and not _agrees(x.device)):
        return None
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _agrees(device: torch.device) -> bool:
    """Whether Hopper's kernel gives what the general one does; found out at the first use on a device."""
    known = _hopper_agrees.get(device)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return False  # the comparison waits for the device; the next call outside a graph makes it
    try:
        difference = _difference(device)
    except RuntimeError as error:
        difference, reason = float("inf"), f"failed: {error}"
    else:
        reason = f"differs from the general kernel by {difference:.3g}"
    _hopper_agrees[device] = difference <= 0.05  # of values of order one, rounded to bfloat16
    if not _hopper_agrees[device]:
        warnings.warn(
            f"ming_rt: CUTLASS's grouped product {reason} on {device}; the general kernel is used",
            RuntimeWarning,
            stacklevel=2,
        )
    return _hopper_agrees[device]


def _difference(device: torch.device) -> float:
    """Largest difference between the two kernels in both products of five experts, one of them empty."""
    from ming_rt.ops.moe import moe_permute

    hidden, width, count, tokens, top_k = 256, 192, 5, 150, 2
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).bfloat16()

    experts = ExpertWeights(count, hidden, width, torch.bfloat16)
    for e in range(count):
        gate, up = (normal(width, hidden) * hidden**-0.5 for _ in range(2))
        experts.set(e, gate, up, normal(hidden, width) * width**-0.5)
    first = torch.arange(tokens, device=device) % 3
    rows, offsets = moe_permute(torch.stack([first, first + 1], dim=1).int(), count)
    module, x, h = kernels(experts.gate_up), normal(tokens, hidden), normal(tokens * top_k, width)
    worst = 0.0
    for gated, inputs, weight, outputs in (
        (True, x, experts.gate_up, width),
        (False, h, experts.down, hidden),
    ):
        run = module.grouped_gemm_swiglu if gated else module.grouped_gemm_down
        results = []
        for hopper in (False, True):
            y = torch.zeros((rows.shape[0], outputs), dtype=torch.bfloat16, device=device)
            product = (inputs, weight, None, 0, rows, offsets, top_k if gated else 1, y)
            size = module.grouped_gemm_workspace(gated, *product, True) if hopper else 0
            run(*product, torch.empty(size, dtype=torch.uint8, device=device) if size else None)
            results.append(y.float())
        worst = max(worst, (results[0] - results[1]).abs().nan_to_num(nan=torch.inf).max().item())
    return worst


# Per expert: gate and up [2 * width, hidden], down [hidden, width].
PlainExperts = list[tuple[Tensor, Tensor]]


def _plain(experts: ExpertWeights | PlainExperts) -> PlainExperts:
    if isinstance(experts, ExpertWeights):
        return [experts.unpack(index) for index in range(experts.num_experts)]
    return experts


def _active(offsets: Tensor) -> list[tuple[int, int, int]]:
    bounds = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(bounds)) if b > a]


def grouped_gemm_swiglu_torch(
    x: Tensor, rows: Tensor, offsets: Tensor, top_k: int, experts: ExpertWeights | PlainExperts
) -> Tensor:
    """``grouped_gemm_swiglu`` as a plain torch loop over the experts."""
    plain = _plain(experts)
    gathered = x[rows.long() // top_k]
    y = x.new_empty(rows.shape[0], plain[0][1].shape[1])
    for e, begin, end in _active(offsets):
        y[begin:end] = linear_swiglu_torch(gathered[begin:end], plain[e][0])
    return y


def grouped_gemm_down_torch(
    h: Tensor, rows: Tensor, offsets: Tensor, experts: ExpertWeights | PlainExperts
) -> Tensor:
    """``grouped_gemm_down`` as a plain torch loop over the experts."""
    plain = _plain(experts)
    y = h.new_empty(rows.shape[0], plain[0][1].shape[0])
    for e, begin, end in _active(offsets):
        y[rows[begin:end].long()] = torch.nn.functional.linear(h[begin:end], plain[e][1])
    return y
