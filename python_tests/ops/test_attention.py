"""attention_varlen and attention_paged: every backend and dtype against float64, GQA ratios, page sizes,
poisoned memory, bitwise equality alone / batched / chunked / decoded, and wild values in device memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from conftest import BACKENDS
from tolerances import assert_close

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]
DEVICES = [b for b in BACKENDS if b in ("emu", "cuda")]
SEEDS = ("1", "2", "3")  # orders of a block's threads on the emulation
# Heads, KV heads, head_dim, page size: the head_dims of the tensor cores and one of the plain form.
DEVICE_CASES = [
    (2, 2, 64, 16),
    (4, 1, 80, 1),
    (4, 1, 128, 16),
    (7, 1, 128, 32),
    (14, 2, 64, 1),
    (4, 1, 40, 5),
]


def reference(q, k, v, causal):
    """Float64 attention of one sequence: q [n, Hq, D], k and v [m, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    q = q.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@dataclass
class Paged:
    """Sequences in a shuffled cache whose unused memory is NaN and whose unused table entries are wild."""

    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    cu: torch.Tensor
    kv_lens: torch.Tensor

    def run(self, op=ops.attention_paged):
        return op(self.q, self.k_pages, self.v_pages, self.table, self.cu, self.kv_lens)

    def expected(self):
        bounds = self.cu.tolist()
        return torch.cat(
            [
                reference(self.q[bounds[b] : bounds[b + 1]], k, v, causal=True)
                for b, (k, v) in enumerate(zip(self.k, self.v, strict=True))
            ]
        )


def paged(rng, dtype, heads, kv_heads, dim, page, q_lens, kv_lens):
    counts = [-(-n // page) for n in kv_lens]
    pages = sum(counts) + 2
    k_pages, v_pages = (torch.full((pages, kv_heads, page, dim), torch.nan, dtype=dtype) for _ in range(2))
    order = torch.randperm(pages, generator=rng).int()
    table = torch.full((len(kv_lens), max(counts) + 1), 2**30, dtype=torch.int32)
    ks, vs, used = [], [], 0
    for b, (count, length) in enumerate(zip(counts, kv_lens, strict=True)):
        table[b, :count] = order[used : used + count]
        used += count
        k, v = (torch.randn(length, kv_heads, dim, generator=rng).to(dtype) for _ in range(2))
        at = torch.arange(length)
        where = table[b, at // page].long(), slice(None), at % page
        k_pages[where], v_pages[where] = k, v
        ks.append(k)
        vs.append(v)
    q = torch.randn(sum(q_lens), heads, dim, generator=rng).to(dtype)
    cu = torch.tensor([0, *q_lens]).cumsum(0).int()
    return Paged(q, ks, vs, k_pages, v_pages, table, cu, torch.tensor(kv_lens).int())


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def alone(case, b, begin=0, end=None):
    """Queries begin..end of sequence b, without the other sequences."""
    first, last = case.cu[b : b + 2].tolist()
    end = last - first if end is None else end
    length = int(case.kv_lens[b]) - (last - first) + end
    return ops.attention_paged(
        case.q[first + begin : first + end],
        case.k_pages,
        case.v_pages,
        case.table[b : b + 1],
        ints(0, end - begin),
        ints(length),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 4, 7, 16, 64, 80, 128, 130])
def test_varlen_matches_float64(backend, rng, dtype, dim):
    lengths = [5, 0, 64, 1, 130, 0]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    # Strided views of one qkv buffer, as the encoders pass them.
    q, k, v = torch.randn(sum(lengths), 3, 2, dim, generator=rng).to(dtype).unbind(1)
    actual = ops.attention_varlen(q, k, v, cu)
    parts = [x.split(lengths) for x in (q, k, v)]
    assert_close(actual, torch.cat([reference(*x, causal=False) for x in zip(*parts, strict=True)]))
    assert_close(actual, ops.attention_varlen_torch(q, k, v, cu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [511, 512, 513, 1100])
def test_varlen_crosses_spans(isa, rng, dtype, length):
    q, k, v = (torch.randn(length, h, 24, generator=rng).to(dtype) for h in (4, 2, 2))
    cu = torch.tensor([0, length], dtype=torch.int32)
    actual = ops.attention_varlen(q, k, v, cu, scale=24**-0.5)
    assert_close(actual, reference(q, k, v, causal=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [5, 16, 32, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 1, 32), (4, 4, 80), (6, 2, 12), (16, 4, 128)])
def test_paged_matches_float64(backend, rng, dtype, page, heads, kv_heads, dim):
    case = paged(rng, dtype, heads, kv_heads, dim, page, [1, 70, 33, 0, 2], [90, 70, 130, 3, 600])
    actual = case.run()
    assert_close(actual, case.expected())
    assert_close(actual, case.run(ops.attention_paged_torch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 32), (3, 3, 20)])
def test_same_bits_alone_batched_chunked_and_decoded(isa, rng, dtype, heads, kv_heads, dim):
    case = paged(rng, dtype, heads, kv_heads, dim, 16, [150, 1, 1100], [150, 700, 1100])
    whole = case.run()
    bounds = case.cu.tolist()
    for b, kv_len in enumerate(case.kv_lens.tolist()):
        q_len = bounds[b + 1] - bounds[b]
        for chunk in (1, 37, 512):
            for begin in range(0, q_len, chunk):
                if chunk == 1 and begin % 61:
                    continue
                end = min(begin + chunk, q_len)
                piece = ops.attention_paged(
                    case.q[bounds[b] + begin : bounds[b] + end],
                    case.k_pages,
                    case.v_pages,
                    case.table[b : b + 1],
                    torch.tensor([0, end - begin], dtype=torch.int32),
                    torch.tensor([kv_len - q_len + end], dtype=torch.int32),
                )
                assert torch.equal(piece, whole[bounds[b] + begin : bounds[b] + end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_page_size_and_threads(isa, rng, dtype):
    before, results = ops.num_threads(), []
    try:
        for threads, page in [(1, 16), (2, 32), (5, 7)]:
            ops.set_num_threads(threads)
            rng.manual_seed(5)
            case = paged(rng, dtype, 4, 2, 16, 16, [3, 1, 40], [1300, 513, 40])
            repaged = paged(rng, dtype, 4, 2, 16, page, [3, 1, 40], [1300, 513, 40])
            for b, length in enumerate(case.kv_lens.tolist()):
                at = torch.arange(length)
                where = repaged.table[b, at // page].long(), slice(None), at % page
                repaged.k_pages[where], repaged.v_pages[where] = case.k[b], case.v[b]
            repaged.q = case.q
            results.append(repaged.run())
    finally:
        ops.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, rng, dtype):
    q = torch.randn(40, 2, 16, generator=rng) * 200
    k, v = torch.randn(2, 40, 2, 16, generator=rng)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    assert_close(ops.attention_varlen(q, k, v, cu), reference(q, k, v, causal=False), "attention_peaked")


@pytest.mark.parametrize(("length", "dim", "spread"), [(700, 80, 1.0), (300, 64, 1.0), (64, 128, 4.0)])
def test_bfloat16_is_as_accurate_as_the_composition(backend, rng, length, dim, spread):
    q, k, v = torch.randn(3, length, 2, dim, generator=rng)
    q, k, v = (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()
    cu = torch.tensor([0, length], dtype=torch.int32)
    exact = reference(q, k, v, causal=False)
    ours, composed = (
        (op(q, k, v, cu).double() - exact).pow(2).mean().sqrt()
        for op in (ops.attention_varlen, ops.attention_varlen_torch)
    )
    assert ours <= 1.05 * composed


def test_empty_batch(backend):
    empty = torch.empty(0, 2, 8)
    assert ops.attention_varlen(empty, empty, empty, torch.zeros(1, dtype=torch.int32)).shape == (0, 2, 8)
    pages, none = torch.empty(0, 2, 16, 8), torch.zeros(0, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    assert ops.attention_paged(empty, pages, pages, none.view(0, 0), zero, none).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"page_table": ints(0, 9).view(1, 2)},
            "page_table: expected pages from 0 to 3 for sequence 0, got 9",
        ),
        ({"page_table": ints(-1, 0).view(1, 2)}, "page_table: .* got -1"),
        ({"kv_lens": ints(33)}, r"kv_lens: expected 2 \(the queries\) to 32 \(the page table\)"),
        ({"kv_lens": ints(1)}, "kv_lens: expected 2 .* got 1"),
        ({"kv_lens": ints(-5)}, "kv_lens: .* got -5"),
        ({"cu_seqlens_q": ints(0, 3)}, "cu_seqlens_q: expected offsets from 0 to 2"),
        ({"cu_seqlens_q": ints(1, 2)}, "cu_seqlens_q: expected offsets from 0 to 2"),
        ({"k_pages": torch.zeros(4, 3, 16, 8)}, "v_pages: expected shape"),
        ({"q": torch.zeros(2, 3, 8)}, "divisible"),
        ({"q": torch.zeros(2, 4, 8, dtype=torch.bfloat16)}, "k_pages: expected bfloat16, got float32"),
        ({"scale": float("nan")}, "expected a positive scale"),
    ],
)
def test_bad_paged_arguments(change, message):
    good = {
        "q": torch.zeros(2, 4, 8),
        "k_pages": torch.zeros(4, 2, 16, 8),
        "v_pages": torch.zeros(4, 2, 16, 8),
        "page_table": ints(3, 0).view(1, 2),
        "cu_seqlens_q": ints(0, 2),
        "kv_lens": ints(20),
    }
    ops.attention_paged(**good)
    with pytest.raises(ValueError, match=f"attention_paged: .*{message}"):
        ops.attention_paged(**(good | change))


@pytest.mark.parametrize("cu", [ints(0, 3, 2, 4), ints(0, 5), ints(), ints(0, 3)])
def test_bad_segments(cu):
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="attention_varlen: cu_seqlens: expected"):
        ops.attention_varlen(x, x, x, cu)


on_devices = pytest.mark.parametrize("backend", DEVICES, indirect=True)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), DEVICE_CASES)
def test_device_prefill_and_decode_in_one_call(backend, rng, dtype, heads, kv_heads, dim, page):
    case = paged(rng, dtype, heads, kv_heads, dim, page, [1, 21, 9, 0, 8], [140, 70, 9, 3, 131])
    assert_close(case.run(), case.expected())


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), DEVICE_CASES)
def test_device_decode_does_not_depend_on_the_batch(backend, rng, dtype, heads, kv_heads, dim, page):
    case = paged(rng, dtype, heads, kv_heads, dim, page, [1, 1, 1, 1], [1, 64, 129, 300])
    batched = case.run()
    assert_close(batched, case.expected())
    for b in range(4):
        assert torch.equal(alone(case, b), batched[b : b + 1])


