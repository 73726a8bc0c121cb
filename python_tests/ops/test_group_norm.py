"""group_norm: backends and dtypes against the composition, both means, padding, strides, independence."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]
# items, frames, channels, groups
SHAPES = [(1, 1, 2, 1), (2, 5, 24, 8), (1, 9, 80, 1), (3, 4, 34, 2), (2, 70, 64, 2)]


def tensors(rng, shape, dtype):
    """x, weight, bias, shift."""
    batch, _, channels = shape
    shapes = (shape, (channels,), (channels,), (batch, channels))
    return [torch.randn(size, generator=rng).to(dtype) for size in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_matches_composition(backend, rng, dtype, shape, per_frame, extras):
    x, weight, bias, shift = tensors(rng, shape[:3], dtype)
    options = {"act": "mish", "shift": shift, "pad": (2, 1)} if extras else {}
    arguments = (x, weight, bias, 1e-5, shape[3])
    actual = ops.group_norm(*arguments, per_frame=per_frame, **options)
    assert_close(actual, ops.group_norm_torch(*arguments, per_frame=per_frame, **options))
    if extras:
        assert not actual[:, :2].any()
        assert not actual[:, -1:].any()


def test_strided_items_and_frames(backend, rng):
    x, weight, bias, shift = tensors(rng, (2, 6, 16), torch.float32)
    wide = torch.full((2, 9, 40), float("nan"))
    wide[:, 1:7, 8:24] = x
    options = {"act": "mish", "shift": shift, "pad": (1, 1)}
    for per_frame in (False, True):
        plain = ops.group_norm(x, weight, bias, 1e-5, 4, per_frame=per_frame, **options)
        strided = wide[:, 1:7, 8:24]
        assert torch.equal(
            ops.group_norm(strided, weight, bias, 1e-5, 4, per_frame=per_frame, **options), plain
        )
    one = ops.group_norm(x, weight, bias, 1e-5, shift=shift[:1].expand(2, -1))
    assert_close(one, ops.group_norm_torch(x, weight, bias, 1e-5, shift=shift[:1].expand(2, -1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_item_does_not_depend_on_the_others(backend, rng, dtype):
    x, weight, bias, shift = tensors(rng, (3, 40, 32), dtype)
    for per_frame in (False, True):
        together = ops.group_norm(x, weight, bias, 1e-5, 4, per_frame=per_frame, shift=shift)
        for item in range(3):
            one = slice(item, item + 1)
            alone = ops.group_norm(x[one], weight, bias, 1e-5, 4, per_frame=per_frame, shift=shift[one])
            assert torch.equal(alone, together[one])
    rows = ops.group_norm(x[:1, 7:9], weight, bias, 1e-5, per_frame=True)
    assert torch.equal(rows, ops.group_norm(x[:1], weight, bias, 1e-5, per_frame=True)[:, 7:9])


def test_a_large_mean_costs_no_digits(backend, rng):
    x, weight, bias, _ = tensors(rng, (1, 300, 8), torch.float32)
    y = ops.group_norm(x + 50, weight, bias, 1e-5)
    shifted = ((x + 50).double() - (x + 50).double().mean()).float()
    assert_close(y, ops.group_norm_torch(shifted, weight, bias, 1e-5))


def test_mish_of_large_values(backend):
    x = torch.tensor([-100.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0]).view(1, 1, 8)
    weight, bias = torch.ones(8), x.flatten()
    y = ops.group_norm(torch.zeros(1, 1, 8), weight, bias, 1e-5, act="mish")
    assert_close(y, torch.nn.functional.mish(x))


def test_nothing_to_normalise(backend):
    ones = torch.ones(4)
    assert ops.group_norm(torch.empty(0, 3, 4), ones, ones, 1e-5).shape == (0, 3, 4)
    for per_frame in (False, True):
        padding = ops.group_norm(torch.empty(2, 0, 4), ones, ones, 1e-5, per_frame=per_frame, pad=(1, 2))
        assert torch.equal(padding, torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "a number of groups that divides the 8 channels, got 3"),
        ({"groups": 0}, "a number of groups that divides the 8 channels, got 0"),
        ({"weight": torch.ones(7)}, r"weight: expected shape \[C\] with C = 8"),
        ({"bias": torch.ones(8).bfloat16()}, "bias: expected float32, got bfloat16"),
        ({"shift": torch.ones(3, 8)}, r"shift: expected shape \[B, C\]"),
        ({"pad": (-1, 2)}, "padding of 0 frames or more, got -1 before and 2 after"),
        ({"act": "relu"}, "expected act None or 'mish', got 'relu'"),
    ],
)
def test_bad_arguments(change, message):
    good = {"x": torch.zeros(2, 4, 8), "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-5}
    ops.group_norm(**good)
    with pytest.raises(ValueError, match=f"group_norm: .*{message}"):
        ops.group_norm(**(good | change))
