"""Mixture of experts, from router to combined output (contract: csrc/ops/moe/moe.h).

Route, permute, grouped gate/up with SwiGLU, grouped down, combine. A "slot" is ``token * top_k + j``.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from ming_rt.ops._native import cpu, kernels
from ming_rt.ops.gemm import linear_swiglu_torch
from ming_rt.ops.packed import (
    FORMATS,
    Layout,
    PackedWeight,
    Quant,
    check_layout,
    check_quant,
    layout_of,
    pack_weight,
    packed_memory,
)

RouterKind = Literal["softmax", "grouped_sigmoid"]


class RouterWeights:
    """The routers of one layer, packed in float32 whatever the compute dtype.

    Args:
        weights: [R, E, H], one router per modality number (0 text, 1 image, 2 audio), or R = 1; may be meta.
        bias: [R, E] expert bias of the grouped-sigmoid router; None for softmax.
    """

    def __init__(self, weights: Tensor, bias: Tensor | None = None) -> None:
        self.count, self.experts, self.hidden = weights.shape
        self.layout = layout_of(weights)
        self.data = torch.stack([pack_weight(w, torch.float32).data for w in weights])
        self.bias = None if bias is None else bias.float().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and biases."""
        return 4 * (self.data.numel() + (0 if self.bias is None else self.bias.numel()))

    def unpack(self) -> Tensor:
        """The plain weights, float32 [R, E, H]."""
        shape = (self.experts, self.hidden, torch.float32, False, self.layout)
        return torch.stack([PackedWeight(data, *shape).unpack() for data in self.data])


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


