"""rms_norm and layer_norm: backends and dtypes against compositions, strides, residual, row independence."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops

SHAPES = [(1, 1), (3, 7), (5, 128), (2, 2048), (33, 80), (4, 1281)]
DTYPES = [torch.float32, torch.bfloat16]


def tensors(rng, shape, dtype, count):
    return [torch.randn(shape, generator=rng).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_in_fp32", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_matches_composition(backend, rng, shape, dtype, weight_in_fp32, with_residual):
    x, residual = tensors(rng, shape, dtype, 2)
    (weight,) = tensors(rng, shape[-1:], dtype, 1)
    options = {"weight_in_fp32": weight_in_fp32, "residual": residual if with_residual else None}
    actual = ops.rms_norm(x, weight, 1e-6, **options)
    expected = ops.rms_norm_torch(x, weight, 1e-6, **options)
    if with_residual:
        assert torch.equal(actual[1], expected[1])
        actual, expected = actual[0], expected[0]
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_matches_composition(backend, rng, shape, dtype):
    (x,) = tensors(rng, shape, dtype, 1)
    weight, bias = tensors(rng, shape[-1:], dtype, 2)
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), ops.layer_norm_torch(x, weight, bias, 1e-5))


def test_strided_rows_and_untouched_memory(backend, rng):
    (wide,) = tensors(rng, (6, 96), torch.float32, 1)
    wide[:, 40:] = float("nan")
    weight = torch.ones(40)
    assert_close(ops.rms_norm(wide[:, :40], weight, 1e-6), ops.rms_norm_torch(wide[:, :40], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(backend, rng, dtype):
    (x,) = tensors(rng, (65, 200), dtype, 1)
    (weight,) = tensors(rng, (200,), dtype, 1)
    whole = ops.rms_norm(x, weight, 1e-6)
    alone = torch.cat([ops.rms_norm(row[None], weight, 1e-6) for row in x])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(5)), r"weight: expected shape \[D\] with D = 4, got \[5\]"),
        ((torch.zeros(2, 4), torch.zeros(4, dtype=torch.bfloat16)), "weight: expected float32, got bfloat16"),
        (
            (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4)),
            "x: expected float32 or bfloat16, got int32",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        ops.rms_norm(*arguments, 1e-6)


def test_empty_batch():
    assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
