"""Projectors from encoder width to thinker width, and the normalisation of what they return."""

from __future__ import annotations

import torch

from ming_rt.layers.conv import Conv1d
from ming_rt.layers.linear import Linear
from ming_rt.runtime.weights import WeightSource


class VisionProjector:
    """``depth`` linear layers with exact GELU between them, stored at even indices."""

    def __init__(self, src: WeightSource, name: str, inputs: int, hidden: int, depth: int) -> None:
        widths = [inputs] + [hidden] * (depth - 1)
        self.layers = [Linear(src, f"{name}.{2 * i}", width, hidden) for i, width in enumerate(widths)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, inputs]`` -> ``[N, hidden]``."""
        *inner, last = self.layers
        for layer in inner:
            x = layer(x, act="gelu")
        return last(x)


class AudioProjector:
    """A strided convolution, then ``depth - 1`` pairs of exact GELU and linear layer, stored at 3, 5, ..."""

    def __init__(
        self, src: WeightSource, name: str, inputs: int, hidden: int, depth: int, kernel: int, stride: int
    ) -> None:
        self.conv = Conv1d(src, f"{name}.0", inputs, hidden, kernel, stride)
        self.layers = [Linear(src, f"{name}.{2 * i + 3}", hidden, hidden) for i in range(depth - 1)]

    def length(self, features: int) -> int:
        """Tokens made of so many encoder features."""
        return self.conv.length(features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, length(T), hidden]``."""
        acts = ["gelu"] * len(self.layers) + [None]
        x = self.conv(x, act=acts[0])
        batch = len(x)
        x = x.flatten(0, 1)
        for layer, act in zip(self.layers, acts[1:], strict=True):
            x = layer(x, act=act)
        return x.unflatten(0, (batch, -1))


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, computed in fp32: ``x / max(|x|, 1e-12)``."""
    return torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-12).to(x.dtype)
