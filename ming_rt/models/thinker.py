"""The language model of all four generations: BailingMoe (preview, v1, v1.5) and BailingMoeV2 (flash).

They are one network. What differs comes from the config: norm cast order, rotary type, qk-norm, the router,
how many first layers are dense, and the column-normalised head of preview.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ming_rt import ops
from ming_rt.config import ThinkerConfig
from ming_rt.errors import UnsupportedError
from ming_rt.layers.attention import Attention
from ming_rt.layers.linear import share
from ming_rt.layers.mlp import GatedMLP
from ming_rt.layers.moe import MoE
from ming_rt.layers.norm import RMSNorm
from ming_rt.layers.tap import Tap, no_tap, prefixed
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.weights import WeightSource

PREFIX = "model."  # of every thinker tensor; the decoder inside has a "model." of its own


@dataclass(frozen=True)
class ThinkerOutput:
    """Result of one step: logits f32 ``[R, V]`` of ``batch.logit_rows`` and, on request, two hidden states.

    ``hidden0`` ``[N, H]`` are the input embeddings after placing media, ``hidden_last`` ``[N, H]`` the states
    after the final norm; both are None unless ``batch.want_hidden``.
    """

    logits: torch.Tensor
    hidden0: torch.Tensor | None = None
    hidden_last: torch.Tensor | None = None


class Layer:
    """One decoder layer: attention and a feed-forward block, each reading a norm of the residual stream."""

    def __init__(self, config: ThinkerConfig, src: WeightSource, comm: Comm, index: int) -> None:
        name = f"{PREFIX}model.layers.{index}"
        self.input_norm = _norm(config, src, f"{name}.input_layernorm")
        self.attention = Attention(config, src, comm, f"{name}.attention")
        self.post_norm = _norm(config, src, f"{name}.post_attention_layernorm")
        self.mlp: GatedMLP | MoE
        if index < config.num_dense_layers:
            self.mlp = GatedMLP(src, comm, f"{name}.mlp", config.hidden_size, config.intermediate_size or 0)
        else:
            self.mlp = MoE(config, src, comm, f"{name}.mlp")

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        batch: Batch,
        tap: Tap,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer over ``N`` packed tokens.

        Args:
            x: ``[N, H]``, the normed ``residual``.
            residual: ``[N, H]``, the stream before this layer.
            rope: cos and sin of ``ops.rope_table``.
            k_pages, v_pages: this layer's part of the KV cache, appended to.

        Returns:
            The feed-forward output and the residual to add it to, both ``[N, H]``.
        """
        x = self.attention(x, rope, k_pages, v_pages, batch, tap)
        tap("attn_out", x)
        x, residual = self.post_norm.add(x, residual)
        x = self.mlp(x, batch.modality, tap) if isinstance(self.mlp, MoE) else self.mlp(x)
        tap("mlp_out", x)
        return x, residual


class Thinker:
    """Word embeddings, decoder layers, final norm and head, built from a ``WeightSource``.

    Raises:
        UnsupportedError: the heads or widths cannot be split over the ranks, or the rope type is "dynamic".
    """

    def __init__(self, config: ThinkerConfig, src: WeightSource, comm: Comm | None = None) -> None:
        if config.rope.type == "dynamic":
            # Its base grows with the sequence while cached keys keep the base they were rotated with, so the
            # result would depend on how a prompt is cut into chunks and on what the prefix cache holds.
            raise UnsupportedError(
                "rope_scaling type 'dynamic' cannot run with chunked prefill and prefix reuse"
            )
        self.config = config
        self.comm = comm or Comm()
        embed_shape = (config.vocab_size, config.hidden_size)
        self.embed = src.tensor(f"{PREFIX}model.word_embeddings.weight", embed_shape, src.dtype)
        self.layers = [Layer(config, src, self.comm, index) for index in range(config.num_hidden_layers)]
        self.norm = _norm(config, src, f"{PREFIX}model.norm")
        self.head = _head(config, src)
        frequencies, axis, scale = ops.rope_frequencies(config.rope)
        self.rope = frequencies.to(src.device), axis.to(src.device), scale

    def forward(self, batch: Batch, kv: KVCache, tap: Tap = no_tap) -> ThinkerOutput:
        """Runs one step and appends the batch's keys and values to ``kv``.

        ``tap(name, tensor)`` receives intermediates ("hidden.0", "layer0.attn_out", ...), for tests.
        """
        x = hidden0 = self._embed(batch)
        rope = ops.rope_table(batch.positions, *self.rope)
        residual = None
        for index, layer in enumerate(self.layers):
            x, residual = (layer.input_norm(x), x) if residual is None else layer.input_norm.add(x, residual)
            tap(f"hidden.{index}", residual)
            layer_tap = prefixed(tap, f"layer{index}.")
            x, residual = layer(x, residual, rope, kv.k[index], kv.v[index], batch, layer_tap)
        x, residual = self.norm.add(x, residual)
        tap(f"layer{len(self.layers) - 1}.out", residual)
        tap(f"hidden.{len(self.layers)}", x)
        logits = self.comm.all_gather(ops.linear(x[batch.logit_rows], self.head, out_dtype=torch.float32))
        return ThinkerOutput(logits, hidden0, x) if batch.want_hidden else ThinkerOutput(logits)

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Word embeddings ``[N, H]`` with media features in place of their placeholders."""
        feats = None if batch.media_feats is None else batch.media_feats.to(self.embed.dtype)
        return ops.embed(batch.input_ids, self.embed, batch.media_rows, feats)


def _norm(config: ThinkerConfig, src: WeightSource, name: str) -> RMSNorm:
    return RMSNorm(
        src, name, config.hidden_size, config.rms_norm_eps, weight_in_fp32=config.norm_weight_in_fp32
    )


def _head(config: ThinkerConfig, src: WeightSource) -> ops.PackedWeight:
    """The rank's rows of the output matrix, with preview's column normalisation folded in.

    That divides each hidden column by its L2 norm over the whole vocabulary: every rank reads all rows.
    """
    shape = (config.vocab_size, config.hidden_size)
    rows = share("lm_head rows", config.vocab_size, src.world)
    weight = src.tensor(f"{PREFIX}lm_head.weight", shape)
    mine = weight[rows * src.rank : rows * (src.rank + 1)]
    if config.norm_head:
        squares = sum(block.float().square().sum(0) for block in weight.split(8192))
        mine = (mine.float() / (squares.sqrt() + 1e-7)).to(src.dtype)
    return ops.pack_weight(mine, src.dtype, quant=src.quant)
