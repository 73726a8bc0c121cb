"""The engine on a device that works beside the host: what is launched before what is read, what is dropped.

The recorded steps run at once here, with the kernels of the CPU, but their tokens are read as late as on a
GPU.
"""

from __future__ import annotations

import itertools
import random
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_model import EOS, FakeModel, check_all_free, make_engine, make_prompt, reference

from ming_rt.errors import CapacityError, EngineError
from ming_rt.runtime import worker
from ming_rt.runtime.device import Device
from ming_rt.runtime.request import SamplingParams

EMU = Device("emu")


def prompt(seed: int, length: int = 6):
    return make_prompt(np.random.default_rng(seed).integers(0, 80, length))


def long_answer(length: int = 6, tokens: int = 30, start: int = 0):
    """A prompt whose greedy answer does not end before ``tokens``."""
    seeds = range(start, start + 200)
    return next(p for p in (prompt(s, length) for s in seeds) if EOS not in reference(p, tokens))


def greedy(max_tokens: int = 12, **params) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **params)


def log_of(engine) -> list[tuple[str, list[int]]]:
    """What the engine launches and reads: ("launch" or "read", length of each sequence after the step)."""
    log = []
    graphs = engine._worker.graphs
    launch = graphs.launch

    def logged(chunks):
        stops = [c.stop for c in chunks]
        log.append(("launch", stops))
        read = launch(chunks)
        return lambda: (log.append(("read", stops)), read())[1]

    graphs.launch = logged
    return log


class Hold:
    """Stops the model at a step of one sequence of a given length, until released."""

    def __init__(self, model: FakeModel, length: int) -> None:
        self.length = length
        self.reached, self.released = threading.Event(), threading.Event()
        model.thinker.before_step = self

    def __call__(self, batch) -> None:
        if self.length in batch.kv_lens.tolist():
            self.reached.set()
            assert self.released.wait(20)


def test_steps_without_tokens_are_waited_for_one_behind(monkeypatch):
    """A long prompt in chunks: the host waits for the chunk before the one it has launched."""
    log = []
    fetch = worker.transfer.fetch

    def logged(tensors):
        length = int(tensors[0].max())
        log.append(("launch", length))
        read = fetch(tensors)
        return lambda: (log.append(("wait", length)), read())[1]

    monkeypatch.setattr(worker.transfer, "fetch", logged)
    with make_engine(device=EMU, max_num_batched_tokens=8, max_num_seqs=2) as engine:
        engine.submit(prompt(1, 30), greedy(1)).result()
    chunks = [entry for entry in log if entry[1] in (8, 16, 24)]
    assert chunks == [("launch", 8), ("launch", 16), ("wait", 8), ("launch", 24), ("wait", 16)]


def test_a_step_is_launched_before_the_last_one_is_read():
    p = long_answer()
    with make_engine(device=EMU) as engine:
        log = log_of(engine)
        done = engine.submit(p, greedy(6)).result()
    assert list(done.token_ids) == reference(p, 6)
    # The prompt is 6 tokens and gives the first of 6; the step that gives the last has none behind it.
    assert log == [
        ("launch", [7]),
        ("launch", [8]),
        ("read", [7]),
        ("launch", [9]),
        ("read", [8]),
        ("launch", [10]),
        ("read", [9]),
        ("launch", [11]),
        ("read", [10]),
        ("read", [11]),
    ]


def test_a_step_launched_in_vain_is_dropped():
    ends = next(
        p for p in map(prompt, range(300)) if reference(p, 12)[-1] == EOS and len(reference(p, 12)) > 3
    )
    answer = reference(ends, 12)
    with make_engine(device=EMU) as engine:
        log = log_of(engine)
        done = engine.submit(ends, greedy()).result()
        assert (list(done.token_ids), done.finish_reason) == (answer, "stop")
        again = engine.submit(ends, greedy(2)).result()  # begins when the step in vain has been read
        assert list(again.token_ids) == answer[:2]
        stats = engine.stats()
        assert stats.generated_tokens == len(answer) + 2
        check_all_free(engine)
    assert log.index(("read", [6 + len(answer)])) > log.index(("launch", [6 + len(answer)])) > 0


def test_others_go_on_when_one_ends_in_flight():
    ends = next(
        p for p in map(prompt, range(300)) if reference(p, 12)[-1] == EOS and len(reference(p, 12)) > 3
    )
    stays = long_answer(9)
    with make_engine(device=EMU) as engine:
        handles = [engine.submit(p, greedy(30)) for p in (stays, ends, stays)]
        assert [list(h.result().token_ids) for h in handles] == [
            reference(stays, 30),
            reference(ends, 12),
            reference(stays, 30),
        ]
        check_all_free(engine)


def test_cancelled_in_flight_frees_its_pages_at_once():
    model = FakeModel()
    first, second = long_answer(), long_answer(7)
    with make_engine(model, device=EMU, num_pages=16) as engine:
        hold = Hold(model, 12)
        handle = engine.submit(first, greedy(30))
        assert hold.reached.wait(20)  # inside the launch of a step ahead
        handle.cancel()
        other = engine.submit(second, greedy(30))
        hold.released.set()
        done = handle.result()
        assert done.finish_reason == "cancelled"
        assert list(done.token_ids) == reference(first, 30)[: len(done.token_ids)]
        assert list(other.result().token_ids) == reference(second, 30)
        check_all_free(engine)


