"""The vocoder as a plain torch composition: the baseline of its bench, and a reference for its tests.

The same weights, written the way one writes such a network with torch: channels before time, conv1d with
dilation, conv_transpose1d, torch.stft.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ming_rt import ops
from ming_rt.config.speech import VocoderConfig
from ming_rt.layers.weight_norm import WeightNormed
from ming_rt.runtime.weights import WeightSource

Weights = tuple[Tensor, Tensor]


class TorchVocoder:
    """Mel to wave with given noise."""

    def __init__(self, config: VocoderConfig, src: WeightSource) -> None:
        self.config = c = config
        normed = WeightNormed(src)

        def read(source: WeightSource, name: str, *shape: int, bias: int | None = None) -> Weights:
            weight = source.tensor(f"{name}.weight", shape, torch.float32)
            return weight, source.tensor(f"{name}.bias", (bias or shape[0],), torch.float32)

        def block(name: str, channels: int, kernel: int, dilations: tuple[int, ...]) -> list:
            return [
                [
                    (
                        src.tensor(f"{name}.activations{half}.{i}.alpha", (channels,), torch.float32)[
                            :, None
                        ],
                        read(normed, f"{name}.convs{half}.{i}", channels, channels, kernel),
                        (1, dilation)[half == 1],
                    )
                    for half in (1, 2)
                ]
                for i, dilation in enumerate(dilations)
            ]

        width, base, spectrum = c.f0_channels, c.base_channels, c.n_fft + 2
        self.pitch = [
            read(normed, f"f0_predictor.condnet.{2 * i}", width, width if i else c.in_channels, 3)
            for i in range(5)
        ]
        self.classifier = read(src, "f0_predictor.classifier", 1, width)
        self.mix = read(src, "m_source.l_linear", 1, c.nb_harmonics + 1)
        self.pre = read(normed, "conv_pre", base, c.in_channels, 7)
        self.stages = []
        per_stage = len(c.resblock_kernel_sizes)
        for i, (rate, kernel) in enumerate(zip(c.upsample_rates, c.upsample_kernel_sizes, strict=True)):
            channels, stride = base >> i + 1, math.prod(c.upsample_rates[i + 1 :])
            up = read(normed, f"ups.{i}", 2 * channels, channels, kernel, bias=channels)
            size = 1 if stride == 1 else 2 * stride
            down = read(src, f"source_downs.{i}", channels, spectrum, size)
            source = block(
                f"source_resblocks.{i}",
                channels,
                c.source_resblock_kernel_sizes[i],
                c.source_resblock_dilation_sizes[i],
            )
            blocks = [
                block(
                    f"resblocks.{per_stage * i + j}",
                    channels,
                    c.resblock_kernel_sizes[j],
                    c.resblock_dilation_sizes[j],
                )
                for j in range(per_stage)
            ]
            self.stages.append((rate, kernel, up, stride, down, source, blocks))
        self.post = read(normed, "conv_post", spectrum, base >> len(self.stages), 7)
        self.plan = ops.Stft.make(c.n_fft, c.hop_len, src.device)

    def _block(self, x: Tensor, block: list) -> Tensor:
        for pair in block:
            y = x
            for alpha, (weight, bias), dilation in pair:
                y = y + (y * alpha).sin().square() / (alpha + 1e-9)
                pad = (weight.shape[2] - 1) // 2 * dilation
                y = F.conv1d(y, weight, bias, padding=pad, dilation=dilation)
            x = x + y
        return x

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel ``[T, C]`` and its excitation -> wave, ``[samples]`` both."""
        c = self.config
        spectra = ops.stft_torch(source, self.plan).t()[None]
        x = F.conv1d(mel.t()[None], *self.pre, padding=3)
        for index, (rate, kernel, up, stride, down, source_block, blocks) in enumerate(self.stages):
            x = F.conv_transpose1d(
                F.leaky_relu(x, c.lrelu_slope), *up, stride=rate, padding=(kernel - rate) // 2
            )
            if index + 1 == len(self.stages):
                x = F.pad(x, (1, 0), mode="reflect")
            y = F.conv1d(spectra, *down, stride=stride, padding=stride // 2 if stride > 1 else 0)
            x = x + self._block(y, source_block)
            x = sum(self._block(x, block) for block in blocks) / len(blocks)
        x = F.conv1d(F.leaky_relu(x, 0.01), *self.post, padding=3)
        return ops.istft_torch(x[0].t(), self.plan, limit=100.0, bound=c.audio_limit, log_sine=True)

    def __call__(self, mel: Tensor, noise: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``Vocoder``."""
        c, x = self.config, mel.t()[None]
        for weights in self.pitch:
            x = F.elu(F.conv1d(x, *weights, padding=1))
        f0 = F.linear(x[0].t(), *self.classifier)[:, 0].abs()
        weight, bias = self.mix
        source, _ = ops.sine_source_torch(
            f0,
            noise,
            weight[0],
            bias,
            c.sampling_rate,
            amplitude=c.nsf_alpha,
            sigma=c.nsf_sigma,
            threshold=c.nsf_voiced_threshold,
            interpolated=c.frame_phase,
            phase=phase,
        )
        return self.decode(mel, source), source
