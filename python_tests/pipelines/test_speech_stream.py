"""Chunks of streamed speech for any arrival of tokens, and how their sound is joined."""

from __future__ import annotations

import random

import pytest
import torch
from tolerances import assert_close

from ming_rt.pipelines.speech_stream import HOP, LOOKAHEAD, OVERLAP, ChunkSchedule, SpeechJoiner, crossfade


def chunks(prompt_tokens, arrivals, **options):
    """All chunks, asked for at each of the growing numbers of tokens; the last one is known to be the end."""
    schedule, found = ChunkSchedule(prompt_tokens, **options), []
    for tokens in arrivals:
        while chunk := schedule.next(tokens, tokens == arrivals[-1]):
            found.append(chunk)
    assert schedule.finished
    assert schedule.next(arrivals[-1], True) is None
    return found


@pytest.mark.parametrize("prompt_tokens", [0, 10, 99, 100, 150, 324])
def test_chunks_do_not_depend_on_arrival(prompt_tokens):
    rng = random.Random(prompt_tokens)
    for total in (1, 52, 53, 102, 103, 170, 500):
        expected = chunks(prompt_tokens, [total])
        for _ in range(20):
            arrivals = [*sorted(rng.choices(range(total), k=5)), total]
            assert chunks(prompt_tokens, arrivals) == expected
        assert chunks(prompt_tokens, list(range(total + 1))) == expected
        *others, last = expected
        ends = [chunk.tokens - LOOKAHEAD for chunk in others]
        assert [chunk.offset for chunk in expected] == [0, *ends]
        assert all((prompt_tokens + end) % HOP == 0 for end in ends)
        assert last.is_last
        assert last.tokens == total
        assert not any(chunk.is_last for chunk in others)


def test_hurried_rest_after_a_longer_first_chunk():
    assert [c.tokens for c in chunks(10, [150])] == [93, 143, 150]
    assert [c.tokens for c in chunks(10, [150], hurried=True)] == [93, 150]
    late = ChunkSchedule(10, hurried=True)
    assert [late.next(150, False).tokens for _ in range(2)] == [93, 143]
    assert late.next(150, False) is None
    assert late.next(150, True).tokens == 150


def test_no_tokens_no_chunk():
    schedule = ChunkSchedule(10)
    assert schedule.next(0, False) is None
    assert not schedule.finished
    assert schedule.next(0, True) is None
    assert schedule.finished


def test_joined_speech(rng):
    joiner, whole = SpeechJoiner(), torch.randn(1, 30_000, generator=rng)
    starts, ends = [0, 10_000 - OVERLAP, 20_000 - OVERLAP], [10_000, 20_000, 30_000]
    made = [joiner.push(whole[:, a:b], b == ends[-1]) for a, b in zip(starts, ends, strict=True)]
    joined = torch.cat(made, dim=1)
    assert joined.shape == whole.shape
    # Both versions of the overlaps are equal here, so each is the sum of the fades times the sound.
    louder = crossfade(torch.ones(1, OVERLAP), torch.ones(1, OVERLAP))
    expected = whole.clone()
    for end in ends[:-1]:
        expected[:, end - OVERLAP : end] *= louder
    assert_close(joined, expected)


def test_a_single_chunk_is_left_alone(rng):
    speech = torch.randn(1, 100, generator=rng)
    assert torch.equal(SpeechJoiner().push(speech, True), speech)


def test_too_little_speech():
    with pytest.raises(ValueError, match="3840 samples"):
        SpeechJoiner().push(torch.zeros(1, OVERLAP - 1), False)
    with pytest.raises(ValueError, match="expected 5"):
        crossfade(torch.zeros(1, 4), torch.zeros(1, 5))
