"""Scheduling without a model: budgets, order, admission, preemption, and random schedules."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_model import make_prompt

from ming_rt.runtime.kv_cache import PagePool
from ming_rt.runtime.request import Request, SamplingParams
from ming_rt.runtime.scheduler import Scheduler

PAGE = 4


def scheduler(pages=32, seqs=8, tokens=16) -> Scheduler:
    return Scheduler(PagePool(pages, PAGE), max_num_seqs=seqs, max_num_batched_tokens=tokens)


def request(
    number: int, length: int, max_tokens: int = 50, salt: int | None = None, limit: int = 10**6, **options
):
    ids = np.arange(length) + 1000 * (number if salt is None else salt)
    r = Request(number, make_prompt(ids), SamplingParams(max_tokens=max_tokens), limit, **options)
    r.plan(np.tile(np.arange(length), (3, 1)), 0, None)
    return r


def step(s: Scheduler) -> list[tuple[int, int, int]]:
    """Run one step as the engine would: every sampled token is the request's number."""
    chunks = s.schedule()
    plan = [(c.request.id, c.start, c.stop) for c in chunks]
    sampled = [c.request for c in chunks if c.samples]
    for chunk in chunks:
        assert len(chunk.request.pages) * PAGE >= chunk.stop
    s.commit(chunks)
    for r in sampled:
        r.append(r.id)
        if r.num_tokens == r.limit:
            s.remove(r)
    s.pool.check([r.pages for r in (*s.running, *s.waiting)])
    return plan


def test_prefill_is_cut_at_the_budget_and_decodes_go_first():
    s = scheduler(tokens=10)
    s.add(request(1, 3))
    s.add(request(2, 25))
    assert step(s) == [(1, 0, 3), (2, 0, 7)]
    assert step(s) == [(1, 3, 4), (2, 7, 16)]
    assert step(s) == [(1, 4, 5), (2, 16, 25)]
    assert step(s) == [(1, 5, 6), (2, 25, 26)]


def test_admission_is_first_come_first_served():
    s = scheduler(pages=12, seqs=2, tokens=64)
    for number, length in ((1, 30), (2, 30), (3, 2)):
        s.add(request(number, length))
    assert step(s) == [(1, 0, 30)], "2 does not fit beside 1, and the small 3 does not overtake it"
    s.remove(s.running[0])
    assert step(s) == [(2, 0, 30), (3, 0, 2)]


def test_number_of_sequences_is_bounded():
    s = scheduler(seqs=2)
    for number in range(4):
        s.add(request(number, 2))
    assert [p[0] for p in step(s)] == [0, 1]
    assert [p[0] for p in step(s)] == [0, 1]
    assert len(s) == 4


def test_unprepared_request_waits_with_all_behind_it():
    s = scheduler()
    blocked = Request(1, make_prompt([1, 2]), SamplingParams(), 100)
    s.add(blocked)
    s.add(request(2, 2))
    assert list(s.next_to_prepare()) == [blocked]
    assert step(s) == []
    blocked.plan(np.zeros((3, 2)), 0, None)
    assert [p[0] for p in step(s)] == [1, 2]


def test_equal_beginnings_are_computed_once():
    s = scheduler()
    first, second = request(1, 11, salt=7), request(2, 14, salt=7)
    s.add(first)
    step(s)
    s.add(second)
    assert (2, 8, 14) in step(s)
    assert second.num_prefix_hit == 8
    assert first.pages[:2] == second.pages[:2]


def test_a_whole_prompt_hit_still_computes_its_last_token():
    s = scheduler()
    s.add(request(1, 8, max_tokens=1, salt=7))
    step(s)
    s.add(request(2, 8, salt=7))
    assert step(s) == [(2, 4, 8)]


def test_hidden_states_need_the_whole_prompt():
    s = scheduler()
    s.add(request(1, 9, salt=7))
    step(s)
    s.add(request(2, 9, salt=7, return_hidden=True))
    assert (2, 0, 9) in step(s)


def test_generated_pages_serve_the_next_turn():
    s = scheduler()
    r = request(1, 5, max_tokens=8)
    s.add(r)
    while len(s):
        step(s)
    after = Request(2, make_prompt([*r.tokens.tolist(), 3, 3]), SamplingParams(), 100)
    after.plan(np.tile(np.arange(15), (3, 1)), 0, None)
    s.add(after)
    assert step(s) == [(2, 12, 15)]


