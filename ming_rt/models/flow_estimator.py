"""Velocity estimator of the flow model: a U-Net over mel frames of resnets and transformer blocks.

Preview and v1 go down to half the frames and up again, with group norms over the whole piece. v1.5 keeps its
frames, its convolutions look back only, its norms see one frame, and while it streams it attends in chunks.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ming_rt import ops
from ming_rt.config.speech import FlowEstimatorConfig
from ming_rt.layers.conv import Conv1d, ConvTranspose1d
from ming_rt.layers.linear import Linear
from ming_rt.layers.norm import LayerNorm
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource

EPS = 1e-5
GROUPS = 8
TIME_SCALE = 1000.0
MAX_PERIOD = 10000.0
Segments = tuple[torch.Tensor, torch.Tensor]


def segments(batch: int, frames: int, chunk: int | None, device: torch.device) -> Segments:
    """Offsets i32 ``[S + 1]`` of query rows and the rows of keys i32 ``[S, 2]`` that each segment sees.

    A segment is an item, or a chunk of an item, which sees the item up to the chunk's end.
    """
    step = chunk or max(frames, 1)
    ends = [min(begin + step, frames) for begin in range(0, frames, step)]
    offsets = [0, *(item * frames + end for item in range(batch) for end in ends)]
    keys = [(item * frames, item * frames + end) for item in range(batch) for end in ends]
    return tuple(send([np.array(offsets, np.int32), np.array(keys, np.int32).reshape(-1, 2)], device))


class NormedConv:
    """Convolution, norm, Mish."""

    def __init__(
        self, config: FlowEstimatorConfig, src: WeightSource, name: str, inputs: int, outputs: int
    ) -> None:
        self.causal = config.causal
        self.conv = _conv(config, src, f"{name}.block.0", inputs, outputs)
        norm = f"{name}.block.{2 if self.causal else 1}"
        self.weight = src.tensor(f"{norm}.weight", (outputs,), src.dtype)
        self.bias = src.tensor(f"{norm}.bias", (outputs,), src.dtype)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        padded: bool = False,
        shift: torch.Tensor | None = None,
        pad: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, T, outputs]``, with ``shift`` ``[B, outputs]`` and ``pad`` added."""
        return ops.group_norm(
            self.conv(x, padded=padded),
            self.weight,
            self.bias,
            EPS,
            1 if self.causal else GROUPS,
            per_frame=self.causal,
            act="mish",
            shift=shift,
            pad=pad,
        )


