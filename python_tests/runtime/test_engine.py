"""The engine over a model whose every token depends on the exact cache contents.

Every test runs twice: with the steps of the CPU, and with those of a GPU (recorded decode steps, launched
ahead), for which the CPU's kernels stand in.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_model import (
    DELTA,
    EOS,
    HIDDEN,
    PATCH,
    VOCAB,
    FakeModel,
    check_all_free,
    features,
    make_engine,
    make_prompt,
    reference,
)

from ming_rt.errors import CapacityError, EngineClosedError, EngineError, InvalidRequestError
from ming_rt.pipelines.events import Done, TextDelta
from ming_rt.runtime.device import Device
from ming_rt.runtime.engine import EngineOptions
from ming_rt.runtime.request import SamplingParams


@pytest.fixture(autouse=True, params=["cpu", "emu"])
def device(request, monkeypatch) -> str:
    """The kind of device that every engine of the test is for."""
    monkeypatch.setitem(make_engine.__kwdefaults__, "device", Device(request.param))
    return request.param


def text_prompt(seed: int, length: int):
    return make_prompt(np.random.default_rng(seed).integers(0, 80, length))


def media_prompt(seed: int, before: int = 5, patches: int = 6, after: int = 4):
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((patches, 4))
    return make_prompt(
        [*rng.integers(0, 80, before), *[PATCH] * patches, *rng.integers(0, 80, after)], pixels
    )


def mixed_prompts(count: int) -> list:
    return [media_prompt(i, after=1 + i) if i % 3 == 1 else text_prompt(i, 1 + 5 * i) for i in range(count)]


def greedy(max_tokens: int = 12, **params) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **params)


class Gate:
    """Holds the model before its steps, so that a test knows where the engine is."""

    def __init__(self, model: FakeModel) -> None:
        self.steps = 0
        self.reached, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.open = False
        model.thinker.before_step = self

    def __call__(self, batch) -> None:
        self.steps += 1
        if not self.open:
            self.reached.release()
            assert self.allowed.acquire(timeout=20)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=20)

    def release(self, all_steps: bool = True) -> None:
        self.open = all_steps
        self.allowed.release()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 3, "max_num_seqs": 3},
        {"page_size": 1, "num_pages": 256},
        {"page_size": 64, "num_pages": 8},
        {"num_pages": 17},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_batch_chunks_or_pages(options):
    prompts = mixed_prompts(10)
    expected = [reference(p, 12) for p in prompts]
    with make_engine(**options) as engine:
        handles = [engine.submit(p, greedy()) for p in prompts]
        results = [h.result() for h in handles]
        assert [list(r.token_ids) for r in results] == expected
        alone = [list(engine.submit(p, greedy()).result().token_ids) for p in prompts]
        assert alone == expected
        check_all_free(engine)


def test_prefix_hit_equals_cold_run():
    prompt = media_prompt(3, before=9, patches=11, after=14)
    with make_engine() as engine:
        cold = engine.submit(prompt, greedy()).result()
        hit = engine.submit(prompt, greedy()).result()
        assert cold.usage.cached_tokens == 0
        assert hit.usage.cached_tokens == 32
        assert hit.token_ids == cold.token_ids == tuple(reference(prompt, 12))
        assert engine.stats().prefix_hit_tokens == 32
        # The next turn of the conversation reuses the answer too.
        turn = make_prompt([*prompt.input_ids, *hit.token_ids, 1, 2], prompt.pixel_values)
        engine._worker.model.plan = lambda p: _continued(p, len(prompt.input_ids))
        later = engine.submit(turn, greedy(2)).result()
        assert later.usage.cached_tokens > 40


def _continued(prompt, first: int):
    """Positions of a turn that goes on where generated tokens were."""
    from fake_model import plan

    result = plan(prompt)
    result.positions[:, first:] = np.arange(first, len(prompt.input_ids)) + DELTA
    return result


def test_other_media_behind_equal_tokens_do_not_hit():
    a, b = media_prompt(3, before=8, patches=8, after=8), media_prompt(3, before=8, patches=8, after=8)
    b = make_prompt(b.input_ids, b.pixel_values + 1)
    with make_engine() as engine:
        engine.submit(a, greedy()).result()
        other = engine.submit(b, greedy()).result()
        assert other.usage.cached_tokens == 8
        assert list(other.token_ids) == reference(b, 12)


def test_preemption_keeps_tokens_and_streams():
    prompts = [text_prompt(i, 14) for i in range(4)]
    with make_engine(num_pages=14) as engine:
        handles = [engine.submit(p, greedy(30)) for p in prompts]
        for handle, prompt in zip(handles, prompts, strict=True):
            events = list(handle)
            assert list(events[-1].token_ids) == reference(prompt, 30)
            assert "".join(e.text for e in events[:-1]) == events[-1].text
        assert engine.stats().preemptions > 0
        check_all_free(engine)


def test_media_are_encoded_once_and_on_the_engine_thread():
    model = FakeModel()
    with make_engine(model) as engine:
        for after in (3, 5):
            prompt = media_prompt(1, after=after)
            assert list(engine.submit(prompt, greedy()).result().token_ids) == reference(prompt, 12)
        assert model.encoded == 1
        assert engine.stats().media_cache_hits == 1
        assert model.threads == {"ming-rt-engine"}
    with make_engine(model, media_cache_bytes=0) as engine:
        engine.submit(media_prompt(1), greedy()).result()
        engine.submit(media_prompt(1), greedy()).result()
        assert model.encoded == 3


def test_running_requests_go_on_between_two_encodings():
    model = FakeModel()
    gate = Gate(model)
    encoded = []
    model.thinker.before_step = lambda batch: (encoded.append(model.encoded), gate(batch))
    with make_engine(model) as engine:
        decoding = engine.submit(text_prompt(1, 5), greedy(20))
        gate.wait()
        others = [engine.submit(media_prompt(i), greedy(2)) for i in range(4)]
        gate.release()
        assert all(h.result() for h in (decoding, *others))
    assert encoded[:5] == [0, 1, 2, 3, 4]


def test_events_add_up():
    with make_engine() as engine:
        events = list(engine.submit(text_prompt(5, 20), greedy(40, logprobs=2)))
    *deltas, done = events
    assert isinstance(done, Done)
    assert all(isinstance(d, TextDelta) and d.text for d in deltas)
    assert "".join(d.text for d in deltas) == done.text
    sent = [t for d in deltas for t in d.token_ids]
    assert sent == list(done.token_ids)[: len(sent)]
    assert [r.token_id for r in done.logprobs] == list(done.token_ids)
    assert all(len(r.top) == 2 for r in done.logprobs)
    assert done.usage.prompt_tokens == 20
    assert done.usage.completion_tokens == len(done.token_ids)
    t = done.timings
    assert 0 <= t.queued <= t.ttft <= t.total
    assert t.encode >= 0
    assert t.decode_tokens_per_second > 0


def test_finish_reasons():
    with make_engine() as engine:
        seeds = [s for s in range(200) if EOS in reference(text_prompt(s, 6), 8)[1:]]
        ended = engine.submit(text_prompt(seeds[0], 6), greedy(8)).result()
        assert (ended.finish_reason, ended.token_ids[-1]) == ("stop", EOS)
        long = engine.submit(text_prompt(1, 6), greedy(3)).result()
        assert (long.finish_reason, len(long.token_ids)) == ("length", 3)
        stop = long.text[1:]
        stopped = engine.submit(text_prompt(1, 6), greedy(9, stop=[stop])).result()
        assert (stopped.finish_reason, stopped.text) == ("stop", long.text[:1])
        assert dict(engine.stats().finished) == {"stop": 2, "length": 1}


def test_answer_ends_where_the_cache_ends():
    with make_engine(num_pages=6) as engine:
        done = engine.submit(text_prompt(1, 20), greedy(100)).result()
        assert done.finish_reason == "length"
        assert done.usage.total_tokens == 24
    with make_engine(max_model_len=10) as engine:
        assert engine.submit(text_prompt(1, 8), greedy(100)).result().usage.total_tokens == 10


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([], InvalidRequestError, "at least one token"),
        ([-1], InvalidRequestError, "ids from 0 to 96, got -1"),
        ([VOCAB], InvalidRequestError, "ids from 0 to 96, got 97"),
        ([[1, 2]], InvalidRequestError, "expected a list of integers"),
        ([1] * 256, CapacityError, "256 tokens; expected fewer than 256"),
    ],
)
def test_impossible_prompts_are_refused_at_once(ids, error, match):
    with make_engine() as engine, pytest.raises(error, match=match):
        engine.submit(make_prompt(ids))


def test_float_ids_and_foreign_params_are_refused():
    with make_engine() as engine:
        prompt = SimpleNamespace(input_ids=np.array([1.0]))
        with pytest.raises(InvalidRequestError, match="integers"):
            engine.submit(prompt)
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            engine.submit(text_prompt(1, 2), {"temperature": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pages", 0),
        ("page_size", -1),
        ("max_num_seqs", 1.5),
        ("max_num_batched_tokens", 2),
        ("max_model_len", True),
    ],
)
def test_engine_sizes_are_checked(field, value):
    with pytest.raises(InvalidRequestError, match=f"^{field}: expected"):
        EngineOptions(**{field: value})


def test_seeds_reproduce_alone_and_in_a_batch():
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=s, max_tokens=15) for s in (1, 2, 1)]
    prompt = text_prompt(9, 10)
    with make_engine() as engine:
        alone = [engine.submit(prompt, p).result().token_ids for p in params]
        handles = [engine.submit(text_prompt(i, 7), greedy()) for i in range(3)]
        together = [h.result().token_ids for h in [engine.submit(prompt, p) for p in params]]
        assert all(h.result() for h in handles)
    assert alone == together
    assert alone[0] == alone[2] != alone[1]


def test_hidden_states_of_all_prompt_tokens():
    prompt = media_prompt(2, before=20, patches=9, after=20)
    with make_engine(max_num_batched_tokens=8, num_pages=30) as engine:
        others = [engine.submit(text_prompt(i, 12), greedy(20)) for i in range(3)]
        engine.submit(prompt, greedy()).result()
        done = engine.submit(prompt, greedy(), return_hidden=True).result()
        assert done.usage.cached_tokens == 0
        assert list(done.token_ids) == reference(prompt, 12)
        assert all(h.result().hidden is None for h in others)
    with make_engine(max_num_batched_tokens=64) as engine:
        whole = engine.submit(prompt, greedy(1), return_hidden=True).result()
    assert done.hidden.input.shape == done.hidden.last.shape == (49, HIDDEN)
    assert torch.equal(done.hidden.input, whole.hidden.input)
    assert torch.equal(done.hidden.last, whole.hidden.last)
    assert torch.equal(done.hidden.input[:, 0], torch.from_numpy(prompt.input_ids).float())
    assert torch.equal(done.hidden.input[20:29, 5], features(prompt).feats[:, 0])
    assert not done.hidden.input.is_inference()


@pytest.mark.parametrize("stage", ["waiting", "prefill", "decode"])
def test_cancel_at_every_stage(stage):
    model = FakeModel()
    gate = Gate(model)
    with make_engine(model, max_num_seqs=2, max_num_batched_tokens=8) as engine:
        other = engine.submit(text_prompt(1, 5), greedy(30))
        gate.wait()
        if stage == "waiting":
            blocker = engine.submit(text_prompt(4, 5), greedy(1))
        target = engine.submit(text_prompt(2, 30 if stage == "prefill" else 4), greedy(30))
        for _ in range({"waiting": 0, "prefill": 2, "decode": 4}[stage]):
            gate.release(all_steps=False)
            gate.wait()
        target.cancel()
        gate.release()
        done = target.result()
        assert done.finish_reason == "cancelled"
        assert list(done.token_ids) == reference(text_prompt(2, 4), 30)[: len(done.token_ids)]
        assert (len(done.token_ids) > 0) == (stage == "decode")
        if stage == "waiting":
            blocker.result()
        assert list(other.result().token_ids) == reference(text_prompt(1, 5), 30)
        target.cancel()
        assert target.result() is done
        check_all_free(engine)


def test_cancel_sends_the_text_that_was_held_back(device):
    model = FakeModel()
    with make_engine(model) as engine:
        text = engine.submit(text_prompt(1, 5), greedy(3)).result().text
        gate = Gate(model)
        handle = engine.submit(text_prompt(1, 5), greedy(30, stop=text[-1] + "#"))
        gate.wait()
        for _ in range(2 if device == "cpu" else 3):  # a step launched ahead has not been read
            gate.release(all_steps=False)
            gate.wait()
        handle.cancel()
        gate.release()
        *deltas, done = handle
    assert len(done.token_ids) == 3
    assert "".join(d.text for d in deltas) == done.text == text


@pytest.mark.parametrize("how", ["drop", "break", "with", "async_break"])
def test_a_reader_that_goes_away_frees_its_pages(how):
    def read() -> None:
        if how == "drop":
            engine.submit(text_prompt(1, 9), greedy(200))
        elif how == "break":
            for _ in engine.submit(text_prompt(1, 9), greedy(200)):
                break
        elif how == "with":
            with engine.submit(text_prompt(1, 9), greedy(200)) as stream:
                next(stream)
        else:

            async def first() -> None:
                async for _ in engine.submit(text_prompt(1, 9), greedy(200)):
                    break

            asyncio.run(first())

    model = FakeModel()
    model.thinker.before_step = lambda batch: time.sleep(0.002)
    with make_engine(model) as engine:
        read()
        gc.collect()
        wait_until(lambda: engine.stats().finished.get("cancelled") == 1)
        check_all_free(engine)


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "condition did not come true"
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(4))
def test_cancel_storm_leaks_nothing(seed):
    rnd = random.Random(seed)
    prompts = mixed_prompts(12)
    expected = [reference(p, 10) for p in prompts]
    with make_engine(num_pages=rnd.randint(24, 40), max_num_batched_tokens=16) as engine:
        handles = []
        for _ in range(60):
            index = rnd.randrange(len(prompts))
            handle = engine.submit(prompts[index], greedy(10))
            cancel = rnd.random() < 0.6
            if cancel and rnd.random() < 0.5:
                next(handle)
            if cancel:
                handle.cancel()
            handles.append((index, cancel, handle))
            if rnd.random() < 0.2:
                time.sleep(0.001)
        for index, cancel, handle in handles:
            done = handle.result()
            assert cancel or list(done.token_ids) == expected[index]
            assert list(done.token_ids) == expected[index][: len(done.token_ids)]
        wait_until(lambda: engine.stats().running == 0)
        assert sum(engine.stats().finished.values()) == 60
        check_all_free(engine)


def test_a_slow_reader_stalls_nobody():
    with make_engine() as engine:
        slow = engine.submit(text_prompt(1, 5), greedy(100))
        for i in range(5):
            assert engine.submit(text_prompt(i, 8), greedy(20)).result()
        wait_until(lambda: engine.stats().running == 0)
        assert list(slow.result().token_ids) == reference(text_prompt(1, 5), 100)


def test_a_bad_prompt_fails_alone():
    model = FakeModel()
    nan = media_prompt(1)
    nan.pixel_values[0, 0] = float("nan")
    real_plan = model.plan

    def plan(prompt):
        if len(prompt.input_ids) == 13:
            raise KeyError("broken")
        if len(prompt.input_ids) == 14:
            raise InvalidRequestError("grids and placeholders differ")
        return real_plan(prompt)

    model.plan = plan
    with make_engine(model) as engine:
        good = engine.submit(text_prompt(1, 5), greedy(30))
        for prompt, error, match in (
            (nan, InvalidRequestError, "finite features"),
            (text_prompt(1, 13), EngineError, "preparing the prompt failed: KeyError"),
            (text_prompt(1, 14), InvalidRequestError, "^grids and placeholders differ$"),
        ):
            bad = engine.submit(prompt)
            with pytest.raises(error, match=match):
                list(bad)
            with pytest.raises(error, match=match):
                bad.result()
            assert list(bad) == []
        assert list(good.result().token_ids) == reference(text_prompt(1, 5), 30)
        assert engine.stats().finished["error"] == 3
        check_all_free(engine)


EXPLOSIVE = [94] * 8


def explode(batch) -> None:
    """Fails a step that prefills ``EXPLOSIVE``."""
    if (batch.input_ids == 94).sum() >= 8:
        raise RuntimeError("kernel refused")


def test_a_failed_step_fails_its_batch_and_nothing_else():
    model = FakeModel()
    model.thinker.before_step = explode
    with make_engine(model) as engine:
        engine.submit(text_prompt(7, 9), greedy()).result()
        bad = engine.submit(make_prompt([1, *EXPLOSIVE]), greedy())
        with pytest.raises(EngineError, match="the model step failed: RuntimeError: kernel refused"):
            bad.result()
        assert list(engine.submit(text_prompt(7, 9), greedy()).result().token_ids) == reference(
            text_prompt(7, 9), 12
        )
        check_all_free(engine)


def test_logits_that_are_no_numbers_fail_their_request_only():
    model = FakeModel()
    forward = model.thinker.forward

    def poisoned(batch, kv):
        output = forward(batch, kv)
        last = batch.input_ids[batch.logit_rows]
        output.logits[last == 79] = float("nan")
        return output

    model.thinker.forward = poisoned
    with make_engine(model) as engine:
        good = engine.submit(text_prompt(1, 5), greedy(30))
        with pytest.raises(EngineError, match="choosing the next token failed"):
            engine.submit(make_prompt([1, 79]), greedy()).result()
        assert good.result()
        check_all_free(engine)


def test_close_answers_everyone():
    model = FakeModel()
    gate = Gate(model)
    engine = make_engine(model, max_num_seqs=1)
    handles = [engine.submit(text_prompt(i, 5), greedy(50)) for i in range(3)]
    gate.wait()
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.release()
    closer.join(20)
    assert not closer.is_alive()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result()
    with pytest.raises(EngineClosedError):
        engine.submit(text_prompt(1, 3))
    engine.close()
    check_all_free(engine)


def test_an_unused_engine_starts_no_thread():
    before = threading.active_count()
    engine = make_engine()
    assert threading.active_count() == before
    assert engine.stats().running == 0
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(text_prompt(1, 3))


def test_a_dropped_engine_ends_its_thread_after_the_last_handle():
    engine = make_engine()
    thread_of = engine._worker
    gone = weakref.ref(engine)
    handle = engine.submit(text_prompt(1, 5), greedy())
    del engine
    assert list(handle.result().token_ids) == reference(text_prompt(1, 5), 12)
    del handle
    gc.collect()
    assert gone() is None
    wait_until(lambda: not thread_of.thread.is_alive())


def test_async_readers_share_a_loop():
    prompts = mixed_prompts(6)

    async def read(engine, prompt) -> list[int]:
        tokens: list[int] = []
        async for event in engine.submit(prompt, greedy()):
            if isinstance(event, Done):
                assert list(event.token_ids)[: len(tokens)] == tokens
                return list(event.token_ids)
            tokens += event.token_ids
        raise AssertionError("no Done")

    async def main(engine) -> None:
        answers = await asyncio.gather(*(read(engine, p) for p in prompts))
        assert answers == [reference(p, 12) for p in prompts]
        done = await engine.submit(prompts[0], greedy()).aresult()
        assert list(done.token_ids) == answers[0]
        with pytest.raises(EngineError, match="kernel refused"):
            await read(engine, make_prompt(EXPLOSIVE))

    model = FakeModel()
    model.thinker.before_step = explode
    with make_engine(model) as engine:
        asyncio.run(main(engine))
        check_all_free(engine)


@pytest.mark.parametrize("face", ["iterate", "aresult"])
def test_cancelling_the_waiting_task_cancels_the_request(face):
    model = FakeModel()
    model.thinker.before_step = lambda batch: time.sleep(0.002)

    async def main(engine) -> None:
        handle = engine.submit(text_prompt(1, 5), greedy(200))

        async def consume() -> None:
            if face == "aresult":
                await handle.aresult()
            else:
                async for _ in handle:
                    pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with make_engine(model) as engine:
        asyncio.run(main(engine))
        wait_until(lambda: engine.stats().finished.get("cancelled") == 1)
        check_all_free(engine)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(seed):
    """Any mix of prompts, arrivals, cancellations, sampling and hidden states changes no one's answer."""
    rnd = random.Random(seed)
    prompts = mixed_prompts(8)
    sizes = {
        "page_size": rnd.choice([1, 2, 4, 8]),
        "max_num_seqs": rnd.randint(1, 6),
        "max_num_batched_tokens": rnd.randint(6, 48),
    }
    sizes["num_pages"] = rnd.randint(64, 140) // sizes["page_size"]
    jobs = []
    for _ in range(30):
        sampled = rnd.random() < 0.3
        params = SamplingParams(
            temperature=0.8 if sampled else 0.0,
            seed=rnd.randrange(5) if sampled else None,
            repetition_penalty=rnd.choice([1.0, 1.0, 1.3]),
            no_repeat_ngram_size=rnd.choice([0, 0, 2]),
            max_tokens=rnd.randint(1, 16),
        )
        jobs.append((rnd.choice(prompts), params, rnd.random() < 0.2))
    with make_engine() as engine:
        expected = [engine.submit(p, params).result().token_ids for p, params, _ in jobs]
    with make_engine(**sizes) as engine:
        handles = []
        for prompt, params, hidden in jobs:
            handles.append(engine.submit(prompt, params, return_hidden=hidden))
            if rnd.random() < 0.1:
                handles[-1].cancel()
            if rnd.random() < 0.3:
                time.sleep(0.001)
        for handle, tokens, (_, _, hidden) in zip(handles, expected, jobs, strict=True):
            done = handle.result()
            if done.finish_reason == "cancelled":
                assert done.token_ids == tokens[: len(done.token_ids)]
            else:
                assert done.token_ids == tokens
                assert (done.hidden is not None) == hidden
        check_all_free(engine)
