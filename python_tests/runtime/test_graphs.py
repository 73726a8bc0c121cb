"""Recorded decode steps against steps from the host: the same tokens, whatever is launched when."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from fake_model import VOCAB, FakeModel, make_prompt, plan

from ming_rt.errors import EngineError
from ming_rt.models.thinker import Thinker
from ming_rt.runtime.batch import pack_batch
from ming_rt.runtime.graphs import BUCKETS, CudaCapture, DecodeGraphs, run_directly
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.request import Request, SamplingParams
from ming_rt.runtime.sampler import sample
from ming_rt.runtime.scheduler import Chunk
from ming_rt.runtime.weights import RandomSource
from ming_rt.runtime.worker import device_stream

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from tiny import FAMILIES, tiny_config

CPU = torch.device("cpu")
PAGE, MAX_LEN = 4, 64
SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"temperature": 1.2, "repetition_penalty": 0.7, "no_repeat_ngram_size": 3},
]


class Bench:
    """A thinker, its cache and some requests, moved on step by step."""

    def __init__(
        self, thinker, config, count: int, settings=SETTINGS, capture=run_directly, device=CPU
    ) -> None:
        pages = MAX_LEN // PAGE
        sizes = config.num_hidden_layers, count * pages, PAGE, config.num_key_value_heads, config.head_dim
        self.kv, self.device = KVCache(*sizes, torch.float32, device), device
        for cache in (*self.kv.k, *self.kv.v):
            cache.fill_(float("nan"))
        self.thinker = thinker
        self.graphs = DecodeGraphs(thinker, self.kv, count, MAX_LEN, device, capture)
        self.order = np.random.default_rng(count).permutation(count * pages).tolist()
        self.requests = []
        for i in range(count):
            prompt = make_prompt(np.random.default_rng(i).integers(0, 80, 2 + i % 9))
            request = Request(i, prompt, SamplingParams(seed=i, **settings[i % len(settings)]), MAX_LEN)
            made = plan(prompt)
            request.plan(made.positions, made.delta, None)
            self.requests.append(request)
        self.eager(self.requests)

    def chunks(self, requests) -> list[Chunk]:
        """The next step of ``requests``, with pages scattered over the cache and given when needed."""
        for r in requests:
            while len(r.pages) * PAGE < r.num_tokens:
                r.pages.append(self.order.pop())
        return [Chunk(r, r.num_computed, r.num_tokens) for r in requests]

    def keep(self, chunks, results) -> None:
        for chunk, result in zip(chunks, results, strict=True):
            chunk.request.num_computed = chunk.stop
            chunk.request.append(result.token)

    def eager(self, requests) -> None:
        chunks = self.chunks(requests)
        output = self.thinker.forward(pack_batch(chunks, PAGE, self.device), self.kv)
        self.keep(chunks, sample(output.logits, requests))

    def decode(self, requests) -> None:
        chunks = self.chunks(requests)
        assert self.graphs.fits(chunks)
        self.keep(chunks, self.graphs.launch(chunks)())

    def tokens(self) -> list[list[int]]:
        return [r.output.tolist() for r in self.requests]


def fake(count: int, **options) -> Bench:
    model = FakeModel()
    return Bench(model.thinker, model.config.thinker, count, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 32])
def test_equals_the_steps_from_the_host(count):
    ours, expected = fake(count), fake(count)
    for _ in range(20):
        ours.decode(ours.requests)
        expected.eager(expected.requests)
    assert ours.tokens() == expected.tokens()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_steps_from_the_host_bit_for_bit(family):
    """The cache holds the same bits: padding rows write nothing, and no row sees them."""
    config = tiny_config(family)
    thinker = Thinker(config, RandomSource(0, torch.float32))
    ours, expected = Bench(thinker, config, 5), Bench(thinker, config, 5)
    for _ in range(6):
        ours.decode(ours.requests)
        expected.eager(expected.requests)
    assert ours.tokens() == expected.tokens()
    for a, b in zip((*ours.kv.k, *ours.kv.v), (*expected.kv.k, *expected.kv.v), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("device", [b for b in BACKENDS if b in ("emu", "cuda")], indirect=True)
@pytest.mark.parametrize("family", ["v1.5", "flash"])
def test_equals_the_steps_from_the_host_on_a_device(device, family):
    config = tiny_config(family, num_hidden_layers=2)
    with torch.inference_mode(), device_stream(device):
        thinker = Thinker(config, RandomSource(0, torch.float32, device=device.torch))
        capture = CudaCapture() if device.kind == "cuda" else run_directly
        ours = Bench(thinker, config, 3, capture=capture, device=device.torch)
        expected = Bench(thinker, config, 3, device=device.torch)
        for _ in range(3):
            ours.decode(ours.requests)
            expected.eager(expected.requests)
        assert ours.tokens() == expected.tokens()
        for a, b in zip((*ours.kv.k, *ours.kv.v), (*expected.kv.k, *expected.kv.v), strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_requests_may_come_go_and_be_computed_elsewhere():
    ours, expected = fake(9), fake(9)
    rng, chosen = np.random.default_rng(0), []
    for step in range(60):
        if step % 3 == 0:
            chosen = sorted(rng.choice(9, rng.integers(1, 10), replace=False))
        if step % 10 == 9:
            ours.graphs.forget()
            ours.eager([ours.requests[i] for i in chosen])
        else:
            ours.decode([ours.requests[i] for i in chosen])
        expected.eager([expected.requests[i] for i in chosen])
    assert ours.tokens() == expected.tokens()


def test_a_step_may_be_launched_before_the_last_one_is_read():
    ours, expected = fake(6), fake(6)
    for _ in range(10):
        first = ours.chunks(ours.requests)
        for r in ours.requests:  # pages of the step ahead
            while len(r.pages) * PAGE < r.num_tokens + 1:
                r.pages.append(ours.order.pop())
        second = [Chunk(c.request, c.stop, c.stop + 1) for c in first]
        reads = [ours.graphs.launch(first), ours.graphs.launch(second)]
        for chunks, read in zip((first, second), reads, strict=True):
            ours.keep(chunks, read())
        expected.eager(expected.requests)
        expected.eager(expected.requests)
    assert ours.tokens() == expected.tokens()


def test_only_what_changed_is_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(
        DecodeGraphs, "_send", lambda self, n, send=DecodeGraphs._send: (sent.append(n), send(self, n))
    )
    greedy, drawing = fake(1, settings=[{}]), fake(1, settings=[{"temperature": 1.0}])
    for bench in (greedy, drawing):
        bench.requests[0].pages.append(bench.order.pop())  # room for what follows
        for _ in range(3):
            bench.decode(bench.requests)
    whole, table, uniforms = (greedy.graphs._layout.end(n) for n in ("slots", "page_table", "uniforms"))
    assert sent[0] == sent[1] > whole > table > uniforms
    assert sent[2:] == [uniforms, uniforms]
    sent.clear()
    request = greedy.requests[0]
    while request.num_tokens < 13:
        greedy.decode(greedy.requests)
    assert sent == [table]


def test_a_step_that_cannot_be_recorded_runs_directly():
    tries = []

    def capture(step):
        tries.append(step)
        raise RuntimeError("no room for a graph")

    bench, expected = fake(2, capture=capture), fake(2)
    with pytest.warns(UserWarning, match="2 rows run without a graph: no room for a graph"):
        bench.decode(bench.requests)
    bench.decode(bench.requests)
    for _ in range(2):
        expected.eager(expected.requests)
    assert len(tries) == 1
    assert bench.tokens() == expected.tokens()


def test_each_bucket_is_captured_once_and_may_be_run_for_that():
    captured = []

    def capture(step):
        captured.append(step)
        for cache in (*bench.kv.k, *bench.kv.v):
            cache.nan_to_num_()
        before = [cache.clone() for cache in (*bench.kv.k, *bench.kv.v)]
        step()
        step()
        assert all(map(torch.equal, before, (*bench.kv.k, *bench.kv.v)))
        return step

    bench, expected = fake(5, capture=capture), fake(5)
    for count in (1, 2, 3, 4, 5, 3, 1):
        for _ in range(2):
            bench.decode(bench.requests[:count])
            expected.eager(expected.requests[:count])
    assert len(captured) == 4
    assert bench.tokens() == expected.tokens()


def test_a_failed_launch_leaves_nothing_behind():
    ours, expected = fake(3), fake(3)
    ours.decode(ours.requests)

    def fail(batch) -> None:
        raise RuntimeError("refused")

    ours.thinker.before_step = fail
    chunks = ours.chunks(ours.requests[:1])
    with pytest.raises(RuntimeError, match="refused"):
        ours.graphs.launch(chunks)
    ours.thinker.before_step = None
    for _ in range(3):
        ours.decode(ours.requests[1:])
    for _ in range(4):
        expected.eager(expected.requests)
    assert ours.tokens()[1:] == expected.tokens()[1:]


def test_a_row_without_a_token_is_an_error_of_its_own():
    bench = fake(3, settings=[{}])
    forward = bench.thinker.forward

    def poisoned(batch, kv):
        output = forward(batch, kv)
        output.logits[1] = float("nan")
        return output

    bench.thinker.forward = poisoned
    first, bad, last = bench.graphs.launch(bench.chunks(bench.requests))()
    assert isinstance(bad, EngineError)
    assert 0 <= first.token < VOCAB
    assert 0 <= last.token < VOCAB


@pytest.mark.parametrize(
    ("begin", "end", "change", "fits"),
    [
        (5, 6, {}, True),
        (5, 6, {"temperature": 1.0, "no_repeat_ngram_size": 3}, True),
        (5, 6, {"logprobs": 0}, False),
        (4, 5, {}, False),  # a token of the prompt
        (4, 6, {}, False),
        (3, 4, {}, False),
    ],
)
def test_which_steps_fit(begin, end, change, fits):
    request = Request(0, make_prompt(range(5)), SamplingParams(**change), MAX_LEN)
    request.append(7)
    bench = fake(2)
    assert bench.graphs.fits([Chunk(request, begin, end)]) is fits
    generated = Chunk(bench.requests[0], bench.requests[0].num_computed, bench.requests[0].num_tokens)
    assert bench.graphs.fits([generated, Chunk(request, begin, end)]) is fits
    assert not bench.graphs.fits([generated] * 3)
    request.append(8)
    assert not bench.graphs.fits([Chunk(request, 5, 6)]), "its token is known"


def test_more_requests_than_the_largest_bucket_do_not_fit():
    bench = fake(BUCKETS[-1] + 1, settings=[{}])
    chunks = bench.chunks(bench.requests)
    assert not bench.graphs.fits(chunks)
    assert bench.graphs.fits(chunks[1:])
