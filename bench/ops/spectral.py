"""Bench rows of the audio front-ends."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu


def cases(generator: torch.Generator) -> Iterator[Case]:
    """One second and half a minute of sound through each front-end, and the usual sample rates."""
    if on_gpu(generator):
        return  # sound is prepared on the CPU
    cmvn = torch.stack([torch.full((560,), -8.0), torch.full((560,), 0.15)])
    for seconds in (1, 30):
        wave = torch.randn(16000 * seconds, generator=generator) * 0.1
        frames = ops.fbank(wave)
        for name, ours, plain in [
            ("log_mel", lambda: ops.log_mel(wave), lambda: ops.log_mel_torch(wave)),  # noqa: B023
            ("fbank", lambda: ops.fbank(wave), lambda: ops.fbank_torch(wave)),  # noqa: B023
            (
                "lfr_cmvn",
                lambda: ops.lfr_cmvn(frames, cmvn),  # noqa: B023
                lambda: ops.lfr_cmvn_torch(frames, cmvn),  # noqa: B023
            ),
        ]:
            yield Case(name, f"{seconds}s", "fp32", ours, plain, bytes=wave.numel() * 4)
        for rate in (8000, 24000, 44100, 48000):
            sound = torch.randn(rate * seconds, generator=generator) * 0.1
            yield Case(
                "resample",
                f"{rate}->16000 {seconds}s",
                "fp32",
                lambda: ops.resample(sound, rate),  # noqa: B023
                lambda: ops.resample_torch(sound, rate),  # noqa: B023
                bytes=(sound.numel() + wave.numel()) * 4,
            )