@on_devices
def test_device_splits_grow_with_the_sequence(backend, rng):
    case = paged(rng, torch.bfloat16, 2, 1, 64, 32, [1, 2], [4200, 4096])
    assert_close(case.run(), case.expected())


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_device_prefill_has_the_same_bits_alone_batched_and_chunked(backend, rng, dtype, dim):
    case = paged(rng, dtype, 4, 1, dim, 16, [1, 70, 9], [100, 150, 9])
    batched, bounds = case.run(), case.cu.tolist()
    for b in range(3):
        assert torch.equal(alone(case, b), batched[bounds[b] : bounds[b + 1]])
    for begin, end in [(0, 33), (33, 57), (57, 70)]:
        assert torch.equal(alone(case, 1, begin, end), batched[bounds[1] + begin : bounds[1] + end])


@on_devices
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_device_segments_have_the_same_bits_in_tall_and_short_tiles(backend, rng, dim):
    # Alone the long segment goes by tall tiles (on a small device), among short ones by short tiles.
    q, k, v = torch.randn(141, 3, 4, dim, generator=rng).bfloat16().unbind(1)
    together = ops.attention_varlen(q, k, v, ints(0, 1, 5, 135, 141))
    long = [x[5:135] for x in (q, k, v)]
    assert torch.equal(ops.attention_varlen(*long, ints(0, 130)), together[5:135])
    assert_close(together[5:135], reference(*long, causal=False))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_takes_rows_at_any_address(backend, rng, dtype):
    q, k, v = (torch.randn(40, 2, 67, generator=rng).to(dtype)[..., 1:65] for _ in range(3))
    assert_close(ops.attention_varlen(q, k, v, ints(0, 40)), reference(q, k, v, causal=False))


