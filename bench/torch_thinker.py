"""The thinker as a plain torch composition: the baseline of the whole-network bench.

The same weights, dtypes and rounding as ming_rt's own thinker, written the way one writes it with torch:
linear layers, scaled_dot_product_attention over a growing contiguous cache, a loop over the experts that have
tokens. Plain rotary positions and text routing only, which is what the bench runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ming_rt import ops
from ming_rt.config import ThinkerConfig
from ming_rt.runtime.weights import WeightSource


class TorchThinker:
    """Decoder over one sequence with a growing cache."""

    def __init__(self, config: ThinkerConfig, src: WeightSource) -> None:
        self.config = c = config
        hidden, width, dtype = c.hidden_size, c.moe_intermediate_size, src.dtype
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def read(name: str, *shape: int) -> Tensor:
            return src.tensor(f"model.{name}", shape, dtype).clone()

        self.embed = read("model.word_embeddings.weight", c.vocab_size, hidden)
        self.norm = read("model.norm.weight", hidden)
        self.head = read("lm_head.weight", c.vocab_size, hidden)
        self.frequencies = ops.rope_frequencies(c.rope)[0]
        self.layers = []
        for index in range(c.num_hidden_layers):
            base = f"model.layers.{index}"
            shared = c.num_shared_experts * width
            self.layers.append(
                {
                    "input_norm": read(f"{base}.input_layernorm.weight", hidden),
                    "post_norm": read(f"{base}.post_attention_layernorm.weight", hidden),
                    "qkv": read(
                        f"{base}.attention.query_key_value.weight", (heads + 2 * kv_heads) * dim, hidden
                    ),
                    "dense": read(f"{base}.attention.dense.weight", hidden, heads * dim),
                    "router": read(f"{base}.mlp.gate.weight", c.num_experts, hidden).float(),
                    "shared": [
                        read(f"{base}.mlp.shared_experts.gate_proj.weight", shared, hidden),
                        read(f"{base}.mlp.shared_experts.up_proj.weight", shared, hidden),
                        read(f"{base}.mlp.shared_experts.down_proj.weight", hidden, shared),
                    ],
                    "experts": [
                        [
                            read(f"{base}.mlp.experts.{e}.gate_proj.weight", width, hidden),
                            read(f"{base}.mlp.experts.{e}.up_proj.weight", width, hidden),
                            read(f"{base}.mlp.experts.{e}.down_proj.weight", hidden, width),
                        ]
                        for e in range(c.num_experts)
                    ],
                }
            )
        self.reset()

    def reset(self, tokens: int = 0) -> None:
        """Keep only the first ``tokens`` of the cache."""
        empty = torch.empty(self.config.num_key_value_heads, 0, self.config.head_dim, dtype=self.embed.dtype)
        caches = getattr(self, "cache", [(empty, empty)] * len(self.layers))
        self.cache = [(k[:, :tokens], v[:, :tokens]) for k, v in caches]

    def forward(self, ids: Tensor) -> Tensor:
        """Append ids i64 [N] to the sequence; returns the logits f32 [V] of the last one."""
        c = self.config
        past = self.cache[0][0].shape[1]
        angles = torch.arange(past, past + len(ids)).float()[:, None] * self.frequencies
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        mask = (
            torch.ones(len(ids), past + len(ids), dtype=torch.bool).tril(past)
            if past and len(ids) > 1
            else None
        )
        x = self.embed[ids]
        for index, w in enumerate(self.layers):
            a = (
                F.linear(self._rms_norm(x, w["input_norm"]), w["qkv"])
                .view(len(ids), -1, c.head_dim)
                .transpose(0, 1)
            )
            q, k, v = a.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads])
            q, k = (self._rotate(t, cos, sin) for t in (q, k))
            k, v = (torch.cat(pair, 1) for pair in zip(self.cache[index], (k, v), strict=True))
            self.cache[index] = (k, v)
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], mask, is_causal=mask is None and len(ids) > 1, enable_gqa=True
            )
            x = x + F.linear(out[0].transpose(0, 1).flatten(1), w["dense"])
            x = x + self._moe(self._rms_norm(x, w["post_norm"]), w)
        return F.linear(self._rms_norm(x[-1:], self.norm), self.head)[0].float()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        c = self.config
        return ops.rms_norm_torch(x, weight, c.rms_norm_eps, weight_in_fp32=c.norm_weight_in_fp32)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    def _moe(self, x: Tensor, w: dict) -> Tensor:
        scores = F.linear(x.float(), w["router"]).softmax(-1)
        weights, ids = scores.topk(self.config.num_experts_per_tok)
        weights = weights / weights.sum(-1, keepdim=True)
        routed = torch.zeros(x.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            y = self._mlp(x[token], *w["experts"][expert])
            routed.index_add_(0, token, y.float() * weights[token, slot, None])
        return routed.to(x.dtype) + self._mlp(x, *w["shared"])

    def _mlp(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
