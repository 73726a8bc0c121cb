"""Resampling, spectrograms and frame stacking: every instruction set against torch and float64."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops
from ming_rt.ops import spectral

RATES = [1000, 8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 192000, 384000]
LENGTHS = [1, 2, 17, 400, 4801]


def sound(rng, n):
    return torch.rand(n, generator=rng) * 2 - 1


@pytest.mark.parametrize("rate", RATES)
def test_resample_matches_the_composition(isa, rng, rate):
    for n in LENGTHS:
        wave = sound(rng, n)
        actual = ops.resample(wave, rate)
        assert len(actual) == math.ceil(n * 16000 / rate)
        assert_close(actual, ops.resample_torch(wave, rate), "resample")


def test_resample_of_coprime_rates_is_exact_and_small(isa, rng):
    """A polyphase table of nonzero taps only: the dense kernel of 16001 -> 16000 would take 1 GB."""
    wave = sound(rng, 3200)
    actual = ops.resample(wave, 16001)
    phases = (torch.arange(400, 600, dtype=torch.float64) / 16000).float().double()  # rounded as upstream
    t = phases[:, None] * 16001 - torch.arange(3200)
    b = 0.99 * 16000 / 16001
    weight = torch.sinc(t * b) * torch.cos(math.pi * (t * b).clamp(-6, 6) / 12) ** 2 * b
    assert_close(actual[400:600], (weight @ wave.double()).float(), "resample")


def test_resample_keeps_a_wave_of_that_rate(rng):
    wave = sound(rng, 10)
    assert ops.resample(wave, 16000) is wave


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("n", [201, 330, 401, 1600, 16159, 16160])
def test_log_mel_matches_the_composition(isa, rng, n, n_mels):
    wave = sound(rng, n) * 0.5
    actual = ops.log_mel(wave, n_mels)
    assert actual.shape == (n // 160, n_mels)
    assert_close(actual, ops.log_mel_torch(wave, n_mels), "log_mel")


def test_log_mel_against_float64(isa, rng):
    """A loud low tone beside faint noise: the quiet bands are where float32 transforms go wrong."""
    t = torch.arange(8000) / 16000
    wave = (0.9 * torch.sin(2 * math.pi * 150 * t) + 1e-4 * sound(rng, 8000)).float()
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(wave.double(), 400, 160, window=window, return_complex=True)[:, :-1]
    m = (spectral.mel_filters(128).double() @ spectrum.abs().square()).clamp(min=1e-10).log10()
    expected = ((m.clamp(min=m.max() - 8) + 4) / 4).T
    assert_close(ops.log_mel(wave), expected.float())


def test_silence(isa):
    assert (ops.log_mel(torch.zeros(3200)) == -1.5).all()
    assert_close(ops.fbank(torch.zeros(3200)), torch.full((18, 80), math.log(spectral.FBANK_FLOOR)))


@pytest.mark.parametrize("n", [400, 559, 560, 1600, 16159])
def test_fbank_matches_the_composition(isa, rng, n):
    wave = sound(rng, n) * 0.5
    actual = ops.fbank(wave)
    assert actual.shape == (1 + (n - 400) // 160, 80)
    assert_close(actual, ops.fbank_torch(wave), "fbank")


def test_tones_land_in_their_bands(isa):
    t = torch.arange(3200) / 16000
    for hertz in (300.0, 1000.0, 3500.0):
        wave = 0.5 * torch.sin(2 * math.pi * hertz * t)
        f = torch.arange(201) * 40.0
        peak = ops.log_mel(wave)[10].argmax()
        centre = (spectral.mel_filters(128)[peak] * f).sum() / spectral.mel_filters(128)[peak].sum()
        assert abs(centre - hertz) < 100
        f = torch.arange(257) * 31.25
        peak = ops.fbank(wave)[10].argmax()
        centre = (spectral.fbank_filters()[peak] * f).sum() / spectral.fbank_filters()[peak].sum()
        assert abs(centre - hertz) < 150


def test_filters_have_unit_area_and_no_gaps():
    mel = spectral.mel_filters(128)
    # Sampled at bins 40 Hz apart, only wide filters keep their area.
    assert_close(mel[80:].sum(1) * 40, torch.ones(48), "filter_area")
    assert (mel.sum(1) > 0).all()
    kaldi = spectral.fbank_filters()
    assert kaldi.shape == (80, 257)
    assert (kaldi.sum(1) > 0).all()
    assert (kaldi[:, 256] == 0).all()


def test_frames_do_not_depend_on_threads(isa, rng):
    wave = sound(rng, 20000)
    before = ops.num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            ops.set_num_threads(threads)
            results.append([ops.log_mel(wave), ops.fbank(wave), ops.resample(wave, 44100)])
    finally:
        ops.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 7, 13, 40])
def test_lfr_cmvn_equals_the_composition(isa, rng, frames):
    x = sound(rng, frames * 80).view(frames, 80)
    cmvn = torch.stack([sound(rng, 560), sound(rng, 560)])
    assert torch.equal(ops.lfr_cmvn(x, cmvn), ops.lfr_cmvn_torch(x, cmvn))


def test_lfr_repeats_the_edges(isa):
    x = torch.arange(8.0)[:, None].expand(8, 80)
    stacked = ops.lfr_cmvn(x, torch.stack([torch.zeros(560), torch.ones(560)]))
    assert stacked.view(2, 7, 80)[:, :, 0].tolist() == [[0, 0, 0, 0, 1, 2, 3], [3, 4, 5, 6, 7, 7, 7]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.log_mel(torch.zeros(200)), "log_mel: wave: expected float32 .n >= 201"),
        (lambda: ops.fbank(torch.zeros(399)), "fbank: wave: expected float32 .n >= 400"),
        (lambda: ops.log_mel(torch.zeros(2, 400)), "got torch.float32 .2, 400"),
        (lambda: ops.fbank(torch.zeros(400, dtype=torch.float64)), "got torch.float64"),
        (lambda: ops.resample(torch.zeros(4), 0), "positive rates"),
        (lambda: ops.lfr_cmvn(torch.zeros(4, 80), torch.zeros(2, 559)), "cmvn .2, 7"),
        (lambda: ops.lfr_cmvn(torch.zeros(0, 80), torch.zeros(2, 560)), "T >= 1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