@on_devices
@pytest.mark.parametrize("dim", [64, 600])
def test_device_padding_rows_give_zeros(backend, rng, dim):
    for dtype in DTYPES:
        case = paged(rng, dtype, 4, 2, dim, 16, [1, 1, 20], [40, 1, 20])
        case.kv_lens[1:] = 0
        case.table[1:] = -7
        out = case.run()
        assert torch.equal(out[:1], alone(case, 0))
        assert not out[1:].any()
        for queries in (1, 2):  # decode only, and with more than one query
            out = ops.attention_paged(
                case.q[1 : 1 + queries],
                case.k_pages,
                case.v_pages,
                case.table[1:2],
                ints(0, queries),
                ints(0),
            )
            assert not out.any()


@on_devices
def test_device_takes_a_long_sequence_among_empty_ones(backend, rng):
    # As many query rows as sequences: all count as decode.
    case = paged(rng, torch.bfloat16, 4, 1, 64, 16, [10] + 9 * [0], [150] + 9 * [3])
    assert_close(case.run(), case.expected())


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("table", (1, 2), -1, "page_table: expected pages inside the cache, got -1"),
        ("table", (2, 0), 2**30, "page_table: .* got 1073741824"),
        ("kv_lens", 1, 1000, "kv_lens: expected lengths .* got 1000"),
        ("kv_lens", 2, 1, "kv_lens: .* got 1"),
        ("kv_lens", 1, -3, "kv_lens: .* got -3"),
        ("cu", 0, 1, "cu_seqlens: expected rising offsets up to the number of rows, got 1"),
        ("cu", 3, 13, "cu_seqlens: .* got 13"),
        ("cu", 3, 2**30, "cu_seqlens: .* got 1073741824"),
        ("cu", 2, -(2**30), "cu_seqlens"),
        ("cu", 1, 2**30, "cu_seqlens"),
    ],
)
def test_device_reports_wild_paged_values(backend, rng, dtype, name, row, value, message):
    case = paged(rng, dtype, 4, 1, 64, 16, [1, 11, 2], [100, 50, 40])
    good = case.run()
    getattr(case, name)[row] = value
    out = case.run()
    with pytest.raises(ValueError, match=message):
        ops.check_device()
    ops.check_device()
    if name != "cu":
        assert torch.equal(out[:1], good[:1])
        assert out[1:].isfinite().all()


