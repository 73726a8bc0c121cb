"""sine_source against its composition and against float64 phases, both ways the phase adds up."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops

SETTINGS = {"amplitude": 0.1, "sigma": 0.003, "threshold": 10.0}


def make(rng, frames, hop, harmonics):
    """Pitches of which some are below the threshold, noise, weight and bias."""
    f0 = torch.rand(frames, generator=rng) * 400
    f0[1::4] = 3.0
    noise = torch.randn(harmonics, frames * hop, generator=rng)
    return f0, noise, torch.randn(harmonics, generator=rng), torch.randn(1, generator=rng) * 0.1


@pytest.mark.parametrize("interpolated", [False, True])
@pytest.mark.parametrize("with_phase", [False, True])
@pytest.mark.parametrize(("frames", "hop", "harmonics"), [(1, 8, 1), (6, 480, 9), (5, 37, 3), (9, 1, 65)])
def test_matches_composition(backend, rng, interpolated, with_phase, frames, hop, harmonics):
    inputs = make(rng, frames, hop, harmonics)
    phase = (torch.rand(harmonics, generator=rng) * 2 - 1) * math.pi if with_phase else None
    options = {**SETTINGS, "interpolated": interpolated, "phase": phase, "return_sines": True}
    source, sines = ops.sine_source(*inputs, 24000, **options)
    for actual, expected in zip(
        (source, sines), ops.sine_source_torch(*inputs, 24000, **options), strict=True
    ):
        assert_close(actual, expected)
    alone, nothing = ops.sine_source(*inputs, 24000, **{**options, "return_sines": False})
    assert torch.equal(alone, source)
    assert nothing is None


@pytest.mark.parametrize("interpolated", [False, True])
def test_a_long_tone_keeps_its_phase(backend, interpolated):
    """Of the last sample of many frames, after thousands of turns; and frames before it decide nothing."""
    frames, hop, rate = 600, 8, 24000
    f0 = torch.full((frames,), 1000.1)
    silence, one, zero = torch.zeros(2, frames * hop), torch.ones(2), torch.zeros(1)
    options = {"amplitude": 1.0, "sigma": 0.0, "threshold": 10.0, "interpolated": interpolated}
    _, sines = ops.sine_source(f0, silence, one, zero, rate, return_sines=True, **options)
    step = (f0[:1] * torch.tensor([1.0, 2.0], device=f0.device) / rate).double()
    n = torch.arange(frames * hop, device=f0.device, dtype=torch.float64)
    count = (n + 0.5 + hop / 2).clamp(hop, frames * hop) if interpolated else n + 1
    assert_close(sines, (2 * math.pi * (step[:, None] * count % 1)).sin().float())


def test_more_frames_change_nothing_before_them(backend, rng):
    f0, noise, weight, bias = make(rng, 6, 16, 4)
    whole, _ = ops.sine_source(f0, noise, weight, bias, 22050, interpolated=True, **SETTINGS)
    some, _ = ops.sine_source(
        f0[:4], noise[:, :64].contiguous(), weight, bias, 22050, interpolated=True, **SETTINGS
    )
    assert torch.equal(some[:56], whole[:56]), "up to the middle of the last frame"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f0": torch.zeros(0)}, "expected at least one frame"),
        ({"noise": torch.zeros(9, 15)}, "a whole number of samples in each"),
        ({"noise": torch.zeros(66, 16)}, "expected 1 to 65 harmonics, got 66"),
        ({"weight": torch.zeros(8)}, "weight: expected shape"),
        ({"bias": torch.zeros(2)}, "bias: expected shape"),
        ({"phase": torch.zeros(8)}, "phase: expected shape"),
        ({"f0": torch.zeros(2, dtype=torch.float64)}, "f0: expected float32"),
        ({"rate": 0}, "expected a positive rate"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "f0": torch.zeros(2),
        "noise": torch.zeros(9, 16),
        "weight": torch.zeros(9),
        "bias": torch.zeros(1),
        "rate": 24000,
        "interpolated": False,
        **SETTINGS,
    }
    with pytest.raises(ValueError, match=message):
        ops.sine_source(**{**good, **change})
