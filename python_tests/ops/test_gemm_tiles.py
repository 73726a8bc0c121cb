"""The CUDA kernels for many rows: every tile size and weight format against float64, tails, races, faults."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, using
from tolerances import assert_close

from ming_rt import ops
from ming_rt.ops._native import kernels
from ming_rt.ops.gemm import ACTIVATIONS
from ming_rt.ops.packed import FORMATS

DEVICES = [backend for backend in BACKENDS if backend not in ops.ISAS]
TYPES = [(dtype, quant) for dtype in (torch.bfloat16, torch.float32) for quant in (None, "int8", "int4")]
# [M, N, K] for which the emulated device (four multiprocessors) takes the small, medium and large tile.
SMALL, MEDIUM, LARGE = (33, 66, 200), (70, 130, 136), (250, 250, 104)
# Slots of each expert, hidden, width: empty experts, a hot one, fewer slots than a tile has rows and more;
# small, medium, large and large tiles.
ROUTING = {
    "many": ([0, 3, 60, 1, 0, 30, 17, 33, 20, 16, 18, 0, 9, 5, 8, 8, 12, 9, 15, 0], 72, 35),
    "uneven": ([0, 150, 64, 0, 86], 104, 70),
    "few": ([357, 147], 104, 125),
    "one": ([300], 72, 66),
}


@pytest.fixture(params=DEVICES)
def backend(request):
    """The devices that have tile kernels."""
    with using(request.param), torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield request.param


def weight(rng, n, k, dtype):
    return (torch.randn(n, k, generator=rng) * k**-0.5).to(dtype)


def padded(x, before, after):
    """The same rows with NaN around them."""
    wide = torch.full((x.shape[0], before + x.shape[1] + after), float("nan"), dtype=x.dtype)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]


def tile_linear(x, w, bias=None, act=None, residual=None, out_dtype=None, y=None):
    """``linear`` without the libraries that a GPU's larger products go to."""
    y = torch.empty((x.shape[0], w.n), dtype=out_dtype or x.dtype) if y is None else y
    scales, form = w.scales, FORMATS[w.quant]
    kernels(x).linear(x, w.data, scales, form, w.n, w.gated, bias, ACTIVATIONS[act], residual, y)
    return y


def check_linear(x, w, plain, **arguments):
    double = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    y = tile_linear(x, w, **arguments)
    if w.gated:
        assert_close(y, ops.linear_swiglu_torch(x.double(), plain, double.get("bias")))
        return
    residual, out_dtype = double.pop("residual", None), double.pop("out_dtype", None) or x.dtype
    expected = ops.linear_torch(x.double(), plain, **double, out_dtype=torch.float64)
    if residual is not None:
        expected = expected.to(out_dtype).double() + residual
    assert_close(y, expected)