def test_the_newest_is_preempted_and_keeps_its_tokens():
    s = scheduler(pages=6, tokens=64)
    old, new = request(1, 7), request(2, 7)
    s.add(old)
    s.add(new)
    while not s.preemptions:
        step(s)
    assert s.running == [old]
    assert list(s.waiting) == [new]
    assert new.pages == []
    assert new.num_computed == 0
    kept = new.tokens.tolist()
    s.remove(old)
    step(s)
    assert new.tokens.tolist()[: len(kept)] == kept
    assert new.num_tokens == len(kept) + 1
    assert new.preemptions == 1


def test_no_admission_that_would_be_undone_at_once():
    s = scheduler(pages=10, tokens=64)
    s.add(request(1, 16, max_tokens=6))
    step(s)
    s.add(request(2, 20))
    assert [p[0] for p in step(s)] == [1], "the last 5 pages would hold 2, but 1 is about to need one"
    while 1 in {r.id for r in s.running}:
        step(s)
    assert step(s) == [(2, 0, 20)]
    assert s.preemptions == 0


@pytest.mark.parametrize(("seqs", "tokens"), [(0, 4), (5, 4)])
def test_impossible_sizes_are_refused(seqs, tokens):
    with pytest.raises(ValueError, match="max_num_seqs"):
        scheduler(seqs=seqs, tokens=tokens)


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_finish_everything_in_order_within_budget(seed):
    rnd = random.Random(seed)
    pages, tokens = rnd.randint(8, 30), rnd.randint(6, 40)
    s = scheduler(pages, rnd.randint(1, 6), tokens)
    capacity = pages * PAGE
    todo = [
        request(
            n, rnd.randint(1, capacity - 1), rnd.randint(1, 30), rnd.choice([None, 1, 2]), capacity,
            return_hidden=rnd.random() < 0.2,
        )
        for n in range(25)
    ]  # fmt: skip
    live, computed = [], {}
    for _ in range(5000):
        if todo and rnd.random() < 0.3:
            live.append(todo.pop(0))
            s.add(live[-1])
        if live and rnd.random() < 0.05:
            victim = rnd.choice(live)
            if victim in s.running or victim in s.waiting:
                s.remove(victim)
        before = {r: r.num_computed for r in s.running}
        plan = step(s)
        assert sum(stop - start for _, start, stop in plan) <= tokens
        assert len({number for number, _, _ in plan}) == len(plan)
        assert len(s.running) <= s.max_num_seqs
        assert all(r.remaining == 1 for r in s.running[:-1])
        assert [r.id for r in s.running] == sorted(r.id for r in s.running)
        assert [r.id for r in s.waiting] == sorted(r.id for r in s.waiting)
        assert plan or not len(s), "work is waiting and nothing runs"
        if before:
            oldest = min(before, key=lambda r: r.id)
            assert oldest.id in {p[0] for p in plan} or oldest.num_computed == 0
        computed.update((number, stop) for number, _, stop in plan)
        if not todo and not len(s):
            break
    else:
        pytest.fail("requests are starving")
    s.pool.check(holders=[])
    assert s.pool.available == pages


def decoding(s: Scheduler, *requests: Request) -> list:
    """Admits ``requests`` and gives the chunks of their first decode step."""
    for r in requests:
        s.add(r)
    step(s)
    return s.schedule()


def test_the_step_ahead_is_one_token_more_of_everybody():
    s = scheduler()
    first, second = request(1, 3), request(2, 7)
    chunks = decoding(s, first, second)
    assert [(c.start, c.stop) for c in chunks] == [(3, 4), (7, 8)]
    ahead = s.ahead(chunks)
    assert [(c.request, c.start, c.stop) for c in ahead] == [(first, 4, 5), (second, 8, 9)]
    assert [len(r.pages) for r in (first, second)] == [2, 3]
    assert first.num_computed == 3
    s.pool.check([first.pages, second.pages])


def test_no_step_ahead_of_what_may_change_it():
    s = scheduler(seqs=2)
    first, second = request(1, 3), request(2, 7)
    chunks = decoding(s, first, second)
    assert s.ahead(chunks[:1]) is None, "not everybody"
    s.add(request(3, 2))
    assert s.ahead(chunks), "who waits has to wait for an end"
    s.remove(second)
    assert s.ahead(chunks) is None, "one has ended"
    assert s.ahead(chunks[:1]) is None, "one may join"


def test_no_step_ahead_at_the_limit_or_without_pages():
    s = scheduler()
    chunks = decoding(s, request(1, 3, max_tokens=2))
    assert s.ahead(chunks) is None
    s = scheduler(pages=4)
    chunks = decoding(s, request(1, 3), request(2, 7))
    assert s.ahead(chunks) is None
    assert (s.preemptions, s.pool.available) == (0, 1), "both would need a page"
