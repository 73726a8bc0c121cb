"""Sampling parameters refuse wild values; a request keeps its own tokens, positions and random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import make_prompt

from ming_rt.errors import InvalidRequestError
from ming_rt.models.fusion import MediaEmbeds
from ming_rt.runtime.request import Request, SamplingParams

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
WRONG_TYPES = ["1", None, [], True, 1j]

BAD = [
    *(("temperature", v) for v in (-0.1, NAN, INF, -INF, 101, HUGE, *WRONG_TYPES)),
    *(("top_k", v) for v in (-1, 1.5, NAN, 1 << 31, HUGE, *WRONG_TYPES)),
    *(("top_p", v) for v in (0, -1, 1.01, NAN, INF, *WRONG_TYPES[:-2], 1j)),
    *(("repetition_penalty", v) for v in (0, -1, NAN, INF, 1e9, *WRONG_TYPES)),
    *(("no_repeat_ngram_size", v) for v in (-1, 2.0, NAN, HUGE, *WRONG_TYPES)),
    *(("seed", v) for v in (-1, 1.0, 1 << 63, HUGE, "1", [], True)),
    *(("stop", v) for v in ("", [""], ["a", 1], 5, {"a": 1}, ["x"] * 17, "x" * 257, [None])),
    *(("max_tokens", v) for v in (0, -1, 1.0, NAN, (1 << 20) + 1, HUGE, *WRONG_TYPES)),
    *(("logprobs", v) for v in (-1, 21, 1.0, NAN, HUGE, "1", [], True)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:20])
def test_wild_values_name_the_field(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name}: expected") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200


def test_good_values_are_normalised():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, stop="end", seed=(1 << 63) - 1, logprobs=0
    )
    assert params.stop == ("end",)
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    with pytest.raises(AttributeError):
        params.top_k = 5


def request(ids, limit=100, **params) -> Request:
    return Request(0, make_prompt(ids), SamplingParams(**params), limit)


def test_limit_is_the_smaller_of_max_tokens_and_capacity():
    assert request(range(10), max_tokens=5).limit == 15
    assert request(range(10), limit=12, max_tokens=5).limit == 12


def test_tokens_and_positions_grow_with_the_answer():
    r = request([3, 4, 5], max_tokens=4)
    r.plan(np.array([[0, 1, 1], [0, 1, 2], [0, 1, 3]]), delta=-1, modality=np.array([0, 1, 1]))
    assert r.remaining == 3
    for token in (7, 8):
        r.append(token)
    assert r.tokens.tolist() == [3, 4, 5, 7, 8]
    assert r.output.tolist() == [7, 8]
    assert r.positions[:, 3:].tolist() == [[2, 3, 4, 5]] * 3
    assert r.modality.tolist() == [0, 1, 1, 0, 0, 0, 0]


def test_media_slice_follows_the_rows():
    r = request(range(12))
    r.plan(np.zeros((3, 12)), 0, None, MediaEmbeds(np.array([2, 3, 7]), torch.ones(3, 2)))
    assert r.media_slice(0, 2) == slice(0, 0)
    assert r.media_slice(2, 4) == slice(0, 2)
    assert r.media_slice(3, 12) == slice(1, 3)


def test_keys_leave_the_last_token_to_be_computed():
    for length, pages in ((4, 0), (5, 1), (8, 1), (9, 2)):
        r = request(range(length))
        r.plan(np.zeros((3, length)), 0, None)
        assert len(list(r.prefix_keys(4))) == pages


@pytest.mark.parametrize("change", ["token", "position", "modality", "media", "media_row"])
def test_a_change_alters_the_key_of_its_page_and_all_after(change):
    def keys(at: int | None) -> list[bytes]:
        ids, positions, modality = np.arange(17), np.tile(np.arange(17), (3, 1)), np.zeros(17)
        rows, feats = np.array([1, 6, 14]), torch.ones(3, 2)
        if at is not None and change == "token":
            ids[at] += 1
        elif at is not None and change == "position":
            positions[2, at] += 1
        elif at is not None and change == "modality":
            modality[at] = 1
        elif at is not None and change == "media":
            feats[1, 1] = 2
        elif at is not None:
            rows[1] = at
        r = request(ids)
        r.plan(positions, 0, modality, MediaEmbeds(rows, feats))
        return list(r.prefix_keys(4))

    plain, changed = keys(None), keys(5)
    assert len(plain) == 4
    assert [a == b for a, b in zip(plain, changed, strict=True)] == [True, False, False, False]


def test_random_numbers_depend_on_the_seed_alone():
    draws = [[request([1], seed=seed).uniform() for _ in range(1)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    one, two = request([1], seed=7), request([1, 2, 3], seed=7)
    assert [one.uniform() for _ in range(5)] == [two.uniform() for _ in range(5)]
    fresh = {request([1]).uniform() for _ in range(4)}
    assert len(fresh) == 4
    assert all(0 <= u < 1 for u in fresh)