@pytest.mark.parametrize(("dtype", "quant"), TYPES)
@pytest.mark.parametrize("shape", [SMALL, MEDIUM, LARGE, (34, 3, 7), (40, 64, 1)])
def test_linear_matches_float64(backend, rng, shape, dtype, quant):
    m, n, k = shape
    w = ops.pack_weight(weight(rng, n, k, dtype), dtype, quant=quant)
    plain = w.unpack(torch.float64)
    x, bias = torch.randn(m, k, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype)
    check_linear(x, w, plain)
    check_linear(padded(x, 0, 8), w, plain, bias=bias, act="gelu")
    check_linear(padded(x, 3, 2), w, plain, bias=bias, act="silu")  # no row is aligned


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", [(2048, 2048, 256), (200, 1030, 520)])
def test_linear_on_a_whole_gpu(backend, rng, shape, quant):
    """The same with enough tiles for every multiprocessor."""
    if backend == "emu":
        shape = (260, 380, 64)
    m, n, k = shape
    w = ops.pack_weight(weight(rng, n, k, torch.bfloat16), torch.bfloat16, quant=quant)
    check_linear(torch.randn(m, k, generator=rng).bfloat16(), w, w.unpack(torch.float64), act="relu")


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "quant"), TYPES)
@pytest.mark.parametrize("width", [64, 66])
def test_epilogues(backend, rng, width, dtype, quant, out_dtype):
    """Rounding before the residual; a residual that is y itself; columns beside y stay as they are."""
    w = ops.pack_weight(weight(rng, width, 72, dtype), dtype, quant=quant)
    plain, x = w.unpack(torch.float64), torch.randn(45, 72, generator=rng).to(dtype)
    bias = torch.randn(width, generator=rng).to(dtype)
    residual = torch.randn(45, width, generator=rng).to(out_dtype)
    arguments = {"bias": bias, "act": "gelu", "out_dtype": out_dtype}
    check_linear(x, w, plain, **arguments, residual=residual)
    expected = tile_linear(x, w, **arguments, residual=residual)
    assert torch.equal(expected, tile_linear(x, w, **arguments) + residual)
    for before, after in ((0, 4), (1, 2)):
        y = padded(residual, before, after)
        tile_linear(x, w, **arguments, residual=y, y=y)
        assert torch.equal(y, expected)
        beside = torch.full((45, width + 4), 7.0, dtype=out_dtype)
        tile_linear(x, w, **arguments, residual=residual, y=beside[:, :width])
        assert torch.equal(beside[:, :width], expected)
        assert (beside[:, width:] == 7.0).all()


@pytest.mark.parametrize(("dtype", "quant"), TYPES)
@pytest.mark.parametrize("shape", [(35, 33, 100), (70, 64, 128), (250, 125, 72)])
def test_gated_matches_float64(backend, rng, shape, dtype, quant):
    m, n, k = shape
    gate, up = weight(rng, n, k, dtype), weight(rng, n, k, dtype)
    w = ops.pack_gate_up(gate, up, dtype, quant=quant)
    plain, x = w.unpack(torch.float64), torch.randn(m, k, generator=rng).to(dtype)
    check_linear(x, w, plain)
    check_linear(padded(x, 1, 0), w, plain, bias=torch.randn(2 * n, generator=rng).to(dtype))


@pytest.mark.parametrize(("dtype", "quant"), TYPES)
def test_a_row_has_its_own_bits(backend, rng, dtype, quant):
    """Whatever the tile, the rows beside it and what stands in them; aligned or not; dense or an expert's."""
    n, k = 130, 136
    plain = weight(rng, n, k, dtype)
    w = ops.pack_weight(plain, dtype, quant=quant)
    x = torch.randn(250, k, generator=rng).to(dtype)
    y = tile_linear(x, w)
    assert torch.equal(tile_linear(x[100:140], w), y[100:140])
    assert torch.equal(tile_linear(padded(x[:70], 1, 0), w), y[:70])
    wild = x.clone()
    wild[1::2] = float("nan")
    assert torch.equal(tile_linear(wild, w)[::2], y[::2])

    experts = ops.pack_experts(2, n, k, dtype, quant=quant)  # down: [n, k]
    gate = weight(rng, k, n, dtype)
    for e, down in enumerate((-plain, plain)):
        experts.set(e, gate, gate, down)
    rows = torch.randperm(330, generator=rng).int()
    h = torch.randn(330, k, generator=rng).to(dtype)
    h[80:] = x
    out = ops.grouped_gemm_down(h, rows, torch.tensor([0, 80, 330], dtype=torch.int32), experts)
    assert torch.equal(out[rows[80:].long()], y)


def make_experts(rng, count, hidden, width, dtype, quant):
    experts = ops.pack_experts(count, hidden, width, dtype, quant=quant)
    for e in range(count):
        gate, up = weight(rng, width, hidden, dtype), weight(rng, width, hidden, dtype)
        experts.set(e, gate, up, weight(rng, hidden, width, dtype))
    return experts, [experts.unpack(e, torch.float64) for e in range(count)]


