"""Mixture of experts around the experts (contract: csrc/ops/moe/moe.h): route, permute, combine.

Between permute and combine stand the grouped products of ``experts.py``. A "slot" is ``token * top_k + j``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ming_rt.ops._native import kernels
from ming_rt.ops.packed import PackedWeight, check_layout, layout_of, pack_weight

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
    check_layout("moe_route", x, routers.layout)
    sigmoid = kind == "grouped_sigmoid"
    tokens = x.shape[0]
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=x.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    logits = torch.empty((tokens, routers.experts), dtype=torch.float32, device=x.device)
    kernels(x).moe_route(
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
    rows = torch.empty(topk_ids.numel(), dtype=torch.int32, device=topk_ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=topk_ids.device)
    kernels(topk_ids).moe_permute(topk_ids, rows, offsets)
    return rows, offsets


def moe_combine(y: Tensor, topk_weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """Weighted sum of each token's expert outputs in fp32, rounded, plus the shared expert's output.

    y: [N * top_k, H] in slot order; topk_weights: float32 [N, top_k]; shared: [N, H]. Returns [N, H].
    """
    out = torch.empty((topk_weights.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)
    kernels(y).moe_combine(y, topk_weights, shared, out)
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
        mask = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, kept, True)[..., None]
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
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return flat.argsort(stable=True).int(), offsets.int()


def moe_combine_torch(y: Tensor, topk_weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """``moe_combine`` as a plain torch composition."""
    out = (
        (y.view(*topk_weights.shape, -1).to(topk_weights.dtype) * topk_weights[..., None]).sum(1).to(y.dtype)
    )
    return out if shared is None else out + shared
