"""Causal self-attention of the thinker over the paged KV cache."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.config import ThinkerConfig
from ming_rt.layers.linear import QKVLinear, RowParallelLinear
from ming_rt.layers.tap import Tap
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.weights import WeightSource


class Attention:
    """Grouped-query attention with rotary positions and, where configured, a norm per query and key head."""

    def __init__(self, config: ThinkerConfig, src: WeightSource, comm: Comm, name: str) -> None:
        head_dim = config.head_dim
        self.qkv = QKVLinear(
            src,
            f"{name}.query_key_value",
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            bias=config.use_qkv_bias,
        )
        inputs = config.num_attention_heads * head_dim
        self.dense = RowParallelLinear(
            src, comm, f"{name}.dense", inputs, config.hidden_size, bias=config.use_bias
        )
        self.q_norm = self.k_norm = None
        if config.use_qk_norm:
            self.q_norm = src.tensor(f"{name}.q_norm.weight", (head_dim,), src.dtype)
            self.k_norm = src.tensor(f"{name}.k_norm.weight", (head_dim,), src.dtype)
        self.eps = config.rms_norm_eps

    def __call__(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        batch: Batch,
        tap: Tap,
    ) -> torch.Tensor:
        """``x`` ``[N, H]`` -> ``[N, H]``; writes the new keys and values to ``batch.slots``."""
        q = ops.rope_append(
            self.qkv(x),
            *rope,
            k_pages,
            v_pages,
            batch.slots,
            self.qkv.heads,
            self.q_norm,
            self.k_norm,
            self.eps,
        )
        tap("q_rope", q)
        out = ops.attention_paged(q, k_pages, v_pages, batch.page_table, batch.cu_seqlens_q, batch.kv_lens)
        return self.dense(out.flatten(1))
