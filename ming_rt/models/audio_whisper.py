"""The Whisper encoder (v1 optionally, v1.5 and flash always): two convolutions, then bidirectional blocks."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.config import WhisperConfig
from ming_rt.errors import InvalidMediaError
from ming_rt.layers.conv import Conv1d
from ming_rt.layers.linear import Linear
from ming_rt.layers.norm import LayerNorm
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.runtime.weights import WeightSource

EPS = 1e-5


class Block:
    """Pre-norm transformer block over whole segments."""

    def __init__(self, config: WhisperConfig, src: WeightSource, name: str) -> None:
        state = config.n_state
        self.heads = config.n_head
        self.attn_norm = LayerNorm(src, f"{name}.attn_ln", state, EPS)
        parts = [f"{name}.attn.{part}" for part in ("query", "key", "value")]
        weights = [src.tensor(f"{part}.weight", (state, state)) for part in parts]
        self.qkv = ops.pack_weight(torch.cat(weights), src.dtype)
        query, value = (src.tensor(f"{part}.bias", (state,), src.dtype) for part in (parts[0], parts[2]))
        self.qkv_bias = torch.cat([query, torch.zeros_like(query), value])  # keys have none
        self.out = Linear(src, f"{name}.attn.out", state, state)
        self.mlp_norm = LayerNorm(src, f"{name}.mlp_ln", state, EPS)
        self.mlp_in = Linear(src, f"{name}.mlp.0", state, 4 * state)
        self.mlp_out = Linear(src, f"{name}.mlp.2", 4 * state, state)

    def __call__(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """``[N, state]`` -> ``[N, state]``."""
        qkv = ops.linear(self.attn_norm(x), self.qkv, self.qkv_bias)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        x = self.out(ops.attention_varlen(q, k, v, cu_seqlens).flatten(1), residual=x)
        return self.mlp_out(self.mlp_in(self.mlp_norm(x), act="gelu"), residual=x)


class WhisperEncoder:
    """Log-mel frames to features, two frames per feature.

    There is no mask: the segments of a request are padded with zeros to the longest one and attend to that
    padding, as in the original, so a segment's features depend on its companions.
    """

    def __init__(self, config: WhisperConfig, src: WeightSource) -> None:
        self.config = config
        name, state = config.prefix, config.n_state
        self.conv1 = Conv1d(src, f"{name}.conv1", config.n_mels, state, kernel=3)
        self.conv2 = Conv1d(src, f"{name}.conv2", state, state, kernel=3, stride=2)
        self.positions = src.tensor(f"{name}.positional_embedding", (config.n_ctx, state), src.dtype)
        self.blocks = [Block(config, src, f"{name}.blocks.{index}") for index in range(config.n_layer)]
        self.norm = LayerNorm(src, f"{name}.ln_post", state, EPS)
        self.dtype = src.dtype

    def lengths(self, frames: list[int]) -> list[int]:
        """Features of segments of so many mel frames."""
        return [self.conv2.length(self.conv1.length(count)) for count in frames]

    def __call__(self, segments: list[torch.Tensor], tap: Tap = no_tap) -> torch.Tensor:
        """Mel segments f32 ``[T_i, n_mels]`` -> ``[segments, T2, state]``, padded to the longest.

        Raises:
            InvalidMediaError: a segment is longer than the positional table.
        """
        mel = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True).to(self.dtype)
        x = self.conv2(self.conv1(mel, act="gelu"), act="gelu")
        count, length, _ = x.shape
        if length > self.config.n_ctx:
            raise InvalidMediaError(
                f"audio of {mel.shape[1]} mel frames (10 ms each) is too long, expected at most "
                f"{2 * self.config.n_ctx} frames"
            )
        x = (x + self.positions[:length]).flatten(0, 1)
        tap("after_pos", x)
        cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=x.device) * length
        for index, block in enumerate(self.blocks):
            x = block(x, cu_seqlens)
            tap(f"block{index}", x)
        x = self.norm(x).unflatten(0, (count, length))
        tap("encoder_out", x)
        return x
