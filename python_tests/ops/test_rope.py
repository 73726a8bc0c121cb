"""Rope: frequencies of every type, tables against float64, fused append against its composition, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Settings:
    type: str = "plain"
    theta: float = 600000.0
    rotary_dim: int = 128
    factor: float | None = None
    max_position_embeddings: int = 64
    original_max_position_embeddings: int = 1024
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def tables(rng, tokens, freqs):
    angles = torch.randn(tokens, freqs, generator=rng) * 3
    return angles.cos(), angles.sin()


def test_plain_frequencies_are_power_first():
    freq, axis, scale = ops.rope_frequencies(Settings())
    exact = 600000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    torch.testing.assert_close(freq.double(), exact, rtol=1e-6, atol=0)
    assert not axis.any()
    assert scale == 1.0


def test_scaled_frequencies():
    plain = ops.inv_freq(10000.0, 64)
    base = {"theta": 10000.0, "rotary_dim": 64, "factor": 4.0}
    linear, _, _ = ops.rope_frequencies(Settings(type="linear", **base))
    assert torch.equal(linear, plain / 4)
    dynamic = Settings(type="dynamic", **base)
    assert torch.equal(ops.rope_frequencies(dynamic, 64)[0], plain)
    longer = ops.rope_frequencies(dynamic, 190)[0]
    theta = 10000.0 * (4.0 * 190 / 64 - 3) ** (64 / 62)
    assert torch.equal(longer, ops.inv_freq(theta, 64))
    yarn, _, scale = ops.rope_frequencies(Settings(type="yarn", mscale_all_dim=0.5, **base))
    assert yarn[0] == plain[0]
    torch.testing.assert_close(yarn[-1], plain[-1] / 4)
    assert scale == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("kind", "rotary_dim", "expected"),
    [
        ("3D", 128, [0] * 16 + [1] * 24 + [2] * 24),
        ("3D", 64, [0] * 8 + [1] * 12 + [2] * 12),
        ("video_rope", 64, [1, 2] * 12 + [0] * 8),
        ("plain", 64, [0] * 32),
    ],
)
def test_axis_assignment(kind, rotary_dim, expected):
    assert ops.rope_frequencies(Settings(type=kind, rotary_dim=rotary_dim))[1].tolist() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(type="ntk"), "expected a type of .* got 'ntk'"),
        (Settings(type="linear"), "needs a positive factor, got None"),
        (Settings(type="yarn", factor=0.0), "needs a positive factor"),
        (Settings(type="3D", rotary_dim=36), "multiple of 8 frequencies"),
        (Settings(rotary_dim=7), "even positive rotary_dim"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_frequencies(settings)


@pytest.mark.parametrize("freqs", [1, 20, 32, 40, 64])
def test_table_matches_float64(backend, rng, freqs):
    positions = torch.randint(-40, 40000, (3, 300), generator=rng, dtype=torch.int32)
    positions[:, 0], positions[:, 1], positions[:, 2] = 0, 2**31 - 1, -(2**31)
    inv_freq = ops.inv_freq(600000.0, 2 * freqs)
    axis = torch.randint(0, 3, (freqs,), generator=rng, dtype=torch.uint8)
    cos, sin = ops.rope_table(positions, inv_freq, axis, 1.25)
    angles = (positions[axis.long()].float().t() * inv_freq).double()
    assert_close(cos, angles.cos() * 1.25, "rope_table")
    assert_close(sin, angles.sin() * 1.25, "rope_table")
    wide = torch.stack([positions, positions], 1)[:, 0]
    assert torch.equal(ops.rope_table(wide, inv_freq, axis, 1.25)[0], cos)


def append_case(rng, dtype, page_dtype, tokens, heads, kv_heads, dim, freqs, page, with_norm):
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=rng).to(dtype)
    cos, sin = tables(rng, tokens, freqs)
    pages = -(-tokens // page) + 2
    cache = torch.full((2, pages, kv_heads, page, dim), torch.nan, dtype=page_dtype)
    slots = torch.randperm(pages * page, generator=rng)[:tokens]
    norms = [torch.randn(dim, generator=rng).to(dtype) for _ in range(2)] if with_norm else [None, None]
    return qkv, cos, sin, cache, slots, heads, *norms, 1e-6


def run_append(op, case):
    qkv, cos, sin, cache, slots, *rest = case
    cache = cache.clone()
    return op(qkv, cos, sin, cache[0], cache[1], slots, *rest), cache


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("dtype", "page_dtype"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "freqs", "page"),
    [(1, 16, 4, 128, 64, 16), (37, 4, 2, 128, 32, 32), (9, 3, 1, 10, 3, 5), (64, 2, 2, 16, 8, 64)],
)
def test_append_matches_composition(
    backend, rng, tokens, heads, kv_heads, dim, freqs, page, dtype, page_dtype, with_norm
):
    case = append_case(rng, dtype, page_dtype, tokens, heads, kv_heads, dim, freqs, page, with_norm)
    q, cache = run_append(ops.rope_append, case)
    expected_q, expected = run_append(ops.rope_append_torch, case)
    assert_close(q, expected_q)
    written = ~expected.isnan()
    assert torch.equal(written, ~cache.isnan())
    assert_close(cache[written], expected[written])
    # Values are copied, not computed.
    assert torch.equal(cache[1].nan_to_num(), expected[1].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_of_a_token_does_not_depend_on_the_others(backend, rng, dtype):
    qkv, cos, sin, cache, slots, *rest = append_case(rng, dtype, dtype, 70, 4, 2, 32, 12, 16, True)
    q, whole = run_append(ops.rope_append, (qkv, cos, sin, cache, slots, *rest))
    for n in range(70):
        at = slice(n, n + 1)
        alone = ops.rope_append(qkv[at], cos[at], sin[at], cache[0], cache[1], slots[at], *rest)
        assert torch.equal(alone, q[at])
    assert torch.equal(cache.nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("slot", [-2, 32, 2**31 - 1, 2**62, -(2**62)])
def test_bad_slots_write_nothing(backend, rng, slot):
    qkv, cos, sin, cache, slots, *rest = append_case(
        rng, torch.float32, torch.float32, 2, 2, 1, 8, 4, 16, False
    )
    cache = cache[:, :2].contiguous()
    if backend in ("emu", "cuda"):
        slots[:] = torch.tensor([slot, -1])
        ops.rope_append(qkv, cos, sin, cache[0], cache[1], slots, *rest)
        with pytest.raises(ValueError, match="slots: expected slots inside the cache, or -1"):
            ops.check_device()
    else:
        slots[:] = torch.tensor([0, slot])
        message = f"rope_append: slots: expected values from 0 to 31 or -1, got {slot}"
        with pytest.raises(ValueError, match=message):
            ops.rope_append(qkv, cos, sin, cache[0], cache[1], slots, *rest)
    assert cache.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slot_minus_one_writes_q_only(backend, rng, dtype):
    case = append_case(rng, dtype, dtype, 5, 4, 2, 32, 16, 4, True)
    q, full = run_append(ops.rope_append, case)
    case[4][[1, 3]] = -1
    padded_q, cache = run_append(ops.rope_append, case)
    _, expected = run_append(ops.rope_append_torch, case)
    assert torch.equal(padded_q, q)
    assert torch.equal(cache.isnan(), expected.isnan())
    assert torch.equal(cache[~cache.isnan()], full[~cache.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "freqs"), [(16, 80, 40), (2, 16, 8), (3, 10, 3)])
def test_qk_in_place_matches_composition(backend, rng, dtype, heads, dim, freqs):
    qkv = torch.randn(50, 3 * heads * dim, generator=rng).to(dtype)
    cos, sin = tables(rng, 50, freqs)
    expected = ops.rope_qk_torch_(qkv.clone(), cos, sin, heads)
    actual = qkv.clone()
    assert ops.rope_qk_(actual, cos, sin, heads) is actual
    assert_close(actual, expected)
    assert torch.equal(actual[:, 2 * heads * dim :], qkv[:, 2 * heads * dim :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 30)}, r"qkv|\(Hq"),
        ({"cos": torch.zeros(2, 5), "sin": torch.zeros(2, 5)}, "at most head_dim / 2 = 4 frequencies"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots: expected int64, got int32"),
        ({"q_norm": torch.ones(8)}, "given together"),
        ({"sin": torch.zeros(3, 4)}, "sin: expected shape"),
    ],
)
def test_bad_append_arguments(change, message):
    good = {
        "qkv": torch.zeros(2, 32),
        "cos": torch.zeros(2, 4),
        "sin": torch.zeros(2, 4),
        "k_pages": torch.zeros(1, 1, 16, 8),
        "v_pages": torch.zeros(1, 1, 16, 8),
        "slots": torch.tensor([0, 1]),
        "num_heads": 2,
    }
    ops.rope_append(**good)
    with pytest.raises(ValueError, match=f"rope_append: .*({message})"):
        ops.rope_append(**(good | change))


def test_bad_table_and_qk_arguments():
    positions, freq = torch.zeros(3, 2, dtype=torch.int32), torch.ones(4)
    with pytest.raises(ValueError, match="rope_table: axis: expected values 0, 1 or 2, got 3"):
        ops.rope_table(positions, freq, torch.full((4,), 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rope_table: positions: expected int32"):
        ops.rope_table(positions.long(), freq, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"rope_qk_: qkv: expected rows of 3 \* 5 heads"):
        ops.rope_qk_(torch.zeros(2, 48), torch.zeros(2, 4), torch.zeros(2, 4), 5)
