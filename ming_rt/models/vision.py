"""The vision tower: a Qwen2.5-type transformer with window attention, one output row per 2x2 patches.

Patches arrive unit by unit (a unit = 2x2 patches = one token of the thinker). Before the first block the
units are reordered so that every attention window is contiguous; the output is put back in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ming_rt import ops
from ming_rt.config import VisionConfig
from ming_rt.layers.linear import Linear
from ming_rt.layers.mlp import GatedMLP
from ming_rt.layers.norm import RMSNorm
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.runtime.device import CPU
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource

PREFIX = "vision."
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Layout:
    """Where the patches of a request stand.

    ``positions`` i32 ``[3, N]``: (row, column, 0) of each patch in its picture, in order of arrival.
    ``units`` i64 ``[N / 4]``: the original unit at each place of the windowed order.
    ``windows``, ``slices`` i32: cumulative patches per attention window, per picture or temporal slice.
    """

    positions: torch.Tensor
    units: torch.Tensor
    windows: torch.Tensor
    slices: torch.Tensor


def layout(config: VisionConfig, grid_thw: np.ndarray, device: torch.device = CPU) -> Layout:
    """Layout on ``device`` of items with the patch grids ``grid_thw`` i64 ``[n, 3]`` (t, h, w; h, w even)."""
    merge = config.spatial_merge_size
    edge = config.window_size // merge // config.patch_size
    positions, units, windows, slices = [], [], [], []
    first = 0
    for time, height, width in np.asarray(grid_thw).tolist():
        rows, columns = height // merge, width // merge
        grid = np.mgrid[:height, :width].reshape(2, rows, merge, columns, merge)
        picture = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)  # unit by unit, 2x2 patches inside
        positions.append(np.tile(picture, time))
        slices += [height * width] * time
        item = first + np.arange(time * rows * columns).reshape(time, rows, columns)
        for index in np.ndindex(time, -(-rows // edge), -(-columns // edge)):
            t, y, x = index[0], index[1] * edge, index[2] * edge
            window = item[t, y : y + edge, x : x + edge].ravel()
            units.append(window)
            windows.append(len(window) * merge**2)
        first += item.size
    patch_positions = np.concatenate(positions, axis=1)
    arrays = [
        np.concatenate([patch_positions, patch_positions[:1] * 0]).astype(np.int32),
        np.concatenate(units),
        *(np.cumsum([0, *lengths], dtype=np.int32) for lengths in (windows, slices)),
    ]
    return Layout(*send(arrays, device))


class Block:
    """Pre-norm transformer block, bidirectional inside the given segments."""

    def __init__(self, config: VisionConfig, src: WeightSource, name: str) -> None:
        hidden = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = _norm(config, src, f"{name}.norm1")
        self.qkv = Linear(src, f"{name}.attn.qkv", hidden, 3 * hidden)
        self.proj = Linear(src, f"{name}.attn.proj", hidden, hidden)
        self.norm2 = _norm(config, src, f"{name}.norm2")
        self.mlp = GatedMLP(src, None, f"{name}.mlp", hidden, config.intermediate_size, bias=True)

    def __call__(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """``[N, hidden]`` -> ``[N, hidden]``."""
        qkv = self.qkv(self.norm1(x))
        ops.rope_qk_(qkv, *rope, self.heads)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        x = self.proj(ops.attention_varlen(q, k, v, cu_seqlens).flatten(1), residual=x)
        return x + self.mlp(self.norm2(x))


class VisionTower:
    """Patch embedding, blocks, and the merger that turns each unit into one row."""

    def __init__(self, config: VisionConfig, src: WeightSource) -> None:
        self.config = config
        hidden = config.hidden_size
        kernel = (
            hidden,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size,
            config.patch_size,
        )
        # Kernel = stride: the convolution is a plain product with the flattened kernel.
        embed = src.tensor(f"{PREFIX}patch_embed.proj.weight", kernel).reshape(hidden, -1)
        self.patch_embed = ops.pack_weight(embed, src.dtype)
        self.blocks = [Block(config, src, f"{PREFIX}blocks.{index}") for index in range(config.depth)]
        self.merger_norm = _norm(config, src, f"{PREFIX}merger.ln_q")
        unit = hidden * config.spatial_merge_size**2
        self.merger_in = Linear(src, f"{PREFIX}merger.mlp.0", unit, unit)
        self.merger_out = Linear(src, f"{PREFIX}merger.mlp.2", unit, config.out_hidden_size)
        # Half of the rotated pairs turn with the row, half with the column.
        frequencies = ops.inv_freq(ROPE_THETA, config.head_dim // 2)
        self.inv_freq = torch.cat([frequencies, frequencies]).to(src.device)
        self.axis = torch.arange(2, dtype=torch.uint8).repeat_interleave(len(frequencies)).to(src.device)
        self.dtype = src.dtype

    def __call__(self, pixels: torch.Tensor, grid_thw: np.ndarray, tap: Tap = no_tap) -> torch.Tensor:
        """Normalised patches f32 ``[N, patch_dim]`` and grids ``[n, 3]`` -> ``[N / 4, out_hidden_size]``.

        ``tap(name, tensor)`` receives intermediates.
        """
        where = layout(self.config, grid_thw, pixels.device)
        per_unit = self.config.spatial_merge_size**2
        x = ops.linear(pixels.to(self.dtype), self.patch_embed)
        tap("patch_embed", x)
        x = _by_unit(x, where.units, per_unit)
        tap("block0_input_window_order", x)
        rope = self.rope_tables(where)
        for index, block in enumerate(self.blocks):
            full = index in self.config.fullatt_block_indexes
            x = block(x, rope, where.slices if full else where.windows)
            tap(f"block{index}", x)
        units = self.merger_norm(x).view(len(where.units), -1)
        merged = self.merger_out(self.merger_in(units, act="gelu"))
        tap("merger_window_order", merged)
        out = torch.empty_like(merged)
        out[where.units] = merged
        tap("vision_out", out)
        return out

    def rope_tables(self, where: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin f32 ``[N, head_dim / 2]`` of the patches in windowed order."""
        positions = _by_unit(where.positions.t(), where.units, self.config.spatial_merge_size**2)
        return ops.rope_table(positions.t().contiguous(), self.inv_freq, self.axis)


def _norm(config: VisionConfig, src: WeightSource, name: str) -> RMSNorm:
    return RMSNorm(
        src, name, config.hidden_size, config.rms_norm_eps, weight_in_fp32=config.norm_weight_in_fp32
    )


def _by_unit(x: torch.Tensor, units: torch.Tensor, per_unit: int) -> torch.Tensor:
    """Rows of ``x`` ``[N, C]`` with whole units reordered."""
    return x.unflatten(0, (-1, per_unit))[units].flatten(0, 1)
