"""advance: every backend against the composition, padding rows, and positions that leave the tables."""

from __future__ import annotations

import pytest
import torch

from ming_rt import ops

PAGE, PAGES, PART = 4, 6, 30


def state(rng, rows):
    """Arguments of ``advance`` for ``rows`` rows amid memory that belongs to others."""
    device = rng.device

    def integers(high, *shape, dtype=torch.int32):
        return torch.randint(0, high, shape, generator=rng, dtype=dtype, device=device)

    begins = PART * torch.arange(rows, device=device)
    return {
        "ids": integers(1000, rows, dtype=torch.int64),
        "positions": integers(50, 3, rows + 2)[:, :rows],
        "kv_lens": integers(PAGE * PAGES - 1, rows),
        "slots": integers(90, rows, dtype=torch.int64),
        "page_table": integers(40, rows, PAGES + 3)[:, :PAGES],
        "history": torch.full((PART * rows,), -7, device=device),
        "history_bounds": torch.stack([begins, begins + integers(PART, rows, dtype=torch.int64)], dim=1),
        "page_size": PAGE,
    }


def copied(args):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in args.items()}


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_three_steps_match_the_composition(backend, rng, rows):
    ours = state(rng, rows)
    ours["kv_lens"] = ours["kv_lens"].clamp(max=PAGE * PAGES - 3)
    ours["history_bounds"][:, 1].clamp_(max=PART * (1 + torch.arange(rows, device=rng.device)) - 3)
    ours["slots"][1::3] = -1
    expected = copied(ours)
    for step in range(3):
        for args, op in ((ours, ops.advance), (expected, ops.advance_torch)):
            args["ids"] = args["ids"] + step
            op(**args)
        for name, value in expected.items():
            assert not torch.is_tensor(value) or torch.equal(ours[name], value), name


def test_slots_follow_the_page_table(backend):
    args = {
        "ids": torch.tensor([9, 8]),
        "positions": torch.tensor([[3, 4]] * 3, dtype=torch.int32),
        "kv_lens": torch.tensor([2, 4], dtype=torch.int32),
        "slots": torch.tensor([0, 0]),
        "page_table": torch.tensor([[5, 1], [2, 7]], dtype=torch.int32),
        "history": torch.zeros(6, dtype=torch.int64),
        "history_bounds": torch.tensor([[0, 2], [3, 3]]),
        "page_size": PAGE,
    }
    ops.advance(**args)
    assert args["slots"].tolist() == [5 * PAGE + 2, 7 * PAGE]
    assert args["kv_lens"].tolist() == [3, 5]
    assert args["positions"].tolist() == [[4, 5]] * 3
    assert args["history"].tolist() == [0, 0, 9, 8, 0, 0]
    assert args["history_bounds"].tolist() == [[0, 3], [3, 4]]


def test_padding_rows_share_a_history_and_keep_their_slot(backend, rng):
    args = state(rng, 3)
    for name in ("ids", "kv_lens", "page_table", "history_bounds"):
        args[name][1:] = args[name][0]
    args["slots"][1:] = -1
    begin, end = args["history_bounds"][0].tolist()
    ops.advance(**args)
    assert args["slots"][1:].tolist() == [-1, -1]
    assert args["history_bounds"].tolist() == [[begin, end + 1]] * 3
    assert (args["history"] != -7).nonzero().tolist() == [[end]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_lens", PAGE * PAGES, "kv_lens: expected"),
        ("kv_lens", -1, "kv_lens: expected"),
        ("history_bounds", PART * 2, "history_bounds: expected"),
        ("history_bounds", -1, "history_bounds: expected"),
    ],
)
def test_what_leaves_the_tables_is_refused(backend, rng, name, value, message):
    args = state(rng, 2)
    args[name].view(-1)[-1] = value
    before = copied(args)
    if backend not in ("emu", "cuda"):
        with pytest.raises(ValueError, match=message):
            ops.advance(**args)
        assert all(torch.equal(args[k], v) for k, v in before.items() if torch.is_tensor(v))
        return
    ops.advance(**args)
    with pytest.raises(ValueError, match=message):
        ops.check_device()
    if name == "kv_lens":
        assert args["slots"][1] == -1
    else:
        assert torch.equal(args["history"][PART:], before["history"][PART:])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", torch.zeros(2, dtype=torch.int32), "ids: expected int64, got int32"),
        ("positions", torch.zeros(2, 2, dtype=torch.int32), r"positions: .*\[3, B\]"),
        ("history_bounds", torch.zeros(2, 3, dtype=torch.int64), r"history_bounds: .*\[B, 2\]"),
        ("page_size", 0, "page_size: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(name, value, message):
    args = state(torch.Generator().manual_seed(1), 2) | {name: value}
    with pytest.raises(ValueError, match=f"advance: {message}"):
        ops.advance(**args)
