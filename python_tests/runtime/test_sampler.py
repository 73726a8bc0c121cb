"""Token choice per request, stop strings across token boundaries, and the end of an answer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fake_model import EOS, TOKENIZER, make_prompt

from ming_rt.errors import EngineError
from ming_rt.pipelines.events import TokenLogprob
from ming_rt.runtime.request import Request, SamplingParams
from ming_rt.runtime.sampler import Answer, Sample, StopFilter, sample


def request(ids=(1, 2, 3), **params) -> Request:
    return Request(0, make_prompt(ids), SamplingParams(**params), 100)


def logits_rows(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 97)).astype(np.float32) * 3)


def test_greedy_takes_the_best():
    logits = logits_rows(4)
    assert [s.token for s in sample(logits, [request()] * 4)] == logits.argmax(-1).tolist()


CASES = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 4},
    {"temperature": 1.3, "top_p": 0.6, "seed": 5},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 9, "logprobs": 3},
]


def test_a_row_does_not_see_its_neighbours():
    logits = logits_rows(len(CASES))
    alone = [sample(logits[i : i + 1], [request(**c)])[0] for i, c in enumerate(CASES)]
    assert sample(logits, [request(**c) for c in CASES]) == alone
    back = [*range(len(CASES))][::-1]
    assert sample(logits[back], [request(**CASES[i]) for i in back]) == alone[::-1]


def test_seeded_draws_repeat_and_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(1, 1)
    r = request(temperature=1.0, seed=11)
    drawn = [sample(logits, [r])[0].token for _ in range(2000)]
    again = request(temperature=1.0, seed=11)
    assert drawn[:50] == [sample(logits, [again])[0].token for _ in range(50)]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.04


def test_ngram_and_penalty_read_prompt_and_answer():
    logits = torch.zeros(1, 97)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    r = request((4, 5, 9, 9), no_repeat_ngram_size=2)
    r.append(4)  # "4 5" is in the prompt, so after another 4 the 5 is forbidden
    assert sample(logits, [r])[0].token == 6
    assert sample(logits, [request((5,), repetition_penalty=2.0)])[0].token == 6


def test_a_row_without_a_token_fails_alone():
    logits = logits_rows(3)
    logits[1] = float("nan")
    requests = [request(temperature=1.0, seed=i) for i in range(3)]
    first, bad, last = sample(logits, requests)
    assert isinstance(bad, EngineError)
    assert [first] == sample(logits[:1], [request(temperature=1.0, seed=0)])
    assert [last] == sample(logits[2:], [request(temperature=1.0, seed=2)])
    everything = request(range(97), no_repeat_ngram_size=1)
    (bad,) = sample(logits[:1], [everything])
    assert isinstance(bad, EngineError)


@pytest.mark.parametrize("wanted", [None, 0, 1, 5])
def test_logprobs_are_given_as_asked(wanted):
    logits = logits_rows(2)
    chosen = sample(logits, [request(logprobs=wanted), request(logprobs=20)])[0]
    if wanted is None:
        assert chosen.logprob is None
        return
    expected = torch.log_softmax(logits[0], -1)
    assert chosen.logprob.token_id == chosen.token
    assert chosen.logprob.logprob == pytest.approx(float(expected[chosen.token]), abs=1e-5)
    best = expected.topk(max(wanted, 1)).indices.tolist()[:wanted]
    assert [i for i, _ in chosen.logprob.top] == best


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "stopped"),
    [
        ((), ["ab", "c"], ["ab", "c"], False),
        (("END",), ["one E", "N", "D two"], ["one ", "", ""], True),
        (("END",), ["one E", "Nx"], ["one ", "ENx"], False),
        (("END",), ["END"], [""], True),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (("\n\n", "###"), ["x\n", "y##", "\n\nz"], ["x", "\ny", "##"], True),
        (("abcd", "b"), ["a", "b"], ["", "a"], True),
        (("好的",), ["说好", "的吧"], ["说", ""], True),
    ],
)
def test_stop_filter(stops, pieces, emitted, stopped):
    stop = StopFilter(stops)
    assert [stop.push(piece) for piece in pieces] == emitted
    assert stop.stopped is stopped
    if stopped:
        assert (stop.push("more"), stop.flush()) == ("", "")


@pytest.mark.parametrize("seed", range(30))
def test_stop_filter_never_emits_part_of_a_stop_string(seed):
    rnd = random.Random(seed)
    text = "".join(rnd.choice("ab ") for _ in range(60))
    stops = ["".join(rnd.choice("ab ") for _ in range(rnd.randint(1, 5))) for _ in range(rnd.randint(1, 3))]
    cuts = sorted(rnd.sample(range(61), 12))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 60], strict=True)]
    stop, seen = StopFilter(stops), ""
    for piece in pieces:
        seen += stop.push(piece)
        assert not any(s in seen for s in stops)
    seen += stop.flush()
    assert text.startswith(seen)
    if stop.stopped:
        assert any(text[len(seen) :].startswith(s) for s in stops)
    else:
        assert seen == text


def answer(stops=()) -> Answer:
    return Answer(TOKENIZER.stream(), stops, {EOS})


def push_all(a: Answer, tokens, last: bool = True):
    texts, reason = [], None
    for i, token in enumerate(tokens):
        delta, reason = a.push(Sample(token, TokenLogprob(token, -0.5)), last and i == len(tokens) - 1)
        texts.append(delta)
    return texts, reason


def test_answer_holds_back_half_a_character_and_its_tokens():
    deltas, reason = push_all(answer(), [0, 80, 81, 82, 83, 1], last=False)
    assert [d and d.text for d in deltas] == ["a", None, None, None, "🐟", "b"]
    assert deltas[4].token_ids == (80, 81, 82, 83)
    assert len(deltas[4].logprobs) == 4
    assert reason is None


@pytest.mark.parametrize(
    ("tokens", "stops", "text", "reason"),
    [
        ([0, 1, EOS], (), "ab", "stop"),
        ([EOS], (), "", "stop"),
        ([0, 1], (), "ab", "length"),
        ([0, 80, 81], (), "a\ufffd", "length"),
        ([0, 80, EOS], (), "a\ufffd", "stop"),
        ([0, 1], ("bc",), "ab", "length"),
        ([0, 1, EOS], ("bc",), "ab", "stop"),
        ([0, 1, 2], ("bc",), "a", "stop"),
        ([0, 80], ("\ufffd",), "a", "stop"),
        ([0, 200, 1], (), "ab", "length"),
    ],
)
def test_end_of_an_answer(tokens, stops, text, reason):
    a = answer(stops)
    deltas, verdict = push_all(a, tokens)
    assert a.text == text == "".join(d.text for d in deltas if d)
    assert verdict == reason
    assert len(a.logprobs) == len(tokens)
