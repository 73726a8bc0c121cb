"""linear and linear_swiglu on every backend against float64: packing, quantisation, epilogues, rows alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS
from tolerances import assert_close

from ming_rt import ops
from ming_rt.ops.gemm import LIBRARY_ROWS, linear_epilogue

DTYPES = [torch.float32, torch.bfloat16]
SOURCES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 16, 48, 65]
DEVICES = [backend for backend in BACKENDS if backend not in ops.ISAS]
QUANTS = ["int8", "int4"]
WEIGHTS = [(64, 64), (1, 1), (65, 33), (130, 257), (31, 2), (192, 520)]  # [N, K]: tails in both, odd K


def weight(rng, n, k, dtype):
    return (torch.randn(n, k, generator=rng) * k**-0.5).to(dtype)


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = ops.num_threads()
    ops.set_num_threads(request.param)
    yield request.param
    ops.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", WEIGHTS)
def test_unpack_returns_the_weight(backend, rng, shape, source, dtype):
    wide = weight(rng, shape[0], shape[1] + 3, source)
    wide[0, 0] = 1e-6  # a float16 subnormal
    gate, up = wide[:, : shape[1]], wide[:, 3:]  # strided rows
    packed = ops.pack_weight(gate, dtype)
    assert torch.equal(packed.unpack(), gate.to(dtype))
    assert packed.nbytes == packed.data.numel() * dtype.itemsize
    assert torch.equal(packed.data, ops.pack_weight_torch(gate, dtype, packed.layout))  # the padding included
    both = ops.pack_gate_up(gate, up, dtype)
    assert torch.equal(both.unpack(), torch.cat([gate, up]).to(dtype))
    assert torch.equal(both.data, ops.pack_gate_up_torch(gate, up, dtype, packed.layout))
    assert both.n == shape[0]
    assert both.gated


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_special_values(backend, dtype):
    values = [0.0, -0.0, 1.0, -2.5, 65504.0, 2.0**-24, -(2.0**-14), float("inf"), -float("inf"), float("nan")]
    w = torch.tensor([values], dtype=torch.float16)
    unpacked = ops.pack_weight(w, dtype).unpack()
    assert torch.equal(bits(unpacked)[:, :-1], bits(w.to(dtype))[:, :-1])
    assert unpacked[0, -1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("backend", "quant"),
    [(backend, None) for backend in BACKENDS] + [(backend, quant) for backend in DEVICES for quant in QUANTS],
    indirect=["backend"],
)
def test_meta_weights_have_the_real_size(backend, dtype, quant):
    real, meta = torch.zeros(100, 33), torch.empty(100, 33, device="meta")
    for pack in (ops.pack_weight, lambda w, *args, **options: ops.pack_gate_up(w, w, *args, **options)):
        packed = pack(real, dtype, quant=quant)
        planned = pack(meta, dtype, quant=quant, layout=packed.layout)
        assert planned.data.is_meta
        assert planned.nbytes == packed.nbytes


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_quantised_weights(backend, rng, shape, source, quant):
    n, k = shape
    wide = weight(rng, n, k + 3, source)
    wide[-1] = 0
    gate, up = wide[:, :k], wide[:, 3:]
    packed = ops.pack_weight(gate, torch.bfloat16, quant=quant)
    data, scales = ops.quantise_torch(gate, quant)
    assert torch.equal(packed.data, data)
    assert torch.equal(bits(packed.scales), bits(scales))
    assert packed.nbytes == data.numel() + 2 * scales.numel()
    both = ops.pack_gate_up(gate, up, torch.bfloat16, quant=quant)
    plain = [ops.pack_weight(w, torch.bfloat16, quant=quant).unpack(torch.float64) for w in (gate, up)]
    assert torch.equal(both.unpack(torch.float64), torch.cat(plain))
    # Half a step, or what rounding the scale to bfloat16 takes from the largest value.
    groups = torch.nn.functional.pad((gate.double() - plain[0]).abs(), (0, -k % 64)).view(n, -1, 64).amax(-1)
    levels = {"int8": 127, "int4": 7}[quant]
    steps = scales.double().view(n, -1)
    assert (groups <= steps * max(0.5, levels * 2**-8)).all()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_quantised_weights_keep_what_is_no_number(backend, rng, bad, quant):
    """As NaN in the whole group, so that a broken checkpoint shows in the results."""
    w = weight(rng, 2, 130, torch.float32)
    w[1, 70] = bad
    unpacked = ops.pack_weight(w, torch.bfloat16, quant=quant).unpack(torch.float32)
    assert not unpacked[1, 64:128].isfinite().any()
    unpacked[1, 64:128] = 0
    assert unpacked.isfinite().all()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (65, 33), (31, 2), (40, 520), (20, 1088)])
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_quantised_products_match_float64(backend, rng, shape, dtype, quant):
    n, k = shape
    gate, up = weight(rng, n, k, torch.float32), weight(rng, n, k, torch.float32)
    packed = ops.pack_weight(gate, dtype, quant=quant)
    gated = ops.pack_gate_up(gate, up, dtype, quant=quant)
    for rows in (1, 7, 9, 20, 40):
        x = torch.randn(rows, k, generator=rng).to(dtype)
        bias = torch.randn(2 * n, generator=rng).to(dtype)
        y = ops.linear(x, packed, bias[:n], act="silu")
        plain = packed.unpack(torch.float64)
        assert_close(y, ops.linear_torch(x.double(), plain, bias[:n].double(), act="silu"))
        y = ops.linear_swiglu(x, gated, bias)
        assert_close(y, ops.linear_swiglu_torch(x.double(), gated.unpack(torch.float64), bias.double()))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_quantised_zeros_and_outliers(backend, quant):
    w = torch.zeros(3, 130)
    w[1, 64], w[2, 5], w[2, 6], w[2, 129] = 3.0, 1e30, 1e-30, -1e-45
    unpacked = ops.pack_weight(w, torch.float32, quant=quant).unpack()
    assert (unpacked[0] == 0).all()
    expected = torch.zeros(3, 130)
    expected[1, 64], expected[2, 5] = unpacked[1, 64], unpacked[2, 5]
    assert torch.equal(unpacked, expected)
    assert abs(unpacked[1, 64] - 3) < 0.02
    assert abs(unpacked[2, 5] / 1e30 - 1) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_matches_float64(backend, rng, rows, shape, dtype):
    n, k = shape
    x = torch.randn(rows, k, generator=rng).to(dtype)
    w, bias = weight(rng, n, k, dtype), torch.randn(n, generator=rng).to(dtype)
    packed = ops.pack_weight(w, dtype)
    assert_close(ops.linear(x, packed), ops.linear_torch(x.double(), w.double()))
    assert_close(ops.linear(x, packed, bias), ops.linear_torch(x.double(), w.double(), bias.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_swiglu_matches_float64(backend, rng, rows, shape, dtype):
    n, k = shape
    x = torch.randn(rows, k, generator=rng).to(dtype)
    gate, up = weight(rng, n, k, dtype), weight(rng, n, k, dtype)
    bias = torch.randn(2 * n, generator=rng).to(dtype)
    packed, plain = ops.pack_gate_up(gate, up, dtype), torch.cat([gate, up]).double()
    assert_close(ops.linear_swiglu(x, packed), ops.linear_swiglu_torch(x.double(), plain))
    assert_close(
        ops.linear_swiglu(x, packed, bias), ops.linear_swiglu_torch(x.double(), plain, bias.double())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 33])
def test_rows_for_a_library(backend, rng, k, dtype):
    """So many rows that a GPU gives bfloat16 products to cuBLAS."""
    x, w, up = (weight(rng, n, k, dtype) for n in (LIBRARY_ROWS + 2, 40, 40))
    x, bias = x * k**0.5, torch.randn(80, generator=rng).to(dtype)
    packed, gated = ops.pack_weight(w, dtype), ops.pack_gate_up(w, up, dtype)
    assert_close(ops.linear(x, packed), ops.linear_torch(x.double(), w.double()))
    exact = ops.linear_torch(x.double(), w.double(), bias[:40].double(), act="gelu")
    assert_close(ops.linear(x, packed, bias[:40], act="gelu", out_dtype=torch.float32), exact)
    y = ops.linear(x, packed, bias[:40], act="gelu")
    assert_close(y, exact)
    residual = torch.randn(len(x), 40, generator=rng).to(dtype)
    assert torch.equal(ops.linear(x, packed, bias[:40], act="gelu", residual=residual), y + residual)
    swiglu = ops.linear_swiglu_torch(x.double(), torch.cat([w, up]).double(), bias.double())
    assert_close(ops.linear_swiglu(x, gated, bias), swiglu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("act", [None, "gelu", "silu", "relu"])
def test_epilogue(backend, rng, act, out_dtype, dtype):
    x = 3 * torch.randn(9, 40, generator=rng)
    w, bias = weight(rng, 83, 40, dtype), torch.randn(83, generator=rng).to(dtype)
    x, residual = x.to(dtype), torch.randn(9, 83, generator=rng).to(out_dtype)
    packed = ops.pack_weight(w, dtype)
    y = ops.linear(x, packed, bias, act=act, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_close(y, ops.linear_torch(x.double(), w.double(), bias.double(), act=act, out_dtype=torch.float64))
    # The stated rounding points: once to the output dtype, once more after the residual.
    exact = ops.linear(x, packed, bias, act=act, out_dtype=torch.float32)
    assert torch.equal(y, exact.to(out_dtype))
    added = ops.linear(x, packed, bias, act=act, out_dtype=out_dtype, residual=residual)
    assert torch.equal(added, y + residual)


def test_activations_over_their_range(backend):
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e30, -100.0, 100.0, 1e30])])[:, None]
    one = ops.pack_weight(torch.ones(1, 1), torch.float32)
    for act in ("gelu", "silu", "relu"):
        expected = ops.linear_torch(x.double(), torch.ones(1, 1).double(), act=act)
        assert_close(ops.linear(x, one, act=act), expected)
        assert ops.linear(torch.tensor([[float("nan")]]), one, act=act).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 96), (65, 33)])
@pytest.mark.parametrize("backend", ops.available_isas(), indirect=True)
def test_a_row_does_not_depend_on_batch_or_threads(backend, threads, rng, shape, dtype):
    n, k = shape
    x = torch.randn(131, k, generator=rng).to(dtype)
    w = weight(rng, n, k, dtype)
    packed, gated = ops.pack_weight(w, dtype), ops.pack_gate_up(w, w.flip(0), dtype)
    for run in (
        lambda rows: ops.linear(rows, packed, act="gelu"),
        lambda rows: ops.linear_swiglu(rows, gated),
    ):
        whole = run(x)
        for rows in ROWS:
            assert torch.equal(run(x[-rows:]), whole[-rows:])
        assert torch.equal(run(x.flip(0)), whole.flip(0))
        ops.set_num_threads(3)
        assert torch.equal(run(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", [None, *QUANTS])
@pytest.mark.parametrize("shape", [(40, 96), (33, 130)])
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_a_row_does_not_depend_on_its_neighbours_within_a_regime(backend, rng, shape, quant, dtype):
    n, k = shape
    x = torch.randn(100, k, generator=rng).to(dtype)
    w = weight(rng, n, k, dtype)
    packed = ops.pack_weight(w, dtype, quant=quant)
    gated = ops.pack_gate_up(w, w.flip(0), dtype, quant=quant)
    for run in (
        lambda rows: ops.linear(rows, packed, act="gelu"),
        lambda rows: ops.linear_swiglu(rows, gated),
    ):
        few, many = run(x[:32]), run(x)  # streamed, tiles
        for rows in (1, 2, 8, 9, 17, 31):
            assert torch.equal(run(x[32 - rows : 32]), few[-rows:])
        for rows in (33, 64, 70):
            assert torch.equal(run(x[-rows:]), many[-rows:])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_epilogue_of_a_library_product(backend, rng, dtype, out_dtype):
    for n in (17, 22):
        x, w = torch.randn(6, 40, generator=rng).to(dtype), weight(rng, n, 40, dtype)
        bias = torch.randn(2 * n, generator=rng).to(dtype)
        residual = torch.randn(6, n, generator=rng).to(out_dtype)
        sums = ops.linear(x, ops.pack_weight(w, dtype), out_dtype=torch.float32)
        y = ops.linear(
            x, ops.pack_weight(w, dtype), bias[:n], act="gelu", residual=residual, out_dtype=out_dtype
        )
        assert torch.equal(linear_epilogue(sums, dtype, False, bias[:n], 1, residual, out_dtype), y)
        gated = ops.pack_gate_up(w, w.flip(0), dtype)
        in_turn = ops.pack_weight(gated.rows(), dtype)  # gate and up rows as outputs of a plain weight
        sums = ops.linear(x, in_turn, out_dtype=torch.float32)
        assert torch.equal(
            linear_epilogue(sums, dtype, True, bias, 0, None, dtype), ops.linear_swiglu(x, gated, bias)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_memory_is_not_read(backend, rng, dtype):
    wide = torch.full((9, 50), float("nan"), dtype=dtype)
    wide[1:8, 5:38] = torch.randn(7, 33, generator=rng).to(dtype)
    x = wide[1:8, 5:38]  # odd width between NaN columns and rows
    packed = ops.pack_weight(weight(rng, 70, 33, dtype), dtype)
    residual = torch.full((7, 100), float("nan"), dtype=dtype)
    residual[:, 7:77] = 1.0
    assert torch.equal(ops.linear(x, packed), ops.linear(x.clone(), packed))
    actual = ops.linear(x, packed, residual=residual[:, 7:77])
    assert torch.equal(actual, ops.linear(x, packed, residual=torch.ones(7, 70, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(backend, rng, dtype):
    x = torch.randn(13, 32, generator=rng).to(dtype)
    packed = ops.pack_weight(weight(rng, 70, 32, dtype), dtype)
    clean = ops.linear(x, packed)
    x[4, 3], x[9, 0] = float("nan"), float("inf")
    y = ops.linear(x, packed)
    good = [i for i in range(13) if i not in (4, 9)]
    assert torch.equal(y[good], clean[good])
    assert y[4].isnan().all()
    assert not y[9].isfinite().any()


def test_overlapping_rows(backend, rng):
    signal = torch.randn(100, generator=rng)
    frames = signal.as_strided((24, 8), (4, 1))
    packed = ops.pack_weight(weight(rng, 16, 8, torch.float32), torch.float32)
    assert torch.equal(ops.linear(frames, packed), ops.linear(frames.contiguous(), packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(backend, dtype):
    packed = ops.pack_weight(torch.ones(5, 3), dtype)
    assert ops.linear(torch.empty(0, 3, dtype=dtype), packed).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_composition_is_the_same_op(backend, rng, dtype):
    x, residual = torch.randn(5, 48, generator=rng).to(dtype), torch.randn(5, 20, generator=rng).to(dtype)
    packed, bias = (
        ops.pack_weight(weight(rng, 20, 48, dtype), dtype),
        torch.randn(20, generator=rng).to(dtype),
    )
    options = {"act": "gelu", "residual": residual}
    assert_close(
        ops.linear(x, packed, bias, **options), ops.linear_torch(x, packed, bias, **options), "op_composition"
    )
    gated = ops.pack_gate_up(weight(rng, 20, 48, dtype), weight(rng, 20, 48, dtype), dtype)
    assert_close(ops.linear_swiglu(x, gated), ops.linear_swiglu_torch(x, gated), "op_composition")


def test_bad_arguments():
    packed = ops.pack_weight(torch.ones(4, 6), torch.float32)
    x = torch.ones(2, 6)
    cases = [
        (lambda: ops.linear(x[:, :5], packed), "linear: w: expected 320 packed elements .* got 384"),
        (lambda: ops.linear(x.bfloat16(), packed), "linear: w: expected bfloat16, got float32"),
        (lambda: ops.linear(x.half(), packed), "linear: x: expected float32 or bfloat16, got float16"),
        (lambda: ops.linear(x, packed, torch.ones(3)), "linear: bias: expected shape"),
        (lambda: ops.linear(x, packed, residual=torch.ones(3, 4)), "linear: residual: expected shape"),
        (lambda: ops.linear(x.t(), packed), "linear: x: expected a contiguous last dimension"),
        (lambda: ops.linear(x, packed, act="tanh"), "linear: expected act None, 'gelu', 'silu' or 'relu'"),
        (lambda: ops.linear_swiglu(x, packed, torch.ones(4)), "linear: bias: expected shape"),
        (
            lambda: ops.pack_gate_up(torch.ones(4, 6), torch.ones(4, 5), torch.float32),
            "pack_weight: up: expected",
        ),
        (
            lambda: ops.pack_weight(torch.ones(4, 6), torch.float16),
            "pack_weight: packed: expected float32 or",
        ),
        (
            lambda: ops.pack_weight(torch.ones(4, 6).int(), torch.float32),
            "pack_weight: weight: expected float32",
        ),
        (
            lambda: ops.pack_weight(torch.ones(4, 6), torch.float32, quant="int8"),
            "quantised weights need a CUDA device",
        ),
        (
            lambda: ops.pack_weight(torch.ones(4, 6), torch.float32, quant="int2"),
            "pack_weight: expected quant None, 'int8' or 'int4', got 'int2'",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_bad_arguments_on_a_device(backend):
    packed = ops.pack_weight(torch.ones(4, 70), torch.float32, quant="int4")
    x = torch.ones(2, 70)
    cases = [
        (lambda: ops.linear(x[:, :60], packed), "linear: w: expected 128 packed bytes .* got 256"),
        (
            lambda: ops.linear(x, replace(packed, scales=packed.scales[:7])),
            "linear: w scales: expected 8 scales",
        ),
        (lambda: ops.linear(x, replace(packed, scales=None)), "linear: w: expected scales with quantised"),
        (lambda: ops.linear(x, replace(packed, quant=None)), "linear: w: expected scales with quantised"),
        (lambda: ops.linear(x, replace(packed, layout="panels")), "linear: w: expected a weight packed on"),
        (lambda: ops.linear_swiglu(x, packed), "linear: w: expected 512 packed bytes"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
