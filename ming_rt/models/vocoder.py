"""The HiFT vocoder of both generations: mel frames to samples.

A small network guesses the pitch of every frame; harmonics of that pitch are the excitation. The generator
raises the mel frames to the rate of short spectra in a few stages, adds the excitation's own spectra at each,
and ends in magnitudes and phases of which the wave is made. All but the pitch is fp32.
"""

from __future__ import annotations

import math

import torch

from ming_rt import ops
from ming_rt.config.speech import VocoderConfig
from ming_rt.layers.conv import Conv1d, ConvTranspose1d
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.layers.weight_norm import WeightNormed
from ming_rt.runtime.weights import WeightSource

LAST_SLOPE = 0.01  # of the rectifier before the last convolution; the others have the configured one
MAGNITUDE_LIMIT = 100.0
F0_LAYERS = 5
F0_KERNEL = 3


def _padded(conv: Conv1d, x: torch.Tensor, **activation) -> torch.Tensor:
    """A convolution of activated frames, ``[1, T, C]`` -> ``[1, length(T), outputs]``."""
    return conv(ops.conv_frames(x, pad=conv.pad, **activation), padded=True)


class F0Predictor:
    """Pitch of every mel frame.

    In fp64: the excitation's phase adds the pitch up over a whole piece, so that rounding here would pass
    through every later stage and make waves differ from one instruction set or device to the next. It is a
    hundredth of the vocoder's arithmetic.
    """

    def __init__(self, config: VocoderConfig, src: WeightSource, name: str = "f0_predictor") -> None:
        normed, width, self.layers = WeightNormed(src), config.f0_channels, []
        for layer in range(F0_LAYERS):
            part, inputs = f"{name}.condnet.{2 * layer}", width if layer else config.in_channels
            weight = normed.tensor(f"{part}.weight", (width, inputs, F0_KERNEL), torch.float64)
            bias = src.tensor(f"{part}.bias", (width,), torch.float64)
            self.layers.append((weight.permute(2, 1, 0).reshape(F0_KERNEL * inputs, width), bias))
        self.classifier = src.tensor(f"{name}.classifier.weight", (1, width), torch.float64)[0]
        self.classifier_bias = src.tensor(f"{name}.classifier.bias", (1,), torch.float64)

    def __call__(self, mel: torch.Tensor, tap: Tap = no_tap) -> torch.Tensor:
        """Mel ``[T, in_channels]`` -> Hz ``[T]``."""
        x = mel.double()
        for weight, bias in self.layers:
            padded = torch.nn.functional.pad(x, (0, 0, F0_KERNEL // 2, F0_KERNEL // 2))
            windows = padded.unfold(0, F0_KERNEL, 1).mT.flatten(1)
            x = torch.nn.functional.elu(torch.addmm(bias, windows, weight))
        tap("f0_condnet", x)
        return (x @ self.classifier + self.classifier_bias).abs().float()


class Source:
    """The excitation: harmonics of the pitch and noise."""

    def __init__(self, config: VocoderConfig, src: WeightSource, name: str = "m_source") -> None:
        self.config = config
        self.weight = src.tensor(f"{name}.l_linear.weight", (1, config.nb_harmonics + 1), torch.float32)[0]
        self.bias = src.tensor(f"{name}.l_linear.bias", (1,), torch.float32)

    def __call__(
        self, f0: torch.Tensor, noise: torch.Tensor, phase: torch.Tensor | None, tap: Tap = no_tap
    ) -> torch.Tensor:
        """Hz ``[T]``, noise ``[H, T * hop]`` and phases ``[H]`` -> samples ``[T * hop]``."""
        config = self.config
        source, sines = ops.sine_source(
            f0,
            noise,
            self.weight,
            self.bias,
            config.sampling_rate,
            amplitude=config.nsf_alpha,
            sigma=config.nsf_sigma,
            threshold=config.nsf_voiced_threshold,
            interpolated=config.frame_phase,
            phase=phase,
            return_sines=tap is not no_tap,
        )
        if sines is not None:
            tap("sine_waves", sines)
        return source


class ResBlock:
    """Pairs of convolutions, the first of each dilated, with snakes before them, around residuals."""

    def __init__(
        self, src: WeightSource, name: str, channels: int, kernel: int, dilations: tuple[int, ...]
    ) -> None:
        normed = WeightNormed(src)

        def conv(part: str) -> Conv1d:
            return Conv1d(normed, f"{name}.{part}", channels, channels, kernel)

        def alpha(part: str) -> torch.Tensor:
            return src.tensor(f"{name}.{part}.alpha", (channels,), torch.float32)

        self.pairs = [
            (
                dilation,
                (alpha(f"activations1.{k}"), conv(f"convs1.{k}")),
                (alpha(f"activations2.{k}"), conv(f"convs2.{k}")),
            )
            for k, dilation in enumerate(dilations)
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, T, channels]`` -> the same shape."""
        frames = x.shape[1]
        for dilation, (first, wide), (second, narrow) in self.pairs:
            pad = tuple(dilation * side for side in wide.pad)
            y = wide(ops.conv_frames(x, act="snake", alpha=first, pad=pad, dilation=dilation), padded=True)
            y = ops.conv_frames(y, frames, act="snake", alpha=second, pad=narrow.pad)
            x = narrow(y, padded=True, residual=x)
        return x


class Stage:
    """Raises the frames' rate, adds the excitation's spectra at that rate, then residual blocks."""

    def __init__(self, config: VocoderConfig, src: WeightSource, index: int) -> None:
        channels = config.base_channels >> index + 1
        stride = math.prod(config.upsample_rates[index + 1 :])
        self.index, self.last = index, index + 1 == len(config.upsample_rates)
        self.up = ConvTranspose1d(
            WeightNormed(src),
            f"ups.{index}",
            2 * channels,
            channels,
            config.upsample_rates[index],
            config.upsample_kernel_sizes[index],
        )
        kernel, pad = (1, 0) if stride == 1 else (2 * stride, stride // 2)
        self.down = Conv1d(
            src, f"source_downs.{index}", config.n_fft + 2, channels, kernel, stride, pad=(pad, pad)
        )
        self.source_block = ResBlock(
            src,
            f"source_resblocks.{index}",
            channels,
            config.source_resblock_kernel_sizes[index],
            config.source_resblock_dilation_sizes[index],
        )
        shapes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.first_block = index * len(shapes)
        self.blocks = [
            ResBlock(src, f"resblocks.{self.first_block + j}", channels, kernel, dilations)
            for j, (kernel, dilations) in enumerate(shapes)
        ]

    def __call__(
        self, inputs: list[torch.Tensor], spectra: torch.Tensor, slope: float, tap: Tap
    ) -> list[torch.Tensor]:
        """Frames ``[1, T, C]``, the mean of some, and spectra -> ``[1, T * rate, C / 2]`` of each block.

        The last stage gives one frame more.
        """
        padded = ops.conv_frames(inputs, act="leaky", slope=slope, scale=1 / len(inputs), pad=self.up.pad)
        up = self.up(padded, padded=True)
        tap(f"ups_{self.index}", up)
        source = _padded(self.down, spectra)
        tap(f"source_downs_{self.index}", source)
        source = self.source_block(source)
        tap(f"source_resblocks_{self.index}", source)
        if self.last:  # a frame in front, mirrored
            up = torch.cat([up[:, 1:2], up], dim=1)
        x = source + up
        results = [block(x) for block in self.blocks]
        for index, result in enumerate(results, self.first_block):
            tap(f"resblocks_{index}", result)
        return results


class Vocoder:
    """Mel frames to a wave, ``config.hop`` samples per frame.

    Raises:
        ValueError: a source of another dtype than fp32, or spectra of a size that ``ops.Stft`` does not take.
    """

    def __init__(self, config: VocoderConfig, src: WeightSource) -> None:
        if src.dtype != torch.float32:
            raise ValueError(f"vocoder: expected weights in float32, got a source of {src.dtype}")
        normed, base = WeightNormed(src), config.base_channels
        self.config, self.device = config, src.device
        self.stft = ops.Stft.make(config.n_fft, config.hop_len, src.device)
        self.f0 = F0Predictor(config, src)
        self.source = Source(config, src)
        self.conv_pre = Conv1d(normed, "conv_pre", config.in_channels, base, 7)
        self.stages = [Stage(config, src, index) for index in range(len(config.upsample_rates))]
        self.conv_post = Conv1d(normed, "conv_post", base >> len(self.stages), config.n_fft + 2, 7)

    def decode(self, mel: torch.Tensor, source: torch.Tensor, tap: Tap = no_tap) -> torch.Tensor:
        """Mel ``[T, in_channels]`` and its excitation ``[T * hop]`` -> wave ``[T * hop]``."""
        config = self.config
        spectra = ops.stft(source, self.stft)[None]
        tap("s_stft", spectra)
        x = [_padded(self.conv_pre, mel[None])]
        tap("conv_pre", x[0])
        for stage in self.stages:
            x = stage(x, spectra, config.lrelu_slope, tap)
        (y,) = _padded(self.conv_post, x, act="leaky", slope=LAST_SLOPE, scale=1 / len(x))
        tap("conv_post", y)
        return ops.istft(y, self.stft, limit=MAGNITUDE_LIMIT, bound=config.audio_limit, log_sine=True)

    def __call__(
        self,
        mel: torch.Tensor,
        noise: torch.Tensor,
        *,
        phase: torch.Tensor | None = None,
        cached_source: torch.Tensor | None = None,
        tap: Tap = no_tap,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel ``[T, in_channels]`` f32 -> wave and excitation, ``[T * hop]`` f32 each.

        Args:
            noise: standard normal, ``[nb_harmonics + 1, T * hop]``.
            phase: of the harmonics at the beginning, radians ``[nb_harmonics + 1]``, the fundamental's 0;
                v1.5 has none.
            cached_source: excitation that takes the place of the first samples, for frames that were part of
                an earlier piece.

        Raises:
            ValueError: no frames, or noise or a cache of another size.
        """
        config = self.config
        samples = len(mel) * config.hop
        if noise.shape != (config.nb_harmonics + 1, samples) or not samples:
            raise ValueError(
                f"vocoder: expected frames and noise of shape [{config.nb_harmonics + 1}, {samples}], got "
                f"{len(mel)} and {list(noise.shape)}"
            )
        if cached_source is not None and len(cached_source) > samples:
            raise ValueError(
                f"vocoder: expected a cached source of at most {samples} samples, got {len(cached_source)}"
            )
        f0 = self.f0(mel, tap)
        tap("f0", f0)
        source = self.source(f0, noise, phase, tap)
        if cached_source is not None:
            source[: len(cached_source)] = cached_source
        tap("source", source)
        wave = self.decode(mel, source, tap)
        tap("wav", wave)
        return wave, source
