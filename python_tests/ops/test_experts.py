"""Experts: packing, both grouped products against float64, wild offsets and slot numbers on a device."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import BACKENDS
from moe_cases import LOADS, choices, make_experts
from tolerances import assert_close

from ming_rt import ops
from ming_rt.ops import experts as experts_module

DTYPES = [torch.float32, torch.bfloat16]
DEVICES = [backend for backend in BACKENDS if backend not in ops.ISAS]
QUANTS = ["int8", "int4"]
FORMATS = [(backend, None) for backend in BACKENDS] + [(d, quant) for d in DEVICES for quant in QUANTS]
# tokens, hidden, width, experts, top_k: tails everywhere, one expert, as many choices as experts, many rows
SHAPES = [(1, 64, 32, 8, 3), (7, 33, 17, 5, 1), (20, 48, 40, 8, 3), (90, 50, 35, 8, 4), (3, 5, 3, 1, 1)]


def check_products(x, ids, packed, plain):
    """Both products of one choice of experts."""
    top_k = ids.shape[1]
    rows, offsets = ops.moe_permute_torch(ids, packed.num_experts)
    h = ops.grouped_gemm_swiglu(x, rows, offsets, top_k, packed)
    assert_close(h, ops.grouped_gemm_swiglu_torch(x.double(), rows, offsets, top_k, plain))
    y = ops.grouped_gemm_down(h, rows, offsets, packed)
    assert_close(y, ops.grouped_gemm_down_torch(h.double(), rows, offsets, plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "quant"), FORMATS, indirect=["backend"])
def test_products_match_float64(backend, rng, quant, shape, load, dtype):
    tokens, hidden, width, experts, top_k = shape
    packed, plain = make_experts(rng, experts, hidden, width, dtype, quant)
    wide = torch.full((tokens, hidden + 8), float("nan"), dtype=dtype)
    x = wide[:, 3 : 3 + hidden]
    x[:] = torch.randn(tokens, hidden, generator=rng).to(dtype)
    check_products(x, choices(rng, tokens, experts, top_k, load), packed, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "quant"), FORMATS, indirect=["backend"])
def test_aligned_rows(backend, rng, quant, dtype):
    """Dimensions for which the rows of x are read 16 bytes at a time, several steps per warp."""
    packed, plain = make_experts(rng, 3, 1088, 16, dtype, quant)
    for tokens in (1, 9, 40):
        x = torch.randn(tokens, 1088, generator=rng).to(dtype)
        rows, offsets = ops.moe_permute_torch(choices(rng, tokens, 3, 2, "hot"), 3)
        h = ops.grouped_gemm_swiglu(x, rows, offsets, 2, packed)
        assert_close(h, ops.grouped_gemm_swiglu_torch(x.double(), rows, offsets, 2, plain))
    packed, plain = make_experts(rng, 3, 16, 1088, dtype, quant)
    h = torch.randn(rows.shape[0], 1088, generator=rng).to(dtype)
    y = ops.grouped_gemm_down(h, rows, offsets, packed)
    assert_close(y, ops.grouped_gemm_down_torch(h.double(), rows, offsets, plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unchosen_experts_are_not_read(backend, rng, dtype):
    packed, plain = make_experts(rng, 6, 20, 12, dtype)
    for e in (0, 2, 5):
        packed.gate_up[e], packed.down[e] = float("nan"), float("nan")
    x = torch.randn(9, 20, generator=rng).to(dtype)
    ids = torch.tensor([[1, 3], [3, 4], [1, 4]] * 3, dtype=torch.int32)
    rows, offsets = ops.moe_permute_torch(ids, 6)
    h = ops.grouped_gemm_swiglu(x, rows, offsets, 2, packed)
    assert_close(h, ops.grouped_gemm_swiglu_torch(x.double(), rows, offsets, 2, plain))
    assert ops.grouped_gemm_down(h, rows, offsets, packed).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "quant"), FORMATS, indirect=["backend"])
def test_a_slot_does_not_depend_on_its_neighbours(backend, rng, quant, dtype):
    packed, _ = make_experts(rng, 8, 72, 40, dtype, quant)
    x = torch.randn(32, 72, generator=rng).to(dtype)
    ids = choices(rng, 32, 8, 3, "hot")

    def outputs(tokens):
        rows, offsets = ops.moe_permute_torch(ids[tokens], 8)
        h = ops.grouped_gemm_swiglu(x[tokens], rows, offsets, 3, packed)
        by_slot = torch.empty_like(h)
        by_slot[rows.long()] = h
        return by_slot.view(-1, 3, 40), ops.grouped_gemm_down(h, rows, offsets, packed).view(-1, 3, 72)

    whole = outputs(slice(None))
    for part in (slice(0, 1), slice(5, 6), slice(3, 20), slice(31, 32)):
        for alone, together in zip(outputs(part), whole, strict=True):
            assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(backend, rng, dtype):
    packed, _ = make_experts(rng, 4, 8, 6, dtype)
    rows, offsets = torch.empty(0, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    h = ops.grouped_gemm_swiglu(torch.empty(0, 8, dtype=dtype), rows, offsets, 2, packed)
    assert ops.grouped_gemm_down(h, rows, offsets, packed).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [8, 300])  # streamed, tiles
@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_wild_indices_are_reported_and_left_out(backend, rng, tokens, dtype):
    packed, _ = make_experts(rng, 4, 24, 16, dtype)
    x = torch.randn(tokens, 24, generator=rng).to(dtype)
    rows, offsets = ops.moe_permute_torch(choices(rng, tokens, 4, 2, "random"), 4)
    h = ops.grouped_gemm_swiglu(x, rows, offsets, 2, packed)
    y = ops.grouped_gemm_down(h, rows, offsets, packed)

    for wrong in (2 * tokens, -1, 2**31 - 1, -(2**31)):
        wild = rows.clone()
        wild[3] = wrong
        others = torch.arange(2 * tokens) != 3
        got = ops.grouped_gemm_swiglu(x, wild, offsets, 2, packed)
        with pytest.raises(ValueError, match=f"rows: expected slot numbers .* got {wrong} "):
            ops.check_device()
        assert torch.equal(got[others], h[others])
        got = ops.grouped_gemm_down(h, wild, offsets, packed)
        with pytest.raises(ValueError, match="rows: expected slot numbers"):
            ops.check_device()
        kept = rows[others].long()
        assert torch.equal(got[kept], y[kept])

    good = offsets.tolist()
    for place, wrong in ((0, -5), (1, 2**31 - 1), (2, -(2**31)), (4, 2 * tokens + 1), (4, 0), (0, 1)):
        wild = offsets.clone()
        wild[place] = wrong
        ops.grouped_gemm_swiglu(x, rows, wild, 2, packed)
        with pytest.raises(ValueError, match="offsets: expected ascending values"):
            ops.check_device()
        ops.grouped_gemm_down(h, rows, wild, packed)
        with pytest.raises(ValueError, match="offsets: expected ascending values"):
            ops.check_device()
    assert offsets.tolist() == good
    ops.check_device()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "quant"), FORMATS, indirect=["backend"])
def test_pack_experts(backend, rng, quant, dtype):
    packed, plain = make_experts(rng, 3, 37, 21, dtype, quant)
    for e in range(3):
        for unpacked, expected in zip(packed.unpack(e), plain[e], strict=True):
            assert torch.equal(unpacked, expected.to(dtype))
    meta = ops.pack_experts(3, 37, 21, dtype, quant=quant, layout=packed.layout)
    assert meta.gate_up.is_meta
    meta.set(0, *(torch.empty(shape, device="meta") for shape in ((21, 37), (21, 37), (37, 21))))
    assert meta.gate_up.is_meta
    assert meta.nbytes == packed.nbytes


def test_prefill_kernel_is_checked():
    with pytest.raises(
        ValueError, match="set_prefill_kernel: expected 'auto', 'mma' or 'cutlass', got 'fast'"
    ):
        ops.set_prefill_kernel("fast")


@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_prefill_kernels_are_compared(backend):
    """On a Hopper GPU CUTLASS against the general kernel, elsewhere that with itself."""
    assert 0 <= experts_module._difference(torch.empty(0).device) <= 0.05


@pytest.mark.parametrize("found", [0.2, float("nan"), RuntimeError("no kernel image")])
def test_a_prefill_kernel_that_disagrees_is_not_used(monkeypatch, found):
    def difference(device):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(experts_module, "_difference", difference)
    monkeypatch.setattr(experts_module, "_hopper_agrees", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="CUTLASS.* on cpu; the general kernel is used"):
        assert not experts_module._agrees(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not experts_module._agrees(torch.device("cpu"))  # known: no second warning


def test_bad_arguments(rng):
    packed, _ = make_experts(rng, 4, 8, 6, torch.float32)
    x = torch.ones(2, 8)
    rows, offsets = ops.moe_permute_torch(torch.tensor([[0, 1], [1, 3]], dtype=torch.int32), 4)
    cases = [
        (
            lambda: ops.grouped_gemm_swiglu(x, rows + 1, offsets, 2, packed),
            "rows: expected values in 0..3, got 4",
        ),
        (lambda: ops.grouped_gemm_swiglu(x, rows, offsets.flip(0), 2, packed), "offsets: expected ascending"),
        (lambda: ops.grouped_gemm_swiglu(x, rows, offsets[:-1], 2, packed), "offsets: expected one more"),
        (lambda: ops.grouped_gemm_swiglu(x, rows, offsets, 3, packed), "rows: expected tokens"),
        (lambda: ops.grouped_gemm_down(x, rows, offsets, packed), "grouped_gemm_down: rows: expected shape"),
        (lambda: ops.grouped_gemm_swiglu(x.bfloat16(), rows, offsets, 2, packed), "expected bfloat16"),
        (lambda: packed.set(0, x, x, x), "expert gate: expected shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError, match="expert 4"):
        packed.set(4, x, x, x)
    quantised = ops.pack_experts(4, 8, 6, torch.float32, quant="int8")
    with pytest.raises(ValueError, match="quantised weights need a CUDA device"):
        quantised.set(0, torch.ones(6, 8), torch.ones(6, 8), torch.ones(8, 6))