def make_routing(rng, counts):
    rows = torch.randperm(sum(counts), generator=rng).int()
    return rows, torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


@pytest.fixture
def general_kernels():
    """The kernels tested here, also where a GPU has others."""
    ops.set_prefill_kernel("mma")
    yield
    ops.set_prefill_kernel("auto")


@pytest.mark.parametrize(("dtype", "quant"), TYPES)
@pytest.mark.parametrize("routing", ROUTING)
def test_experts_match_float64(backend, rng, general_kernels, routing, dtype, quant):
    (counts, hidden, width), top_k = ROUTING[routing], 3
    experts, plain = make_experts(rng, len(counts), hidden, width, dtype, quant)
    rows, offsets = make_routing(rng, counts)
    x = padded(torch.randn(-(-sum(counts) // top_k), hidden, generator=rng).to(dtype), 0, 8)
    h = ops.grouped_gemm_swiglu(x, rows, offsets, top_k, experts)
    assert_close(h, ops.grouped_gemm_swiglu_torch(x.double(), rows, offsets, top_k, plain))
    y = ops.grouped_gemm_down(h, rows, offsets, experts)
    assert_close(y, ops.grouped_gemm_down_torch(h.double(), rows, offsets, plain))


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
def test_wild_rows_and_offsets_are_reported(backend, rng, general_kernels, gated, dtype, quant):
    counts, hidden, width, top_k = [0, 150, 70, 50], 24, 16, 2
    experts, _ = make_experts(rng, len(counts), hidden, width, dtype, quant)
    rows, offsets = make_routing(rng, counts)
    slots = sum(counts)
    x = torch.randn(slots // top_k if gated else slots, hidden if gated else width, generator=rng).to(dtype)

    def run(rows, offsets):
        if gated:
            return ops.grouped_gemm_swiglu(x, rows, offsets, top_k, experts)
        return ops.grouped_gemm_down(x, rows, offsets, experts)

    expected = run(rows, offsets)
    ops.check_device()
    for place, slot in ((3, slots), (149, -1), (slots - 1, 2**31 - 1)):
        wild = rows.clone()
        wild[place] = slot
        y = run(wild, offsets)
        with pytest.raises(ValueError, match="rows: expected slot numbers"):
            ops.check_device()
        kept = torch.ones(slots, dtype=torch.bool)
        kept[place if gated else int(rows[place])] = False
        assert torch.equal(y[kept], expected[kept])
    for index, value in ((0, 5), (1, -3), (2, slots + 1), (3, 20), (4, slots + 1), (4, 10), (2, -(2**31))):
        wild = offsets.clone()
        wild[index] = value
        run(rows, wild)
        with pytest.raises(ValueError, match="offsets: expected ascending"):
            ops.check_device()


@pytest.mark.parametrize(("dtype", "quant"), TYPES)
def test_the_order_of_threads_does_not_matter(rng, monkeypatch, dtype, quant):
    """A missing barrier would show in one of the orders."""
    with using("emu"):
        w = ops.pack_weight(weight(rng, 130, 328, dtype), dtype, quant=quant)
        experts, _ = make_experts(rng, 5, 72, 33, dtype, quant)
        rows, offsets = make_routing(rng, ROUTING["uneven"][0])
        inputs = [torch.randn(m, 328, generator=rng).to(dtype) for m in (33, 70, 250)]
        tokens = torch.randn(100, 72, generator=rng).to(dtype)

        def everything():
            h = ops.grouped_gemm_swiglu(tokens, rows, offsets, 3, experts)
            return [*(tile_linear(x, w) for x in inputs), h, ops.grouped_gemm_down(h, rows, offsets, experts)]

        expected = everything()
        for seed in (1, 2, 3):
            monkeypatch.setenv("MING_EMU_SEED", str(seed))
            assert all(map(torch.equal, everything(), expected))
