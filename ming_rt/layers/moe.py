"""Mixture of experts: up to three routers, routed experts and an always-on shared expert."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.config import ThinkerConfig
from ming_rt.layers.linear import share
from ming_rt.layers.mlp import GatedMLP
from ming_rt.layers.tap import Tap
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.weights import WeightSource

ROUTERS = ("gate", "image_gate", "audio_gate")  # text, image, audio: the order of the modality numbers


class MoE:
    """``sum_j w_j expert_j(x) + shared(x)``.

    Every rank routes all tokens and holds ``moe_intermediate_size / world`` columns of every expert: the work
    is even whatever the router chooses, and one all_reduce covers routed and shared experts together.
    """

    def __init__(self, config: ThinkerConfig, src: WeightSource, comm: Comm, name: str) -> None:
        self.config, self.comm = config, comm
        hidden, width, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        gates = [f"{name}.{gate}" for gate in (ROUTERS if config.multi_gate else ROUTERS[:1])]
        self.routers = ops.RouterWeights(
            torch.stack([src.tensor(f"{gate}.weight", (count, hidden), torch.float32) for gate in gates]),
            torch.stack([src.tensor(f"{gate}.expert_bias", (count,), torch.float32) for gate in gates])
            if config.router == "grouped_sigmoid"
            else None,
        )
        split = share(f"{name}.experts width", width, src.world)
        rows, columns = (0, src.rank, src.world), (1, src.rank, src.world)
        self.experts = ops.pack_experts(count, hidden, split, src.dtype, quant=src.quant)
        for index in range(count):
            expert = f"{name}.experts.{index}"
            self.experts.set(
                index,
                src.tensor(f"{expert}.gate_proj.weight", (width, hidden), shard=rows),
                src.tensor(f"{expert}.up_proj.weight", (width, hidden), shard=rows),
                src.tensor(f"{expert}.down_proj.weight", (hidden, width), shard=columns),
            )
        self.shared = None
        if config.num_shared_experts:
            shared_width = width * config.num_shared_experts
            self.shared = GatedMLP(src, None, f"{name}.shared_experts", hidden, shared_width)

    def __call__(self, x: torch.Tensor, modality: torch.Tensor | None, tap: Tap) -> torch.Tensor:
        """``x`` ``[N, H]``, router of each token u8 ``[N]`` (None: text) -> ``[N, H]``."""
        config = self.config
        topk_ids, topk_weights, logits = ops.moe_route(
            x,
            self.routers,
            modality if config.multi_gate else None,
            kind=config.router,
            top_k=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            n_group=config.n_group,
            topk_group=config.topk_group,
            scaling=config.routed_scaling_factor,
        )
        tap("router_logits", logits)
        tap("topk_idx", topk_ids)
        tap("topk_weight", topk_weights)
        rows, offsets = ops.moe_permute(topk_ids, config.num_experts)
        hidden = ops.grouped_gemm_swiglu(x, rows, offsets, config.num_experts_per_tok, self.experts)
        routed = ops.grouped_gemm_down(hidden, rows, offsets, self.experts)
        shared = self.shared(x) if self.shared else None
        return self.comm.all_reduce(ops.moe_combine(routed, topk_weights, shared))
