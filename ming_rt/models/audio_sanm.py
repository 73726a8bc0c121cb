"""The SANM encoder (preview, v1): self-attention with a depthwise memory convolution over the values."""

from __future__ import annotations

import math

import numpy as np
import torch

from ming_rt import ops
from ming_rt.config import SanmConfig
from ming_rt.layers.conv import DepthwiseConv1d
from ming_rt.layers.linear import Linear
from ming_rt.layers.norm import LayerNorm
from ming_rt.layers.tap import Tap, no_tap, prefixed
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource


class Block:
    """Attention plus memory, then a feed-forward block. The block that changes the width adds no residual."""

    def __init__(self, config: SanmConfig, src: WeightSource, name: str, inputs: int) -> None:
        size, eps = config.output_size, config.layer_norm_eps
        self.heads, self.keeps_width = config.attention_heads, inputs == size
        self.norm1 = LayerNorm(src, f"{name}.norm1", inputs, eps)
        self.qkv = Linear(src, f"{name}.self_attn.linear_q_k_v", inputs, 3 * size)
        self.memory = DepthwiseConv1d(src, f"{name}.self_attn.fsmn_block", size, config.kernel_size)
        self.out = Linear(src, f"{name}.self_attn.linear_out", size, size)
        self.norm2 = LayerNorm(src, f"{name}.norm2", size, eps)
        self.mlp_in = Linear(src, f"{name}.feed_forward.w_1", size, config.linear_units)
        self.mlp_out = Linear(src, f"{name}.feed_forward.w_2", config.linear_units, size)

    def __call__(
        self, x: torch.Tensor, lengths: list[int], cu_seqlens: torch.Tensor, tap: Tap
    ) -> torch.Tensor:
        """Packed frames ``[N, inputs]`` -> ``[N, size]``."""
        qkv = self.qkv(self.norm1(x))
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        values = v.flatten(1)
        memory = torch.cat([self.memory(segment) + segment for segment in values.split(lengths)])
        tap("fsmn_memory", memory)
        y = self.out(ops.attention_varlen(q, k, v, cu_seqlens).flatten(1), residual=memory)
        tap("attn_out", y)
        if self.keeps_width:
            y = x + y
        return self.mlp_out(self.mlp_in(self.norm2(y), act="relu"), residual=y)


class SanmEncoder:
    """Stacked filter-bank frames to features, one for one. Segments never see each other or any padding."""

    def __init__(self, config: SanmConfig, src: WeightSource) -> None:
        self.config = config
        names = ["encoders0.0", *(f"encoders.{index}" for index in range(config.num_blocks - 1))]
        inputs = [config.input_size] + [config.output_size] * (config.num_blocks - 1)
        self.blocks = [
            Block(config, src, f"{config.prefix}.{name}", width)
            for name, width in zip(names, inputs, strict=True)
        ]
        self.norm = LayerNorm(src, f"{config.prefix}.after_norm", config.output_size, config.layer_norm_eps)
        self.frequencies = _frequencies(config.input_size).to(src.device)
        self.dtype = src.dtype

    def lengths(self, frames: list[int]) -> list[int]:
        """Features of segments of so many stacked frames."""
        return frames

    def __call__(self, segments: list[torch.Tensor], tap: Tap = no_tap) -> torch.Tensor:
        """Segments f32 ``[T_i, input_size]`` -> ``[segments, T, output_size]``, padded with zeros."""
        lengths = [len(segment) for segment in segments]
        scale = math.sqrt(self.config.output_size)
        x = torch.cat([segment * scale + self._sinusoids(len(segment)) for segment in segments])
        x = x.to(self.dtype)
        tap("after_pe", x)
        (cu_seqlens,) = send([np.cumsum([0, *lengths], dtype=np.int32)], x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, lengths, cu_seqlens, prefixed(tap, f"block{index}_"))
            tap(f"block{index}", x)
        x = self.norm(x)
        tap("encoder_out", x)
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)

    def _sinusoids(self, frames: int) -> torch.Tensor:
        """Positions from 1, all sines then all cosines: f32 ``[frames, input_size]``."""
        device = self.frequencies.device
        angles = torch.arange(1, frames + 1, dtype=torch.float32, device=device)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _frequencies(width: int) -> torch.Tensor:
    """f32 ``[width // 2]``, from 1 down to 1 / 10000."""
    half = width // 2
    return torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
