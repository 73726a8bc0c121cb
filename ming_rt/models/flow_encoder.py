"""Token encoder of the flow model: a Conformer without its convolutions, positions relative to each other.

Preview and v1 attend to the whole piece. v1.5 looks a few tokens ahead, has an up layer with blocks of its
own behind it, and attends in chunks while it streams.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ming_rt import ops
from ming_rt.config.speech import FlowEncoderConfig
from ming_rt.layers.conv import Conv1d
from ming_rt.layers.linear import Linear
from ming_rt.layers.norm import LayerNorm
from ming_rt.layers.tap import Tap, no_tap, prefixed
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource

EPS = 1e-5  # of the norms outside the blocks
LOOK_AHEAD_SLOPE = 0.01
MAX_PERIOD = 10000.0
ROWS = 256  # queries whose position scores are held at a time


class Positions:
    """Sines and cosines of distances, for the blocks of one sequence length.

    ``table`` f32 ``[2 T - 1, C]`` holds distances T - 1 down to -(T - 1). ``parts`` are runs of queries with
    the number of keys they see, all of them or those up to the end of the queries' chunk: (first query, end,
    keys). ``bounds`` are the same as ``attention_varlen`` takes it.
    """

    def __init__(self, frames: int, chunk: int | None, frequencies: torch.Tensor) -> None:
        step = chunk or ROWS
        self.frames = frames
        self.parts = [
            (begin, end := min(begin + step, frames), end if chunk else frames)
            for begin in range(0, frames, step)
        ]
        bounds = [np.array([[0, end - begin], [0, keys]], np.int32) for begin, end, keys in self.parts]
        distances = np.arange(frames - 1, -frames, -1, dtype=np.int32)
        axis = np.zeros(len(frequencies), np.uint8)
        distances, axis, *self.bounds = send([np.tile(distances, (3, 1)), axis, *bounds], frequencies.device)
        cos, sin = ops.rope_table(distances, frequencies, axis)
        self.table = torch.cat([sin, cos], dim=1)


class RelativeAttention:
    """Self-attention with scores ``((q_i + u) . k_j + (q_i + v) . p_{i-j}) / sqrt(head_dim)``.

    ``p`` of a distance is a linear image of its sines and cosines.
    """

    def __init__(self, config: FlowEncoderConfig, src: WeightSource, name: str) -> None:
        width, self.heads = config.output_size, config.attention_heads
        parts = [f"{name}.linear_{part}" for part in "qkv"]
        weights = [src.tensor(f"{part}.weight", (width, width)) for part in parts]
        self.qkv = ops.pack_weight(torch.cat(weights), src.dtype)
        biases = [src.tensor(f"{part}.bias", (width,), src.dtype) for part in parts]
        shape = (self.heads, width // self.heads)
        u, v = (src.tensor(f"{name}.pos_bias_{part}", shape, src.dtype) for part in "uv")
        self.qkv_bias = torch.cat([biases[0] + u.flatten(), *biases[1:]])
        self.u_to_v = v - u
        # The table has all sines first; the checkpoint's columns alternate.
        positions = src.tensor(f"{name}.linear_pos.weight", (width, width))
        self.positions = ops.pack_weight(torch.cat([positions[:, 0::2], positions[:, 1::2]], 1), src.dtype)
        self.out = Linear(src, f"{name}.linear_out", width, width)

    def __call__(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """``[T, C]`` -> the heads' values ``[T, C]``, which ``out`` projects."""
        q, k, v = ops.linear(x, self.qkv, self.qkv_bias).unflatten(1, (3, self.heads, -1)).unbind(1)
        p = ops.linear(positions.table, self.positions).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        values, frames = [], positions.frames
        for (begin, end, keys), bounds in zip(positions.parts, positions.bounds, strict=True):
            rows, nearest = end - begin, p[:, :, frames - end : frames + keys - 1 - begin]
            scores = (q[begin:end] + self.u_to_v).transpose(0, 1) @ nearest  # by distance, end - 1 downwards
            # Row i, key j: distance begin + i - j, in column rows - 1 - i + j.
            strides = (scores.stride(0), scores.stride(1) - 1, 1)
            bias = scores.as_strided((self.heads, rows, keys), strides, rows - 1)
            values.append(ops.attention_varlen(q[begin:end], k, v, bounds[0], keys=bounds[1:], bias=bias))
        return torch.cat(values).flatten(1)


class Block:
    """Pre-norm attention and feed-forward block."""

    def __init__(self, config: FlowEncoderConfig, src: WeightSource, name: str) -> None:
        width, eps = config.output_size, config.norm_eps
        self.attn_norm = LayerNorm(src, f"{name}.norm_mha", width, eps)
        self.attn = RelativeAttention(config, src, f"{name}.self_attn")
        self.mlp_norm = LayerNorm(src, f"{name}.norm_ff", width, eps)
        self.mlp_in = Linear(src, f"{name}.feed_forward.w_1", width, config.linear_units)
        self.mlp_out = Linear(src, f"{name}.feed_forward.w_2", config.linear_units, width)

    def __call__(self, x: torch.Tensor, positions: Positions, tap: Tap) -> torch.Tensor:
        """``[T, C]`` -> ``[T, C]``."""
        values = self.attn(self.attn_norm(x), positions)
        tap("_attention_values", values)
        x = self.attn.out(values, residual=x)
        x = self.mlp_out(self.mlp_in(self.mlp_norm(x), act="silu"), residual=x)
        tap("", x)
        return x


