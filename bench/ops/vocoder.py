"""Bench rows of the vocoder: its ops, a residual block of each stage, and all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops
from ming_rt.config.speech import VocoderConfig
from ming_rt.models.vocoder import MAGNITUDE_LIMIT, ResBlock, Vocoder
from ming_rt.runtime.weights import RandomSource

from ..timing import Case
from ..torch_vocoder import TorchVocoder

SECONDS = 1
CONFIG = VocoderConfig(
    in_channels=80,
    base_channels=512,
    nb_harmonics=8,
    sampling_rate=24000,
    nsf_alpha=0.1,
    nsf_sigma=0.003,
    nsf_voiced_threshold=10.0,
    upsample_rates=(8, 5, 3),
    upsample_kernel_sizes=(16, 11, 7),
    n_fft=16,
    hop_len=4,
    resblock_kernel_sizes=(3, 7, 11),
    resblock_dilation_sizes=((1, 3, 5),) * 3,
    source_resblock_kernel_sizes=(7, 7, 11),
    source_resblock_dilation_sizes=((1, 3, 5),) * 3,
    lrelu_slope=0.1,
    audio_limit=0.99,
    f0_channels=512,
)
"""That of v1.5."""
GFLOP = 30.6  # of the vocoder, per second of sound


def cases(generator: torch.Generator) -> Iterator[Case]:
    """One second of v1.5's speech."""
    device, config = generator.device, CONFIG

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    frames = config.sampling_rate * SECONDS // config.hop
    samples = frames * config.hop
    src = RandomSource(dtype=torch.float32, device=device)
    ours, plain = Vocoder(config, src), TorchVocoder(config, src)

    for index, count in enumerate((frames * 8, frames * 40, frames * 120 + 1)):
        channels = config.base_channels >> index + 1
        x, alpha = normal(1, count, channels), normal(channels).abs() + 0.1
        snake = {"act": "snake", "alpha": alpha, "pad": (25, 25), "dilation": 5}
        yield Case(
            "conv_frames snake",
            f"{count}x{channels}",
            "fp32",
            lambda: ops.conv_frames(x, **snake),  # noqa: B023
            lambda: ops.conv_frames_torch(x, **snake),  # noqa: B023
            bytes=8 * x.numel(),
        )
        for j, kernel in enumerate(config.resblock_kernel_sizes):
            name = f"resblocks.{3 * index + j}"
            block = ResBlock(src, name, channels, kernel, config.resblock_dilation_sizes[j])
            yield Case(
                f"residual block, {kernel} taps",
                f"{count}x{channels}",
                "fp32",
                lambda: block(x),  # noqa: B023
                lambda: plain._block(x.mT, plain.stages[index][-1][j]),  # noqa: B023
                flops=2 * 6 * kernel * channels * channels * count,
            )
    f0, noise = normal(frames).abs() * 200, normal(config.nb_harmonics + 1, samples)
    mixture = normal(config.nb_harmonics + 1), normal(1)
    options = {"amplitude": 0.1, "sigma": 0.003, "threshold": 10.0, "interpolated": True}
    yield Case(
        "sine_source",
        f"{SECONDS}s",
        "fp32",
        lambda: ops.sine_source(f0, noise, *mixture, 24000, **options),
        lambda: ops.sine_source_torch(f0, noise, *mixture, 24000, **options),
        bytes=4 * (noise.numel() + samples),
    )
    polar, wave, plan = normal(samples // 4 + 1, 18), normal(samples), ours.stft
    limits = {"limit": MAGNITUDE_LIMIT, "bound": config.audio_limit, "log_sine": True}
    yield Case(
        "istft 16/4",
        f"{SECONDS}s",
        "fp32",
        lambda: ops.istft(polar, plan, **limits),
        lambda: ops.istft_torch(polar, plan, **limits),
        bytes=4 * (polar.numel() + samples),
    )
    yield Case(
        "stft 16/4",
        f"{SECONDS}s",
        "fp32",
        lambda: ops.stft(wave, plan),
        lambda: ops.stft_torch(wave, plan),
        bytes=4 * (polar.numel() + samples),
    )
    mel = normal(frames, config.in_channels)
    yield Case(
        "vocoder",
        f"v1.5 {SECONDS}s",
        "fp32",
        lambda: ours(mel, noise),
        lambda: plain(mel, noise),
        flops=int(GFLOP * 1e9) * SECONDS,
    )