def test_a_new_request_is_admitted_before_another_step_is_launched():
    model = FakeModel()
    with make_engine(model, device=EMU) as engine:
        log = log_of(engine)
        hold = Hold(model, 9)
        running = engine.submit(long_answer(), greedy(20))
        assert hold.reached.wait(20)
        joins = engine.submit(long_answer(8), greedy(5))
        hold.released.set()
        assert list(joins.result().token_ids) == reference(long_answer(8), 5)
        assert list(running.result().token_ids) == reference(long_answer(), 20)
    launched = [stops for what, stops in log if what == "launch"]
    assert launched[:3] == [[7], [8], [9]]
    assert len(launched[3]) == 2, "after the prompt of the new request both decode"


def test_a_full_engine_launches_ahead_though_others_wait():
    prompts = [long_answer(start=i * 20) for i in range(4)]
    with make_engine(device=EMU, max_num_seqs=2) as engine:
        log = log_of(engine)
        handles = [engine.submit(p, greedy(12)) for p in prompts]
        assert [list(h.result().token_ids) for h in handles] == [reference(p, 12) for p in prompts]
    pairs = sum(a[0] == b[0] == "launch" for a, b in itertools.pairwise(log))
    assert pairs > 0
    assert max(len(stops) for _, stops in log) == 2


def test_nobody_is_preempted_for_a_step_ahead():
    prompts = [long_answer(length, start=length) for length in (6, 7)]
    with make_engine(device=EMU, num_pages=10) as engine:  # 2 * 20 tokens in pages of 4
        handles = [engine.submit(p, greedy(20 - len(p.input_ids))) for p in prompts]
        for handle, p in zip(handles, prompts, strict=True):
            assert list(handle.result().token_ids) == reference(p, 20 - len(p.input_ids))
        assert engine.stats().preemptions == 0
        check_all_free(engine)


def test_a_fault_on_the_device_fails_its_step_only(monkeypatch):
    p = long_answer()
    faults = iter([None] * 3 + ["slots: expected slots inside the cache, got 9 (found on the device)"])

    def check_device() -> None:
        if fault := next(faults, None):
            raise ValueError(fault)

    monkeypatch.setattr(worker.ops, "check_device", check_device)
    with make_engine(device=EMU) as engine:
        handle = engine.submit(p, greedy())
        with pytest.raises(EngineError, match="the model step failed: ValueError: slots: expected"):
            handle.result()
        assert list(engine.submit(p, greedy()).result().token_ids) == reference(p, 12)
        check_all_free(engine)


@pytest.mark.parametrize("length", [6, 10], ids=["prompt", "ahead"])
def test_a_device_without_memory_fails_the_step_only(length):
    model, p = FakeModel(), long_answer()

    def before_step(batch) -> None:
        if length in batch.kv_lens.tolist():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with make_engine(model, device=EMU) as engine:
        model.thinker.before_step = before_step
        handle = engine.submit(p, greedy())
        with pytest.raises(CapacityError, match=r"the model step failed: .*Tried to allocate") as caught:
            handle.result()
        assert caught.value.__cause__ is None
        assert engine.stats().generated_tokens == max(0, length - 6)
        model.thinker.before_step = None
        assert list(engine.submit(p, greedy()).result().token_ids) == reference(p, 12)
        check_all_free(engine)


def test_closing_reads_what_is_in_flight():
    model = FakeModel()
    engine = make_engine(model, device=EMU)
    log = log_of(engine)
    hold = Hold(model, 9)
    handle = engine.submit(long_answer(), greedy(30))
    assert hold.reached.wait(20)
    closer = threading.Thread(target=engine.close)
    closer.start()
    hold.released.set()
    closer.join(20)
    with pytest.raises(EngineError, match="the engine is closed"):
        handle.result()
    assert sorted(stops for what, stops in log if what == "launch") == sorted(
        stops for what, stops in log if what == "read"
    )
    check_all_free(engine)


def test_the_thread_of_a_gpu_waits_for_its_stream_in_the_end(monkeypatch):
    log = []
    stream = SimpleNamespace(
        wait_stream=lambda other: log.append(f"behind {other}"), synchronize=lambda: log.append("wait")
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(ZeroDivisionError), worker.device_stream(Device("cuda", torch.device("cuda", 0))):
        log.append(f"work {1 // (len(log) - 1)}")
    assert log == ["behind default", "wait"]


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_gives_the_answers_of_the_cpu(seed):
    rnd = random.Random(seed)
    jobs = []
    for i in range(24):
        sampled = rnd.random() < 0.4
        params = SamplingParams(
            temperature=0.9 if sampled else 0.0,
            top_p=rnd.choice([1.0, 0.8]),
            seed=rnd.randrange(9) if sampled else None,
            repetition_penalty=rnd.choice([1.0, 1.0, 1.4]),
            no_repeat_ngram_size=rnd.choice([0, 0, 2]),
            max_tokens=rnd.randint(1, 25),
            logprobs=2 if rnd.random() < 0.15 else None,
        )
        jobs.append((prompt(i, rnd.randint(1, 20)), params, rnd.random() < 0.1))
    sizes = {
        "page_size": rnd.choice([1, 2, 4, 8]),
        "max_num_seqs": rnd.choice([1, 2, 3, 5, 9]),
        "max_num_batched_tokens": rnd.randint(9, 48),
    }
    sizes["num_pages"] = rnd.randint(60, 160) // sizes["page_size"]
    with make_engine(device=Device()) as engine:
        handles = [engine.submit(p, params, return_hidden=h) for p, params, h in jobs]
        expected = [h.result() for h in handles]
    with make_engine(device=EMU, **sizes) as engine:
        handles = [engine.submit(p, params, return_hidden=h) for p, params, h in jobs]
        for handle, wanted in zip(handles, expected, strict=True):
            done = handle.result()
            assert done.token_ids == wanted.token_ids
            assert done.logprobs == wanted.logprobs
            assert done.finish_reason == wanted.finish_reason
        check_all_free(engine)