class Blocks:
    """An input map, ``sqrt(C) * norm(linear(x))``, and the blocks behind it."""

    def __init__(
        self, config: FlowEncoderConfig, src: WeightSource, embed: str, blocks: str, inputs: int, count: int
    ) -> None:
        width = config.output_size
        self.linear = Linear(src, f"{embed}.out.0", inputs, width)
        self.norm = LayerNorm(src, f"{embed}.out.1", width, EPS)
        self.scale = math.sqrt(width)
        self.blocks = [Block(config, src, f"{blocks}.{index}") for index in range(count)]
        steps = torch.arange(0, width, 2, dtype=torch.float32)
        self.frequencies = torch.exp(steps * -(math.log(MAX_PERIOD) / width)).to(src.device)

    def embed(self, x: torch.Tensor, tap: Tap = no_tap) -> torch.Tensor:
        """``[T, inputs]`` -> ``[T, C]``."""
        x = self.norm(self.linear(x))
        tap("embed_linear_norm", x)
        return x * self.scale

    def __call__(self, x: torch.Tensor, chunk: int | None, tap: Tap) -> torch.Tensor:
        """``[T, C]`` -> ``[T, C]`` through all blocks, in chunks of so many frames or as a whole."""
        positions = Positions(len(x), chunk, self.frequencies)
        for index, block in enumerate(self.blocks):
            x = block(x, positions, prefixed(tap, f"encoder_layer_{index}"))
        return x


class FlowEncoder:
    """The encoder of preview and v1: ``[N, inputs]`` -> ``[N, C]``."""

    def __init__(self, config: FlowEncoderConfig, src: WeightSource, name: str = "encoder") -> None:
        self.blocks = Blocks(
            config, src, f"{name}.embed", f"{name}.encoders", config.input_size, config.num_blocks
        )
        self.norm = LayerNorm(src, f"{name}.after_norm", config.output_size, EPS)

    def __call__(self, x: torch.Tensor, tap: Tap = no_tap) -> torch.Tensor:
        """Embedded tokens ``[N, inputs]`` -> ``[N, C]``."""
        return self.norm(self.blocks(self.blocks.embed(x, tap), None, tap))


class LookAhead:
    """Adds to each frame what two convolutions make of it, the two before it and the few behind it."""

    def __init__(self, config: FlowEncoderConfig, src: WeightSource, name: str) -> None:
        width, self.frames = config.output_size, config.pre_lookahead_len
        self.conv1 = Conv1d(src, f"{name}.conv1", width, width, self.frames + 1, pad=(0, 0))
        self.conv2 = Conv1d(src, f"{name}.conv2", width, width, 3, pad=(2, 0))

    def __call__(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """``[T, C]`` and the frames behind it ``[frames, C]`` (None: zeros) -> ``[T, C]``."""
        if context is None:
            context = x.new_zeros(self.frames, x.shape[1])
        y = torch.nn.functional.leaky_relu(self.conv1(torch.cat([x, context])[None]), LOOK_AHEAD_SLOPE)
        return x + self.conv2(y)[0]


class CausalFlowEncoder:
    """The encoder of v1.5: look-ahead, blocks, up layer, blocks; ``[N, inputs]`` -> ``[N * stride, C]``."""

    def __init__(self, config: FlowEncoderConfig, src: WeightSource, name: str = "encoder") -> None:
        width, self.stride, self.chunk = config.output_size, config.up_stride, config.static_chunk_size
        self.before = Blocks(
            config, src, f"{name}.embed", f"{name}.encoders", config.input_size, config.num_blocks
        )
        self.look_ahead = LookAhead(config, src, f"{name}.pre_lookahead_layer")
        kernel = 2 * self.stride + 1
        self.up = Conv1d(src, f"{name}.up_layer.conv", width, width, kernel, pad=(kernel - 1, 0))
        self.after = Blocks(
            config, src, f"{name}.up_embed", f"{name}.up_encoders", width, config.num_up_blocks
        )
        self.norm = LayerNorm(src, f"{name}.after_norm", width, EPS)

    def __call__(
        self, x: torch.Tensor, context: torch.Tensor | None, chunked: bool, tap: Tap = no_tap
    ) -> torch.Tensor:
        """Embedded tokens ``[N, inputs]`` -> ``[N * stride, C]``.

        Args:
            context: the embedded tokens that follow, as many as the look-ahead takes; None: nothing follows.
            chunked: frames see no further than the end of their chunk.
        """
        x = self.before.embed(x, tap)
        x = self.look_ahead(x, None if context is None else self.before.embed(context))
        tap("pre_lookahead", x)
        x = self.before(x, self.chunk if chunked else None, tap)
        x = self.up(x.repeat_interleave(self.stride, 0)[None])[0]
        tap("up_layer", x)
        up_tap = prefixed(tap, "up_")
        x = self.after.embed(x, up_tap)
        return self.norm(self.after(x, self.chunk * self.stride if chunked else None, up_tap))
