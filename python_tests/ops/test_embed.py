"""embed: exact rows of the table and of the media, ids outside the table, wrong rows and arguments."""

from __future__ import annotations

import pytest
import torch

from ming_rt import ops

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden", "media"), [(1, 1, 1, 0), (7, 30, 33, 4), (5, 9, 2056, 5)]
)
def test_equals_the_composition(backend, rng, dtype, tokens, vocab, hidden, media):
    wide = torch.randn(vocab, hidden + 8, generator=rng).to(dtype)
    ids = torch.randint(-3, vocab + 3, (tokens,), generator=rng)
    ids[0] = 2**40
    rows = torch.randperm(tokens, generator=rng)[:media]
    feats = torch.randn(media + 1, hidden + 8, generator=rng).to(dtype)
    for table, f in [
        (wide[:, :hidden].contiguous(), feats[:media, :hidden].contiguous()),
        (wide[:, 8:], feats[:media, 8:]),
        (wide[:, 1 : 1 + hidden], feats[1:, 3 : 3 + hidden]),
    ]:
        assert torch.equal(ops.embed(ids, table), ops.embed_torch(ids, table))
        actual = ops.embed(ids, table, rows, f)
        assert torch.equal(actual, ops.embed_torch(ids, table, rows, f))


def test_values_are_copied_bit_by_bit(backend):
    table = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]])
    y = ops.embed(torch.zeros(2, dtype=torch.int64), table)
    assert torch.equal(y.view(torch.int32), table.expand(2, -1).contiguous().view(torch.int32))


def test_no_tokens(backend):
    table, none = torch.ones(3, 4), torch.empty(0, dtype=torch.int64)
    assert ops.embed(none, table).shape == (0, 4)
    assert ops.embed(none, table, none, torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("row", [-1, 2, 2**40])
def test_wild_media_rows(backend, row):
    arguments = torch.tensor([0, 1]), torch.eye(2), torch.tensor([row, 1]), torch.full((2, 2), 7.0)
    if backend not in ("emu", "cuda"):
        with pytest.raises(ValueError, match=f"embed: media_rows: expected rows from 0 to 1, got {row}"):
            ops.embed(*arguments)
        return
    y = ops.embed(*arguments)
    assert y.tolist() == [[1.0, 0.0], [7.0, 7.0]]
    with pytest.raises(ValueError, match="media_rows: expected rows below the number of tokens"):
        ops.check_device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.ones(3, 4)), "ids: expected int64"),
        ((torch.zeros(2, dtype=torch.int64), torch.ones(0, 4)), "table: expected at least one row"),
        (
            (torch.zeros(2, dtype=torch.int64), torch.ones(3, 4), torch.zeros(1, dtype=torch.int64)),
            "given together",
        ),
        (
            (
                torch.zeros(2, dtype=torch.int64),
                torch.ones(3, 4),
                torch.zeros(1, dtype=torch.int64),
                torch.ones(1, 4).bfloat16(),
            ),
            "media_feats: expected float32, got bfloat16",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"embed: .*{message}"):
        ops.embed(*arguments)
