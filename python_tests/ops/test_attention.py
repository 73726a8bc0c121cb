"""attention_varlen and attention_paged: every ISA and dtype against float64, GQA ratios, page sizes, poisoned
memory, and bitwise equality alone / batched / chunked / decoded and for every thread count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 4, 7, 16, 64, 80, 128, 130])
def test_varlen_matches_float64(isa, rng, dtype, dim):
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
def test_paged_matches_float64(isa, rng, dtype, page, heads, kv_heads, dim):
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
def test_large_scores_do_not_overflow(isa, rng, dtype):
    q = torch.randn(40, 2, 16, generator=rng) * 200
    k, v = torch.randn(2, 40, 2, 16, generator=rng)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    assert_close(ops.attention_varlen(q, k, v, cu), reference(q, k, v, causal=False), "attention_peaked")


@pytest.mark.parametrize(("length", "dim", "spread"), [(700, 80, 1.0), (300, 64, 1.0), (64, 128, 4.0)])
def test_bfloat16_is_as_accurate_as_the_composition(isa, rng, length, dim, spread):
    q, k, v = torch.randn(3, length, 2, dim, generator=rng)
    q, k, v = (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()
    cu = torch.tensor([0, length], dtype=torch.int32)
    exact = reference(q, k, v, causal=False)
    ours, composed = (
        (op(q, k, v, cu).double() - exact).pow(2).mean().sqrt()
        for op in (ops.attention_varlen, ops.attention_varlen_torch)
    )
    assert ours <= 1.05 * composed


def test_empty_batch(isa):
    empty = torch.empty(0, 2, 8)
    assert ops.attention_varlen(empty, empty, empty, torch.zeros(1, dtype=torch.int32)).shape == (0, 2, 8)
    pages, none = torch.empty(0, 2, 16, 8), torch.zeros(0, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    assert ops.attention_paged(empty, pages, pages, none.view(0, 0), zero, none).shape == (0, 2, 8)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


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
