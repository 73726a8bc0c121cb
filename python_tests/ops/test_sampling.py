"""sample and ngram_bans: all backends against the composition, filters against their definition, bad rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import BACKENDS
from tolerances import assert_close

from ming_rt import ops

VOCABS = [1, 7, 300, 6001]


def parameters(rows, **changes):
    """All-off parameters for `rows` rows; scalars are repeated, history is a list of id lists."""
    values = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "uniforms": 0.0,
    } | {k: v for k, v in changes.items() if k not in ("history", "n_logprobs")}
    integers = ("top_k", "no_repeat_ngram_size")
    out = {
        name: torch.as_tensor(value, dtype=torch.int32 if name in integers else torch.float32).expand(rows)
        for name, value in values.items()
    }
    history = changes.get("history", [[]] * rows)
    out["history"] = torch.tensor(list(itertools.chain.from_iterable(history)), dtype=torch.int64)
    ends = list(itertools.accumulate(map(len, history), initial=0))
    out["history_bounds"] = torch.tensor(list(itertools.pairwise(ends)), dtype=torch.int64).view(rows, 2)
    out["n_logprobs"] = changes.get("n_logprobs", 0)
    return {k: v.contiguous() if torch.is_tensor(v) else v for k, v in out.items()}


def log_probabilities(scores, temperature, top_k, top_p):
    """Float64 log-probabilities of one row after the filters, -inf where dropped."""
    scores = scores.double() / temperature
    if 0 < top_k < len(scores):
        scores[scores < scores.sort(descending=True).values[top_k - 1]] = -torch.inf
    ranked, order = scores.sort(descending=True, stable=True)
    before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
    if top_p < 1:
        drop = before >= top_p
        drop[0] = False
        scores[order[drop]] = -torch.inf
    return scores.log_softmax(-1)


@pytest.mark.parametrize("vocab", [*VOCABS, 126464])
def test_greedy_and_logprobs(backend, rng, vocab):
    logits = torch.randn(6, vocab, generator=rng) * 4
    n = min(vocab, 20)
    actual = ops.sample(logits, **parameters(6, n_logprobs=n))
    expected = ops.sample_torch(logits, **parameters(6, n_logprobs=n))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    assert torch.equal(actual[0], logits.argmax(-1))
    assert_close(actual[1], logits.double().log_softmax(-1).max(-1).values)


def test_ties_take_the_lowest_id(backend):
    logits = torch.full((2, 1000), -5.0)
    logits[0, [999, 600, 601]] = 3.0
    logits[1, 0] = -0.0
    logits[1, 700] = 0.0
    ids, _, top, _ = ops.sample(logits, **parameters(2, n_logprobs=3))
    assert ids.tolist() == [600, 0]
    assert top.tolist() == [[600, 601, 999], [0, 700, 1]]


@pytest.mark.parametrize("spread", [0.01, 2.0, 20.0])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 5, 1.0),
        (1.3, 0, 0.9),
        (0.5, 40, 0.5),
        (2.0, 3000, 0.99),
        (1.0, 0, 1e-6),
        (1.0, 1, 1.0),
    ],
)
def test_draw_is_the_inverse_distribution(backend, rng, vocab, spread, temperature, top_k, top_p):
    rows = 8
    logits = torch.randn(rows, vocab, generator=rng) * spread
    uniforms = torch.rand(rows, generator=rng)
    uniforms[0], uniforms[1] = 0.0, 1.0
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "uniforms": uniforms}
    ids = ops.sample(logits, **parameters(rows, **changes))[0]
    for row, chosen in enumerate(ids.tolist()):
        kept = log_probabilities(logits[row], temperature, top_k, top_p)
        cumulative = kept.exp().cumsum(-1)
        # Rounding may move an interval's ends, and at the edge of top_p the last token kept.
        slack = 1e-5
        assert cumulative[chosen] >= uniforms[row] * (1 - slack) - slack
        assert (cumulative[chosen - 1] if chosen else 0.0) <= uniforms[row] + slack
        if top_p == 1.0:
            assert kept[chosen] > -torch.inf


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 50, 0.9), (1.0, 0, 0.95), (1.2, 2000, 1.0), (1e-3, 0, 0.5)]
)
def test_draws_from_a_whole_vocabulary(backend, rng, temperature, top_k, top_p):
    logits = torch.randn(2, 157184, generator=rng, device=rng.device) * 3
    uniforms = torch.tensor([0.3, 0.9])
    options = parameters(2, temperature=temperature, top_k=top_k, top_p=top_p, uniforms=uniforms)
    expected = ops.sample_torch(logits, **options)
    for actual, wanted in zip(ops.sample(logits, **options)[:2], expected, strict=False):
        assert_close(actual, wanted)


def test_top_k_keeps_ties_of_the_kth(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 3.0, 2.0, 0.0]]).repeat(200, 1)
    uniforms = torch.linspace(0, 1, 200)
    ids = ops.sample(logits, **parameters(200, temperature=1.0, top_k=2, uniforms=uniforms))[0]
    assert set(ids.tolist()) == {1, 2, 3, 4}


def test_top_p_breaks_ties_by_id(backend):
    logits = torch.zeros(200, 10)
    uniforms = torch.linspace(0, 1, 200)
    ids = ops.sample(logits, **parameters(200, temperature=1.0, top_p=0.35, uniforms=uniforms))[0]
    assert set(ids.tolist()) == {0, 1, 2, 3}


# Too many rows for the emulation.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "emu"], indirect=True)
def test_frequencies_follow_the_softmax(backend, rng):
    logits = torch.randn(1, 12, generator=rng)
    uniforms = torch.rand(20000, generator=rng)
    ids = ops.sample(logits.expand(20000, 12), **parameters(20000, temperature=1.0, uniforms=uniforms))[0]
    share = torch.bincount(ids, minlength=12) / 20000
    assert_close(share, logits[0].softmax(-1), "sample_share")


def test_penalties_match_composition(backend, rng):
    logits = torch.randn(4, 500, generator=rng) * 3
    history = [torch.randint(0, 30, (n,), generator=rng).tolist() for n in (0, 1, 60, 400)]
    for penalty, n in itertools.product([1.0, 1.7, 0.5], [0, 1, 2, 3]):
        changes = {"history": history, "repetition_penalty": penalty, "no_repeat_ngram_size": n}
        logits[:, :30] += 3
        for temperature in (0.0, 1.0):
            changes |= {"temperature": temperature, "uniforms": 0.37}
            actual = ops.sample(logits, **parameters(4, **changes))
            expected = ops.sample_torch(logits, **parameters(4, **changes))
            assert torch.equal(actual[0], expected[0])
            # Log-probabilities are those of the untouched logits.
            assert_close(actual[1], expected[1])


def test_penalty_counts_an_id_once_and_ignores_foreign_ids(backend):
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    changes = {"history": [[0, 0, 0, 9, -4]], "repetition_penalty": 1.2}
    assert ops.sample(logits, **parameters(1, **changes))[0].item() == 0  # 2 / 1.2 > 1.5
    assert ops.sample(logits, **parameters(1, **(changes | {"repetition_penalty": 1.4})))[0].item() == 1


@pytest.mark.parametrize(
    ("history", "n", "banned"),
    [
        ([1, 2, 3, 1, 2], 3, {3}),
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, {3, 4}),
        ([5, 5, 5], 2, {5}),
        ([1, 2], 1, {1, 2}),
        ([1, 2], 3, set()),
        ([1, 2, 1], 0, set()),
        ([], 1, set()),
        ([99, 7, 99], 2, {7}),
        ([7, 99, 7], 2, set()),
    ],
)
def test_ngram_bans(backend, history, n, banned):
    history = torch.tensor(history, dtype=torch.int64)
    for op in (ops.ngram_bans, ops.ngram_bans_torch):
        assert set(op(history, n, 10).nonzero()[:, 0].tolist()) == banned


def test_ngram_bans_match_composition_on_repetitive_text(backend, rng):
    for _ in range(50):
        history = torch.randint(0, 3, (60,), generator=rng)
        for n in (1, 2, 4, 10):
            assert torch.equal(ops.ngram_bans(history, n, 3), ops.ngram_bans_torch(history, n, 3))


def test_row_is_the_same_alone_and_in_a_batch(backend, rng):
    logits = torch.randn(5, 3000, generator=rng) * 3
    changes = {
        "temperature": [0.0, 1.0, 0.8, 1.0, 1.5],
        "top_k": [0, 0, 50, 0, 7],
        "top_p": [1.0, 1.0, 0.9, 0.8, 0.5],
        "uniforms": torch.rand(5, generator=rng),
    }
    whole = ops.sample(logits, **parameters(5, **changes, n_logprobs=4))
    for i in range(5):
        alone = parameters(1, **{k: [v[i]] for k, v in changes.items()}, n_logprobs=4)
        for a, b in zip(ops.sample(logits[i : i + 1], **alone), whole, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_bad_rows_have_no_choice(backend, rng, temperature, bad):
    logits = torch.randn(4, 777, generator=rng)
    good = logits.clone()
    for row in (1, 3):
        if bad is None:
            logits[row] = -math.inf
        else:
            logits[row, 500 + row] = bad
    options = parameters(4, temperature=temperature, uniforms=0.4, n_logprobs=3)
    expected = ops.sample(good, **options)[0]
    expected[[1, 3]] = -1
    for op in (ops.sample, ops.sample_torch):
        assert torch.equal(op(logits, **options)[0], expected)


def test_a_row_with_everything_banned_has_no_choice(backend):
    options = parameters(2, history=[[0, 1], []], no_repeat_ngram_size=1)
    for op in (ops.sample, ops.sample_torch):
        assert op(torch.zeros(2, 2), **options)[0].tolist() == [-1, 0]


def test_rows_share_and_skip_parts_of_the_history(backend, rng):
    logits = torch.randn(3, 40, generator=rng)
    history = torch.randint(0, 40, (30,), generator=rng)
    changes = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    bounds = torch.tensor([[3, 20], [20, 20], [3, 20]])
    parts = [history[begin:end].tolist() for begin, end in bounds.tolist()]
    expected = ops.sample(logits, **parameters(3, **changes, history=parts))
    options = parameters(3, **changes) | {"history": history, "history_bounds": bounds}
    assert torch.equal(ops.sample(logits, **options)[0], expected[0])
    assert torch.equal(ops.sample_torch(logits, **options)[0], expected[0])


def test_minus_infinity_is_never_drawn(backend):
    logits = torch.full((3, 600), -math.inf)
    logits[:, 300] = 1.0
    changes = {"temperature": 1.0, "uniforms": [0.0, 0.5, 1.0]}
    for top_k, top_p in [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)]:
        ids = ops.sample(logits, **parameters(3, **changes, top_k=top_k, top_p=top_p))[0]
        assert ids.tolist() == [300] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": [-1.0, 0.0]}, "temperature: .* in row 0"),
        ({"temperature": [0.0, math.nan]}, "temperature: .* in row 1"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: "),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size: "),
        ({"uniforms": 1.5}, "uniforms: "),
        ({"n_logprobs": 11}, "n_logprobs: expected at most 10, got 11"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=f"sample: {message}"):
        ops.sample(torch.zeros(2, 10), **parameters(2, **change))


@pytest.mark.parametrize("bounds", [[[0, 1], [2, 1]], [[0, 4], [0, 0]], [[-1, 1], [2, 3]]])
def test_bad_history_bounds(bounds):
    bad = parameters(2, history=[[1, 2], [3]]) | {"history_bounds": torch.tensor(bounds)}
    with pytest.raises(ValueError, match="sample: history_bounds: expected begin <= end within 0 to 3"):
        ops.sample(torch.zeros(2, 10), **bad)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("emu", "cuda")], indirect=True)
def test_bounds_on_the_device_are_guarded(backend):
    for bounds in [[[0, 1], [2, 1]], [[0, 4], [0, 0]], [[-1, 1], [2, 3]]]:
        bad = parameters(2, history=[[1, 2], [3]], repetition_penalty=2.0)
        ids = ops.sample(torch.zeros(2, 10), **bad | {"history_bounds": torch.tensor(bounds)})[0]
        assert set(ids.tolist()) <= {0, 1, 2}
        with pytest.raises(ValueError, match="history_bounds: expected bounds inside the history"):
            ops.check_device()
    ops.check_device()


def test_empty_batch():
    ids, logprob, top, _ = ops.sample(torch.empty(0, 9), **parameters(0, n_logprobs=2))
    assert ids.shape == logprob.shape == (0,)
    assert top.shape == (0, 2)
