"""One-dimensional convolutions over frames, time before channels as everywhere in the models."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.runtime.weights import WeightSource


class Conv1d:
    """Convolution as one matrix product over unfolded frames.

    The windows of neighbouring frames overlap in memory, so nothing is unfolded: items of a batch lie one
    after another with their padding, and the windows across a border are computed and left out.

    Args:
        pad: frames of zeros before and after; None: ``kernel // 2`` on both sides, for odd kernels.
    """

    def __init__(
        self,
        src: WeightSource,
        name: str,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        pad: tuple[int, int] | None = None,
    ) -> None:
        weight = src.tensor(f"{name}.weight", (outputs, inputs, kernel))
        # [outputs, kernel, inputs]: the kernel's frames lie one after another in memory, as they do in x.
        self.weight = ops.pack_weight(weight.permute(0, 2, 1).reshape(outputs, kernel * inputs), src.dtype)
        self.bias = src.tensor(f"{name}.bias", (outputs,), src.dtype)
        self.kernel, self.stride = kernel, stride
        self.pad = (kernel // 2, kernel // 2) if pad is None else pad

    def length(self, frames: int) -> int:
        """Frames that come out of ``frames``."""
        return (frames - self.kernel + sum(self.pad)) // self.stride + 1

    def __call__(
        self,
        x: torch.Tensor,
        *,
        act: str | None = None,
        residual: torch.Tensor | None = None,
        padded: bool = False,
    ) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, length(T), outputs]``, items of a batch not next to each other.

        ``residual``: shape of the result, added to it; for one item. ``padded``: x has its frames of zeros
        already (``ops.conv_frames``: a dilated convolution is one of a batch of phases).
        """
        before, after = (0, 0) if padded else self.pad
        batch, frames, channels = x.shape
        frames += before + after
        out_frames = (frames - self.kernel) // self.stride + 1
        rest = -frames % self.stride if batch > 1 else 0  # windows of every item begin a stride apart
        if before or after or rest:
            x = torch.nn.functional.pad(x, (0, 0, before, after + rest))
        x = x.contiguous()
        per_item = (frames + rest) // self.stride
        count = per_item * (batch - 1) + out_frames
        windows = x.as_strided((count, self.kernel * channels), (self.stride * channels, 1))
        if residual is not None:
            (residual,) = residual
        y = ops.linear(windows, self.weight, self.bias, act=act, residual=residual)
        outputs = y.shape[1]
        return y.as_strided((batch, out_frames, outputs), (per_item * outputs, outputs, 1))


class ConvTranspose1d:
    """Transposed convolution with padding ``(kernel - stride) / 2``, so that T frames give T * stride.

    One product: ``stride`` neighbouring frames of the result, counted from the cut-off beginning, are sums
    over ``ceil(kernel / stride)`` frames of x. Where the stride divides the kernel no less work would do.

    Args:
        kernel: None: 2 * stride.
    """

    def __init__(
        self, src: WeightSource, name: str, inputs: int, outputs: int, stride: int, kernel: int | None = None
    ) -> None:
        kernel = 2 * stride if kernel is None else kernel
        weight = src.tensor(f"{name}.weight", (inputs, outputs, kernel))
        bias = src.tensor(f"{name}.bias", (outputs,), src.dtype)
        reach = -(-kernel // stride)
        # [stride, outputs, reach, inputs]: frame t puts tap k into frame t * stride + k of the uncut result.
        spread = weight.new_zeros((stride, outputs, reach, inputs))
        for tap in range(kernel):
            later, phase = divmod(tap, stride)
            spread[phase, :, reach - 1 - later] = weight[:, :, tap].t()
        self.weight = ops.pack_weight(spread.view(stride * outputs, reach * inputs), src.dtype)
        self.bias = bias.repeat(stride)
        self.stride = stride
        self.cut = (kernel - stride) // 2
        self.pad = (reach - 1, reach - 1)
        """Frames of zeros that the product takes before and after."""

    def __call__(self, x: torch.Tensor, *, padded: bool = False) -> torch.Tensor:
        """``[B, T, inputs]`` -> ``[B, T * stride, outputs]``, items of a batch not next to each other.

        ``padded``: x has its frames of zeros already.
        """
        if not padded:
            x = torch.nn.functional.pad(x, (0, 0, *self.pad))
        x = x.contiguous()
        batch, frames, channels = x.shape
        reach = self.pad[0] + 1
        windows = x.as_strided((batch * frames - self.pad[0], reach * channels), (channels, 1))
        y = ops.linear(windows, self.weight, self.bias)
        outputs = y.shape[1] // self.stride
        shape = (batch, (frames - 2 * self.pad[0]) * self.stride, outputs)
        return y.as_strided(shape, (frames * y.shape[1], outputs, 1), self.cut * outputs)


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
