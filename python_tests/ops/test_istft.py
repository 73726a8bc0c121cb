"""stft and istft against torch's transforms."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops


def plan_of(size: int, hop: int) -> ops.Stft:
    """On the device of the test's backend."""
    return ops.Stft.make(size, hop, torch.empty(0).device)


@pytest.mark.parametrize(("size", "hop"), [(16, 4), (2, 1), (12, 5), (64, 8)])
@pytest.mark.parametrize("samples", [40, 97, 301])
def test_stft(backend, rng, size, hop, samples):
    wave, plan = torch.randn(samples, generator=rng), plan_of(size, hop)
    actual = ops.stft(wave, plan)
    assert actual.shape == (samples // hop + 1, size + 2)
    assert_close(actual, ops.stft_torch(wave, plan))


@pytest.mark.parametrize(("size", "hop"), [(16, 4), (2, 1), (12, 5), (64, 8), (16, 8)])
@pytest.mark.parametrize("frames", [1, 2, 23, 150])
@pytest.mark.parametrize("log_sine", [False, True])
def test_istft(backend, rng, size, hop, frames, log_sine):
    plan = plan_of(size, hop)
    x = torch.randn(frames, size + 2, generator=rng)
    if not log_sine:
        x = x.abs() * 3
    options = {"limit": 1.5, "bound": 0.4, "log_sine": log_sine}
    actual = ops.istft(x, plan, **options)
    assert actual.shape == ((frames - 1) * hop,)
    if frames > 1:
        assert_close(actual, ops.istft_torch(x, plan, **options))


def test_there_and_back(backend, rng):
    plan = plan_of(16, 4)
    wave = torch.randn(400, generator=rng)
    real, imaginary = ops.stft(wave, plan).chunk(2, dim=1)
    polar = torch.cat([real.hypot(imaginary), torch.atan2(imaginary, real)], dim=1)
    assert_close(ops.istft(polar, plan, limit=100.0), wave)


def test_more_frames_change_nothing_before_them(backend, rng):
    plan = plan_of(16, 4)
    x = torch.randn(90, 18, generator=rng)
    whole, some = (ops.istft(x[:n], plan, limit=100.0, log_sine=True) for n in (90, 70))
    assert torch.equal(some[: 66 * 4], whole[: 66 * 4]), "up to the first sample that lacks a frame"


def test_sizes_without_values():
    plan = ops.Stft.make(16, 4, "meta")
    assert plan.basis.is_meta
    assert plan.forward.data.is_meta


@pytest.mark.parametrize(("size", "hop"), [(15, 4), (0, 1), (66, 16), (16, 1), (16, 9)])
def test_sizes_that_do_not_work(size, hop):
    with pytest.raises(ValueError, match="stft: expected an even size"):
        ops.Stft.make(size, hop)


def test_bad_arguments():
    plan = ops.Stft.make(16, 4)
    for x, message in [
        (torch.zeros(3, 17), "columns: expected 17, got 18|columns: expected 18, got 17"),
        (torch.zeros(0, 18), "x: expected at least one frame"),
        (torch.zeros(3, 18, dtype=torch.float64), "x: expected float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.istft(x, plan, limit=1.0)