def moe_route(
    x: Tensor,
    routers: RouterWeights,
    modality: Tensor | None = None,
    *,
    kind: RouterKind,
    top_k: int,
    norm_topk_prob: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose ``top_k`` experts per token, all in fp32; only the effective router of a token is computed.

    "softmax": the largest probabilities, divided by their sum if ``norm_topk_prob`` and top_k > 1.
    "grouped_sigmoid": the bias counts for the choice only; a group's score is the sum of its two largest
    biased scores, experts outside the ``topk_group`` best of ``n_group`` groups are out; the plain sigmoids
    of the chosen are divided by their sum + 1e-20 if top_k > 1. Both are multiplied by ``scaling``.
    Ties go to the lower id; NaN counts as the lowest score, so ids are always valid.

    Args:
        x: [N, H] float32 or bfloat16, rows may be strided.
        modality: uint8 [N], the router of each token; None: router 0.

    Returns:
        topk_ids int32 [N, top_k] in ascending order, topk_weights float32 [N, top_k], logits float32 [N, E].
    """
    if kind not in ("softmax", "grouped_sigmoid"):
        raise ValueError(f"moe_route: expected kind 'softmax' or 'grouped_sigmoid', got {kind!r}")
    sigmoid = kind == "grouped_sigmoid"
    tokens = x.shape[0]
    ids = torch.empty((tokens, top_k), dtype=torch.int32)
    weights = torch.empty((tokens, top_k), dtype=torch.float32)
    logits = torch.empty((tokens, routers.experts), dtype=torch.float32)
    cpu.moe_route(
        x,
        routers.data,
        routers.bias,
        modality,
        ids,
        weights,
        logits,
        sigmoid,
        norm_topk_prob,
        n_group,
        topk_group,
        scaling,
    )
    return ids, weights, logits


def moe_permute(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the slots by expert (stable).

    Args:
        topk_ids: int32 [N, top_k], values in 0..num_experts - 1.

    Returns:
        rows int32 [N * top_k], the slot at each place;
        offsets int32 [num_experts + 1], each expert's first place.
    """
    rows = torch.empty(topk_ids.numel(), dtype=torch.int32)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    cpu.moe_permute(topk_ids, rows, offsets)
    return rows, offsets


def grouped_gemm_swiglu(
    x: Tensor, rows: Tensor, offsets: Tensor, top_k: int, experts: ExpertWeights
) -> Tensor:
    """``silu(x Wg^T) * (x Wu^T)`` of every slot with its expert, in fp32 with one rounding.

    x: [N, H], dtype of the experts; rows, offsets: from ``moe_permute``.
    Returns [N * top_k, width] in the order of ``rows``.
    """
    check_layout("grouped_gemm_swiglu", x, experts.layout)
    y = torch.empty((rows.shape[0], experts.width), dtype=x.dtype, device=x.device)
    weight = (experts.gate_up, experts.gate_up_scales, FORMATS[experts.quant])
    kernels(x).grouped_gemm_swiglu(x, *weight, rows, offsets, top_k, y, None)
    return y


def grouped_gemm_down(h: Tensor, rows: Tensor, offsets: Tensor, experts: ExpertWeights) -> Tensor:
    """``h Wd^T`` of every slot with its expert.

    h: [N * top_k, width] in the order of ``rows``. Returns [N * top_k, hidden] in slot order.
    """
    check_layout("grouped_gemm_down", h, experts.layout)
    y = torch.empty((rows.shape[0], experts.hidden), dtype=h.dtype, device=h.device)
    weight = (experts.down, experts.down_scales, FORMATS[experts.quant])
    kernels(h).grouped_gemm_down(h, *weight, rows, offsets, y, None)
    return y


def moe_combine(y: Tensor, topk_weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """Weighted sum of each token's expert outputs in fp32, rounded, plus the shared expert's output.

    y: [N * top_k, H] in slot order; topk_weights: float32 [N, top_k]; shared: [N, H]. Returns [N, H].
    """
    out = torch.empty((topk_weights.shape[0], y.shape[1]), dtype=y.dtype)
    cpu.moe_combine(y, topk_weights, shared, out)
    return out


def moe_route_torch(
    x: Tensor,
    routers: RouterWeights | tuple[Tensor, Tensor | None],
    modality: Tensor | None = None,
    *,
    kind: RouterKind,
    top_k: int,
    norm_topk_prob: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``moe_route`` in plain torch; routers may also be plain tensors ([R, E, H], bias [R, E] or None)."""
    weights, bias = (routers.unpack(), routers.bias) if isinstance(routers, RouterWeights) else routers
    z = x.to(weights.dtype)
    logits = torch.nn.functional.linear(z, weights[0])
    if modality is not None:
        for router in range(1, weights.shape[0]):
            mine = (modality == router)[:, None]
            logits = torch.where(mine, torch.nn.functional.linear(z, weights[router]), logits)
    if kind == "softmax":
        scores = logits.softmax(dim=-1)
        ids = scores.topk(top_k, dim=-1).indices
    else:
        scores = logits.sigmoid()
        biased = scores + (bias[0] if modality is None else bias[modality.long()])
        groups = biased.view(x.shape[0], n_group, -1)
        kept = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        mask = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, kept, True)[..., None]
        ids = groups.masked_fill(~mask, -torch.inf).flatten(1).topk(top_k, dim=-1).indices
    ids = ids.sort(dim=-1).values
    chosen = scores.gather(1, ids)
    if top_k > 1 and (norm_topk_prob or kind == "grouped_sigmoid"):
        chosen = chosen / (chosen.sum(-1, keepdim=True) + (1e-20 if kind == "grouped_sigmoid" else 0.0))
    return ids.int(), chosen * scaling, logits


def moe_permute_torch(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``moe_permute`` as a plain torch composition."""
    flat = topk_ids.flatten().long()
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return flat.argsort(stable=True).int(), offsets.int()


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


def moe_combine_torch(y: Tensor, topk_weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """``moe_combine`` as a plain torch composition."""
    out = (
        (y.view(*topk_weights.shape, -1).to(topk_weights.dtype) * topk_weights[..., None]).sum(1).to(y.dtype)
    )
    return out if shared is None else out + shared