class Resnet:
    """Two normed convolutions with the time between them, around them a 1x1 convolution."""

    def __init__(
        self, config: FlowEstimatorConfig, src: WeightSource, name: str, inputs: int, outputs: int
    ) -> None:
        self.block1 = NormedConv(config, src, f"{name}.block1", inputs, outputs)
        self.block2 = NormedConv(config, src, f"{name}.block2", outputs, outputs)
        self.time = Linear(src, f"{name}.mlp.1", config.time_width, outputs)
        around = src.tensor(f"{name}.res_conv.weight", (outputs, inputs, 1))
        self.around = ops.pack_weight(around.flatten(1), src.dtype)
        self.around_bias = src.tensor(f"{name}.res_conv.bias", (outputs,), src.dtype)

    def __call__(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """``[B, T, inputs]``, ``time`` of the step ``[1, outputs]`` -> ``[B, T, outputs]``."""
        h = self.block1(x, shift=shift.expand(len(x), -1), pad=self.block2.conv.pad)
        h = self.block2(h, padded=True)
        y = ops.linear(x.flatten(0, 1), self.around, self.around_bias, residual=h.flatten(0, 1))
        return y.view(h.shape)


class Block:
    """Pre-norm transformer block inside the given segments."""

    def __init__(self, config: FlowEstimatorConfig, src: WeightSource, name: str, width: int) -> None:
        self.heads = config.num_heads
        inner = self.heads * config.attention_head_dim
        self.attn_norm = LayerNorm(src, f"{name}.norm1", width, EPS)
        weights = [src.tensor(f"{name}.attn1.to_{part}.weight", (inner, width)) for part in "qkv"]
        self.qkv = ops.pack_weight(torch.cat(weights), src.dtype)
        self.out = Linear(src, f"{name}.attn1.to_out.0", inner, width)
        self.mlp_norm = LayerNorm(src, f"{name}.norm3", width, EPS)
        self.mlp_in = Linear(src, f"{name}.ff.net.0.proj", width, 4 * width)
        self.mlp_out = Linear(src, f"{name}.ff.net.2", 4 * width, width)

    def __call__(self, x: torch.Tensor, where: Segments, tap: Tap, name: str) -> torch.Tensor:
        """Rows ``[B * T, C]`` -> ``[B * T, C]``."""
        qkv = ops.linear(self.attn_norm(x), self.qkv)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        values = ops.attention_varlen(q, k, v, where[0], keys=where[1]).flatten(1)
        tap(f"{name}_attention_values", values)
        x = self.out(values, residual=x)
        x = self.mlp_out(self.mlp_in(self.mlp_norm(x), act="gelu"), residual=x)
        tap(name, x)
        return x


class Stage:
    """A resnet and its transformer blocks."""

    def __init__(
        self, config: FlowEstimatorConfig, src: WeightSource, name: str, inputs: int, outputs: int
    ) -> None:
        self.resnet = Resnet(config, src, f"{name}.0", inputs, outputs)
        self.blocks = [Block(config, src, f"{name}.1.{index}", outputs) for index in range(config.n_blocks)]

    def __call__(
        self, x: torch.Tensor, shift: torch.Tensor, where: Segments, tap: Tap, name: str
    ) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, T, outputs]``."""
        x = self.resnet(x, shift)
        tap(f"{name}_resnet", x)
        shape, rows = x.shape, x.flatten(0, 1)
        for index, block in enumerate(self.blocks):
            rows = block(rows, where, tap, f"{name}_block_{index}")
        tap(f"{name}_transformer", rows)
        return rows.view(shape)


class FlowEstimator:
    """Velocity of every mel frame from noisy mel, condition, speaker, prompt and time."""

    def __init__(
        self, config: FlowEstimatorConfig, src: WeightSource, name: str = "decoder.estimator"
    ) -> None:
        self.config = config
        widths = config.channels
        self.time_in = Linear(src, f"{name}.time_mlp.linear_1", config.in_channels, config.time_width)
        self.time_out = Linear(src, f"{name}.time_mlp.linear_2", config.time_width, config.time_width)
        self.down, self.down_tails, inputs = [], [], config.in_channels
        for level, width in enumerate(widths):
            block = f"{name}.down_blocks.{level}"
            self.down.append(Stage(config, src, block, inputs, width))
            deepest = level + 1 == len(widths)
            tail = f"{block}.2" if deepest else f"{block}.2.conv"
            self.down_tails.append(_conv(config, src, tail, width, width, 1 if deepest else 2))
            inputs = width
        self.mid = [
            Stage(config, src, f"{name}.mid_blocks.{index}", inputs, inputs)
            for index in range(config.num_mid_blocks)
        ]
        self.up, self.up_tails = [], []
        for index, width in enumerate(reversed(widths)):
            block, level = f"{name}.up_blocks.{index}", len(widths) - 1 - index
            outputs = widths[max(level - 1, 0)]
            self.up.append(Stage(config, src, block, 2 * width, outputs))
            self.up_tails.append(
                ConvTranspose1d(src, f"{block}.2.conv", outputs, outputs, 2)
                if level
                else _conv(config, src, f"{block}.2", outputs, outputs)
            )
        self.final = NormedConv(config, src, f"{name}.final_block", widths[0], widths[0])
        weight = src.tensor(f"{name}.final_proj.weight", (config.out_channels, widths[0], 1))
        self.final_proj = ops.pack_weight(weight.flatten(1), src.dtype)
        self.final_bias = src.tensor(f"{name}.final_proj.bias", (config.out_channels,), src.dtype)
        half = config.in_channels // 2
        steps = torch.arange(half, dtype=torch.float32)
        self.frequencies = torch.exp(steps * -(math.log(MAX_PERIOD) / (half - 1))).to(src.device)

    def times(self, t: torch.Tensor, tap: Tap = no_tap) -> list[list[torch.Tensor]]:
        """What each resnet adds at the times ``t`` f32 ``[S]``: per time and resnet ``[1, outputs]``."""
        angles = t[:, None] * TIME_SCALE * self.frequencies
        x = torch.cat([angles.sin(), angles.cos()], dim=1)
        tap("time_sinusoid", x)
        x = self.time_out(self.time_in(x, act="silu"))
        tap("time_mlp", x)
        x = torch.nn.functional.mish(x)
        shifts = [stage.resnet.time(x) for stage in (*self.down, *self.mid, *self.up)]
        return [[shift[step : step + 1] for shift in shifts] for step in range(len(t))]

    def layout(self, batch: int, frames: int, chunked: bool) -> list[Segments]:
        """The attention segments of each level, for ``batch`` items of so many frames."""
        chunk = self.config.static_chunk_size if chunked else None
        levels = []
        for tail in self.down_tails:
            levels.append(segments(batch, frames, chunk, self.frequencies.device))
            frames = tail.length(frames)
        return levels

    def __call__(
        self, x: torch.Tensor, shifts: list[torch.Tensor], levels: list[Segments], tap: Tap = no_tap
    ) -> torch.Tensor:
        """``[B, T, in_channels]`` -> ``[B, T, out_channels]``.

        Args:
            x: noisy mel, condition, speaker and prompt of each frame, in this order.
            shifts: of the step's time, from ``times``.
            levels: ``layout`` of this batch.
        """
        shift, skips = iter(shifts), []
        for level, (stage, tail) in enumerate(zip(self.down, self.down_tails, strict=True)):
            x = stage(x, next(shift), levels[level], tap, f"down_{level}")
            skips.append(x)
            x = tail(x)
            tap(f"down_{level}_out", x)
        for index, stage in enumerate(self.mid):
            x = stage(x, next(shift), levels[-1], tap, f"mid_{index}")
        for index, (stage, tail) in enumerate(zip(self.up, self.up_tails, strict=True)):
            skip = skips.pop()
            x = torch.cat([x[:, : skip.shape[1]], skip], dim=2)
            x = stage(x, next(shift), levels[len(skips)], tap, f"up_{index}")
            x = tail(x)
            tap(f"up_{index}_out", x)
        x = self.final(x)
        tap("final_block", x)
        return ops.linear(x.flatten(0, 1), self.final_proj, self.final_bias).unflatten(0, x.shape[:2])


def _conv(
    config: FlowEstimatorConfig, src: WeightSource, name: str, inputs: int, outputs: int, stride: int = 1
) -> Conv1d:
    """A kernel of three frames, all behind the frame itself in v1.5."""
    return Conv1d(src, name, inputs, outputs, 3, stride, pad=(2, 0) if config.causal else (1, 1))