@on_devices
def test_device_refuses_a_table_without_pages(backend):
    """It has no address, as keys outside of pages have no table: their kernels would read past the cache."""
    pages = torch.zeros(1, 1, 1, 8)
    for lens in (0, 600):
        with pytest.raises(ValueError, match="attention_paged: page_table: expected at least one page"):
            ops.attention_paged(
                torch.zeros(600, 1, 8), pages, pages, ints().view(1, 0), ints(0, 600), ints(lens)
            )


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cu", [(0, 3, 2, 4), (0, 5), (1, 4), (0, 3), (0, -9, 4), (0, 2**30, 4), (2**30, 4)])
def test_device_reports_wild_segments(backend, rng, dtype, cu):
    x = torch.randn(4, 2, 64, generator=rng).to(dtype)
    ops.attention_varlen(x, x, x, ints(*cu))
    with pytest.raises(ValueError, match="cu_seqlens: expected rising offsets"):
        ops.check_device()


@pytest.mark.parametrize("backend", ["emu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_result_does_not_depend_on_the_order_of_threads(backend, rng, dtype, monkeypatch):
    case = paged(rng, dtype, 4, 1, 64, 16, [1, 33, 8], [200, 90, 130])
    q, k, v = torch.randn(140, 3, 4, 80, generator=rng).to(dtype).unbind(1)
    cu = ints(0, 3, 140)
    expected = case.run(), ops.attention_varlen(q, k, v, cu)
    for seed in SEEDS:
        monkeypatch.setenv("MING_EMU_SEED", seed)
        assert torch.equal(case.run(), expected[0])
        assert torch.equal(ops.attention_varlen(q, k, v, cu), expected[1])


def windowed(lengths, chunk):
    """Offsets of the queries of chunks, and the keys from a sequence's first to the chunk's end."""
    ends, keys, first = [0], [], 0
    for length in lengths:
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            ends.append(first + end)
            keys.append((first, first + end))
        first += length
    return ints(*ends), ints(*keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 130])
def test_chunks_see_what_came_before(backend, rng, dtype, dim):
    lengths, chunk = [45, 1, 20], 16
    q, k, v = torch.randn(sum(lengths), 3, 2, dim, generator=rng).to(dtype).unbind(1)
    cu, keys = windowed(lengths, chunk)
    actual = ops.attention_varlen(q, k, v, cu, keys=keys)
    expected = [
        reference(q[begin:end], k[first:last], v[first:last], causal=False)
        for (begin, end), (first, last) in zip(pairwise(cu.tolist()), keys.tolist(), strict=True)
    ]
    assert_close(actual, torch.cat(expected))
    assert_close(actual, ops.attention_varlen_torch(q, k, v, cu, keys=keys))
    # A later chunk has the same bits without the queries before it.
    begin, end = cu[1:3].tolist()
    alone = ops.attention_varlen(q[begin:end], k, v, ints(0, end - begin), keys=keys[1:2].contiguous())
    assert torch.equal(alone, actual[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (6, 2, 64)])
def test_bias_is_added_before_the_scale(backend, rng, dtype, heads, kv_heads, dim):
    q = torch.randn(37, heads, dim, generator=rng).to(dtype)
    k, v = torch.randn(2, 90, kv_heads, dim, generator=rng).to(dtype)
    # Rows that overlap, as scores by distance are read by position.
    wide = torch.randn(heads, 37, 120, generator=rng)
    bias = wide.as_strided((heads, 37, 80), (wide.stride(0), wide.stride(1) - 1, 1), 36)
    cu, keys = ints(0, 20, 20, 37), ints((5, 85), (0, 3), (40, 47))
    actual = ops.attention_varlen(q, k, v, cu, scale=0.2, keys=keys, bias=bias)
    for (begin, end), (first, last) in zip(pairwise(cu.tolist()), keys.tolist(), strict=True):
        mine = (x[first:last].double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[begin:end].double(), (seen := list(mine))[0])
        weights = ((scores + bias[:, begin:end, : last - first]) * 0.2).softmax(-1)
        assert_close(actual[begin:end], torch.einsum("hij,jhd->ihd", weights, seen[1]))
    assert_close(actual, ops.attention_varlen_torch(q, k, v, cu, scale=0.2, keys=keys, bias=bias))


def test_bias_crosses_spans(isa, rng):
    q, k, v = torch.randn(3, 600, 2, 24, generator=rng)
    bias = torch.randn(2, 600, 600, generator=rng)
    arguments = {"keys": ints((0, 600)), "bias": bias}
    whole = ops.attention_varlen(q, k, v, ints(0, 600), **arguments)
    assert_close(whole, ops.attention_varlen_torch(q, k, v, ints(0, 600), **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_segment_without_keys_gives_zeros(backend, rng, dtype):
    q, k, v = torch.randn(3, 9, 2, 64, generator=rng).to(dtype)
    out = ops.attention_varlen(q, k, v, ints(0, 4, 9), keys=ints((3, 3), (0, 9)))
    assert not out[:4].any()
    assert_close(out[4:], reference(q[4:], k, v, causal=False))


@pytest.mark.parametrize("keys", [6, 600])
def test_a_row_that_excludes_every_key_gives_zeros(backend, rng, keys):
    q, k, v = (torch.randn(n, 2, 16, generator=rng) for n in (3, keys, keys))
    bias = torch.zeros(2, 3, keys)
    bias[:, 1] = -torch.inf
    out = ops.attention_varlen(q, k, v, ints(0, 3), keys=ints((0, keys)), bias=bias)
    assert not out[1].any()
    assert_close(out[::2], reference(q[::2], k, v, causal=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": ints((0, 6), (0, 9))}, "keys: expected rows from 0 to 8 for sequence 1, got 0 to 9"),
        ({"keys": ints((-1, 6), (0, 8))}, "keys: .* sequence 0, got -1 to 6"),
        ({"keys": ints((5, 4), (0, 8))}, "keys: .* got 5 to 4"),
        ({"keys": ints((0, 6))}, r"keys: expected shape \[B, 2\]"),
        (
            {"bias": torch.zeros(2, 4, 7)},
            "bias: expected a column for each of the 8 keys of sequence 1, got 7",
        ),
        ({"bias": torch.zeros(1, 4, 8)}, "bias: expected shape"),
        ({"bias": torch.zeros(2, 4, 0)}, "bias: expected at least one column"),
        (
            {"keys": None, "k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8)},
            "bias: expected keys beside it",
        ),
    ],
)
def test_bad_keys_and_bias(change, message):
    x = torch.zeros(8, 2, 8)
    good = {"q": x[:4], "k": x, "v": x, "cu_seqlens": ints(0, 2, 4), "keys": ints((0, 6), (0, 8))}
    good["bias"] = torch.zeros(2, 4, 8)
    ops.attention_varlen(**good)
    with pytest.raises(ValueError, match=f"attention_varlen: .*{message}"):
        ops.attention_varlen(**(good | change))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("keys", "columns", "value"), [((2, 2**30), 0, 2**30), ((-1, 4), 0, 4), ((5, 2), 0, 2), ((0, 8), 7, 8)]
)
def test_device_reports_wild_keys(backend, rng, dtype, keys, columns, value):
    q, k, v = torch.randn(3, 8, 2, 64, generator=rng).to(dtype)
    bias = torch.zeros(2, 8, columns) if columns else None
    out = ops.attention_varlen(q, k, v, ints(0, 3, 8), keys=ints((0, 7), keys), bias=bias)
    with pytest.raises(ValueError, match=f"keys: expected rows inside the keys.*got {value} "):
        ops.check_device()
    assert_close(out[:3], reference(q[:3], k[:7], v[:7], causal=False))
    assert not out[3:].any()
