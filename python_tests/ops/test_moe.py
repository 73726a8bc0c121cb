"""Mixture of experts: routers and products against float64, permutation, combination, row independence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_cases import LOADS, choices, make_experts
from tolerances import assert_close

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]
# tokens, hidden, width, experts, top_k: tails everywhere, one expert, as many choices as experts
SHAPES = [(1, 64, 32, 8, 3), (7, 33, 17, 5, 1), (20, 48, 40, 8, 3), (130, 100, 70, 16, 4), (3, 5, 3, 1, 1)]


def make_routers(rng, routers, experts, hidden, bias=True):
    weights = torch.randn(routers, experts, hidden, generator=rng) * hidden**-0.5
    return ops.RouterWeights(weights, 0.3 * torch.randn(routers, experts, generator=rng) if bias else None)


def double(routers):
    return routers.unpack().double(), None if routers.bias is None else routers.bias.double()


ROUTES = [
    {"kind": "softmax", "top_k": 6, "norm_topk_prob": True},
    {"kind": "softmax", "top_k": 6, "norm_topk_prob": False, "scaling": 0.5},
    {"kind": "softmax", "top_k": 1, "norm_topk_prob": True},
    {"kind": "grouped_sigmoid", "top_k": 8, "n_group": 8, "topk_group": 4, "scaling": 2.5},
    {"kind": "grouped_sigmoid", "top_k": 1, "n_group": 4, "topk_group": 1, "scaling": 2.5},
    {"kind": "grouped_sigmoid", "top_k": 4, "n_group": 1, "topk_group": 1},
]
ON_DEVICE = ("emu", "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ROUTES, ids=lambda o: f"{o['kind']}-top{o['top_k']}")
@pytest.mark.parametrize("experts", [16, 64, 256])
def test_route_matches_float64(backend, rng, experts, options, dtype):
    tokens = 3 if backend == "emu" else 37  # slow there
    x = torch.randn(tokens, 50, generator=rng).to(dtype)
    routers = make_routers(rng, 3, experts, 50)
    modality = torch.randint(0, 3, (tokens,), generator=rng, dtype=torch.uint8)
    for mask in (None, modality, torch.full_like(modality, 2)):
        ids, weights, logits = ops.moe_route(x, routers, mask, **options)
        expected = ops.moe_route_torch(x, double(routers), mask, **options)
        assert torch.equal(ids, expected[0])
        assert_close(weights, expected[1])
        assert_close(logits, expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"),
    [(1, 64, 5), (3, 40, 7), (9, 4104, 3), (5, 1032, 130), (70, 50, 20), (70, 72, 70), (200, 40, 40)],
)
def test_logits_of_every_kernel(backend, rng, tokens, hidden, experts, dtype):
    """Numbers of rows and alignments that CUDA kernels of their own serve; unused memory is poisoned."""
    wide = torch.full((tokens, hidden + 16), float("nan")).to(dtype)
    routers = make_routers(rng, 3, experts, hidden, bias=False)
    modality = torch.arange(tokens).remainder(5).clamp(max=2).to(torch.uint8)
    for begin in (8, 3):
        x = wide[:, begin : begin + hidden]
        x[:] = torch.randn(tokens, hidden, generator=rng).to(dtype)
        for mask in (None, modality):
            actual = ops.moe_route(x, routers, mask, kind="softmax", top_k=2)
            expected = ops.moe_route_torch(x, double(routers), mask, kind="softmax", top_k=2)
            assert_close(actual[2], expected[2])
            assert torch.equal(actual[0], expected[0])
        wide.fill_(float("nan"))


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        (512, {"kind": "grouped_sigmoid", "top_k": 250, "n_group": 256, "topk_group": 200}),
        (300, {"kind": "grouped_sigmoid", "top_k": 9, "n_group": 3, "topk_group": 2}),
        (90, {"kind": "grouped_sigmoid", "top_k": 7, "n_group": 45, "topk_group": 40}),
        (300, {"kind": "softmax", "top_k": 256}),
        (40, {"kind": "softmax", "top_k": 40}),
    ],
)
def test_route_of_many_experts_and_groups(backend, rng, experts, options):
    x, routers = torch.randn(3, 24, generator=rng), make_routers(rng, 1, experts, 24)
    ids, weights, _ = ops.moe_route(x, routers, **options)
    expected = ops.moe_route_torch(x, double(routers), **options)
    assert torch.equal(ids, expected[0])
    assert_close(weights, expected[1])


def test_route_negative_scores_mask_with_minus_infinity(backend):
    """All biased scores negative: a masked group must not win with zeros."""
    bias = torch.tensor([[-5.0, -5.1, -9.0, -9.1]])
    routers = ops.RouterWeights(torch.zeros(1, 4, 2), bias)
    options = {"kind": "grouped_sigmoid", "top_k": 2, "n_group": 2, "topk_group": 1}
    assert ops.moe_route(torch.ones(1, 2), routers, **options)[0].tolist() == [[0, 1]]


def test_route_ties_go_to_the_lower_id(backend):
    routers = ops.RouterWeights(torch.zeros(1, 12, 4), torch.zeros(1, 12))
    x = torch.ones(3, 4)
    assert (ops.moe_route(x, routers, kind="softmax", top_k=3)[0] == torch.arange(3)).all()
    options = {"kind": "grouped_sigmoid", "top_k": 4, "n_group": 4, "topk_group": 2}
    assert (ops.moe_route(x, routers, **options)[0] == torch.arange(4)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_route_wild_numbers_give_valid_ids(backend, rng, value):
    x = torch.randn(5, 8, generator=rng)
    x[2, 3] = value
    routers = make_routers(rng, 1, 16, 8)
    for options in (ROUTES[0], {**ROUTES[3], "n_group": 4}):
        ids, weights, _ = ops.moe_route(x, routers, **options)
        assert ((ids >= 0) & (ids < 16)).all()
        assert (ids[:, 1:] > ids[:, :-1]).all()
        assert weights[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_a_token_alone_is_the_same(isa, rng, dtype):
    x = torch.randn(133, 40, generator=rng).to(dtype)
    routers, modality = make_routers(rng, 3, 70, 40), torch.arange(133).remainder(3).to(torch.uint8)
    whole = ops.moe_route(x, routers, modality, kind="softmax", top_k=4)
    for t in (0, 1, 64, 132):
        one = ops.moe_route(x[t : t + 1], routers, modality[t : t + 1], kind="softmax", top_k=4)
        for a, b in zip(one, whole, strict=True):
            assert torch.equal(a[0], b[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "part"), [(60, 1), (60, 5), (200, 70)])
def test_route_of_a_part_is_the_same(backend, rng, tokens, part, dtype):
    """Within one of the regimes of a device, up to 64 rows and more of them."""
    x = torch.randn(tokens, 72, generator=rng).to(dtype)
    routers, modality = make_routers(rng, 3, 40, 72), torch.arange(tokens).remainder(3).to(torch.uint8)
    whole = ops.moe_route(x, routers, modality, kind="softmax", top_k=4)
    for begin in (0, 7, tokens - part):
        at = slice(begin, begin + part)
        for a, b in zip(
            ops.moe_route(x[at], routers, modality[at], kind="softmax", top_k=4), whole, strict=True
        ):
            assert torch.equal(a, b[at])


def test_wild_modality_on_a_device(backend, rng):
    x, routers = torch.randn(4, 16, generator=rng), make_routers(rng, 2, 8, 16)
    modality = torch.tensor([1, 0, 2, 255], dtype=torch.uint8)
    if backend not in ON_DEVICE:
        with pytest.raises(ValueError, match="modality: expected values below the number of routers, 2"):
            ops.moe_route(x, routers, modality, **ROUTES[5])
        return
    actual = ops.moe_route(x, routers, modality, **ROUTES[5])
    with pytest.raises(ValueError, match="modality: expected values below the number of routers"):
        ops.check_device()
    modality[2:] = 0
    for a, b in zip(actual, ops.moe_route(x, routers, modality, **ROUTES[5]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 0, 0, 4, 3)])
def test_permute(backend, rng, shape, load):
    tokens, _, _, experts, top_k = shape
    ids = choices(rng, tokens, experts, top_k, load)
    for actual, expected in zip(
        ops.moe_permute(ids, experts), ops.moe_permute_torch(ids, experts), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_wild_ids_on_a_device(backend, bad):
    ids = torch.tensor([[1, bad], [0, 3]], dtype=torch.int32)
    if backend not in ON_DEVICE:
        with pytest.raises(ValueError, match=f"topk_ids: expected values in 0..3, got {bad}"):
            ops.moe_permute(ids, 4)
        return
    rows, offsets = ops.moe_permute(ids, 4)
    with pytest.raises(ValueError, match=f"topk_ids: expected experts from 0 .*, got {bad}"):
        ops.check_device()
    assert rows.sort().values.tolist() == [0, 1, 2, 3]
    assert offsets[0] == 0
    assert offsets[-1] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_is_the_same(isa, rng, dtype):
    tokens, hidden, width, experts, top_k = 97, 72, 40, 8, 3
    packed, _ = make_experts(rng, experts, hidden, width, dtype)
    x = torch.randn(tokens, hidden, generator=rng).to(dtype)
    ids, weights = choices(rng, tokens, experts, top_k, "hot"), torch.rand(tokens, top_k, generator=rng)

    def block(t):
        rows, offsets = ops.moe_permute(ids[t].contiguous(), experts)
        h = ops.grouped_gemm_swiglu(x[t], rows, offsets, top_k, packed)
        return ops.moe_combine(ops.grouped_gemm_down(h, rows, offsets, packed), weights[t].contiguous(), x[t])

    before = ops.num_threads()
    try:
        whole = block(slice(None))
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            assert torch.equal(block(slice(None)), whole)
            for part in (slice(0, 1), slice(5, 6), slice(40, 97), slice(96, 97)):
                assert torch.equal(block(part), whole[part])
    finally:
        ops.set_num_threads(before)


def test_concurrent_callers(rng):
    packed, _ = make_experts(rng, 8, 72, 40, torch.bfloat16)
    routers = make_routers(rng, 1, 8, 72)

    def block(x):
        ids, weights, _ = ops.moe_route(x, routers, kind="softmax", top_k=3)
        rows, offsets = ops.moe_permute(ids, 8)
        h = ops.grouped_gemm_swiglu(x, rows, offsets, 3, packed)
        return ops.moe_combine(ops.grouped_gemm_down(h, rows, offsets, packed), weights)

    inputs = [torch.randn(20 + 7 * i, 72, generator=rng).bfloat16() for i in range(4)]
    expected = [block(x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(block, inputs), expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(backend, rng, dtype):
    packed, _ = make_experts(rng, 4, 8, 6, dtype)
    x = torch.empty(0, 8, dtype=dtype)
    ids, weights, _ = ops.moe_route(x, make_routers(rng, 1, 4, 8), kind="softmax", top_k=2)
    rows, offsets = ops.moe_permute(ids, 4)
    assert offsets.tolist() == [0] * 5
    h = ops.grouped_gemm_swiglu(x, rows, offsets, 2, packed)
    assert ops.moe_combine(ops.grouped_gemm_down(h, rows, offsets, packed), weights).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(7, 3, 37), (2, 8, 48), (1, 11, 1048), (3, 1, 520)])
def test_combine_matches_float64(backend, rng, tokens, top_k, hidden, dtype):
    y = torch.randn(tokens * top_k, hidden, generator=rng).to(dtype)
    weights = torch.rand(tokens, top_k, generator=rng)
    shared = torch.randn(tokens, hidden + 8, generator=rng).to(dtype)
    combined = ops.moe_combine(y, weights)
    assert_close(combined, ops.moe_combine_torch(y.double(), weights.double()))
    for s in (shared[:, :hidden], shared[:, 3 : 3 + hidden]):
        assert torch.equal(ops.moe_combine(y, weights, s), combined + s)


def test_combine_sums_in_fp32(backend):
    """bfloat16 terms that cancel: a bfloat16 running sum would lose the small one."""
    y = torch.tensor([[256.0], [0.5], [-256.0]]).bfloat16()
    assert ops.moe_combine(y, torch.ones(1, 3)).item() == 0.5


def test_routers_of_another_device(backend, rng):
    """64 experts take the same memory in both layouts: only the layout's name tells them apart."""
    routers = make_routers(rng, 1, 64, 8)
    routers.layout = "rows" if routers.layout == "panels" else "panels"
    with pytest.raises(ValueError, match="moe_route: w: expected a weight packed on the device of x"):
        ops.moe_route(torch.ones(2, 8), routers, kind="softmax", top_k=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_routers(rng, dtype):
    routers = torch.randn(2, 5, 9, generator=rng).to(dtype)
    assert torch.equal(ops.RouterWeights(routers).unpack(), routers.float())
    assert ops.RouterWeights(routers.to("meta")).nbytes == ops.RouterWeights(routers).nbytes


def test_bad_arguments(rng):
    routers = make_routers(rng, 2, 4, 8)
    x = torch.ones(2, 8)
    modality = torch.tensor([0, 2], dtype=torch.uint8)
    group = {"kind": "grouped_sigmoid", "n_group": 2, "topk_group": 1}
    cases = [
        (lambda: ops.moe_route(x, routers, kind="noisy", top_k=2), "moe_route: expected kind"),
        (lambda: ops.moe_route(x, routers, kind="softmax", top_k=5), "moe_route: expected top_k"),
        (
            lambda: ops.moe_route(x, routers, modality, kind="softmax", top_k=2),
            "moe_route: modality: expected",
        ),
        (lambda: ops.moe_route(x[:, :7], routers, kind="softmax", top_k=2), "moe_route: routers: expected"),
        (lambda: ops.moe_route(x, routers, top_k=3, **group), "moe_route: expected topk_group"),
        (
            lambda: ops.moe_route(x, routers, top_k=2, **{**group, "n_group": 4}),
            "moe_route: expected n_group",
        ),
        (
            lambda: ops.moe_permute(torch.tensor([[4]], dtype=torch.int32), 4),
            "moe_permute: topk_ids: expected",
        ),
        (
            lambda: ops.moe_permute(torch.tensor([[-1]], dtype=torch.int32), 4),
            "moe_permute: topk_ids: expected",
        ),
        (lambda: ops.moe_combine(torch.ones(3, 8), torch.ones(2, 2)), "moe_combine: expert_out: expected"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
