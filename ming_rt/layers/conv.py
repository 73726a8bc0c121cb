"""One-dimensional convolutions over frames, time before channels as everywhere in the models."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.runtime.weights import WeightSource


class Conv1d:
    """Convolution with odd kernel and padding ``kernel // 2``, as one matrix product over unfolded frames."""

    def __init__(
        self,
        src: WeightSource,
        name: str,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
    ) -> None:
        weight = src.tensor(f"{name}.weight", (outputs, inputs, kernel))
        # [outputs, kernel, inputs]: the kernel's frames lie one after another in memory, as they do in x.
        self.weight = ops.pack_weight(weight.permute(0, 2, 1).reshape(outputs, kernel * inputs), src.dtype)
        self.bias = src.tensor(f"{name}.bias", (outputs,), src.dtype)
        self.kernel, self.stride = kernel, stride

    def length(self, frames: int) -> int:
        """Frames that come out of ``frames``."""
        return (frames - self.kernel + 2 * (self.kernel // 2)) // self.stride + 1

    def __call__(self, x: torch.Tensor, *, act: str | None = None) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, length(T), outputs]``."""
        batch, frames, channels = x.shape
        padded = torch.nn.functional.pad(x, (0, 0, self.kernel // 2, self.kernel // 2))
        out_frames = self.length(frames)
        windows = padded.as_strided(
            (batch, out_frames, self.kernel * channels),
            (padded.stride(0), self.stride * channels, 1),
        )
        y = ops.linear(windows.reshape(batch * out_frames, -1), self.weight, self.bias, act=act)
        return y.view(batch, out_frames, -1)


class DepthwiseConv1d:
    """One kernel per channel, no bias, zero padding on both sides. Its cost is small beside the linears."""

    def __init__(self, src: WeightSource, name: str, channels: int, kernel: int) -> None:
        self.weight = src.tensor(f"{name}.weight", (channels, 1, kernel), src.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, C]`` -> ``[T, C]``."""
        if x.is_cuda:  # cuDNN would choose its algorithm, and with it the rounding, by the shape
            return windowed_sum(x, self.weight[:, 0])
        channels, _, kernel = self.weight.shape
        y = torch.nn.functional.conv1d(x.t()[None], self.weight, padding=kernel // 2, groups=channels)
        return y[0].t()


def windowed_sum(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The depthwise convolution of ``[T, C]`` with ``[C, kernel]`` as products and a sum, in fp32."""
    kernel = kernels.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, 0, kernel // 2, kernel // 2))
    return (padded.unfold(0, kernel, 1) * kernels.float()).sum(-1).to(x.dtype)
