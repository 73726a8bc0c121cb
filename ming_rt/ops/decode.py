"""Bookkeeping between two decode steps (contract: csrc/ops/decode/decode.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels


def advance(
    ids: Tensor,
    positions: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    page_table: Tensor,
    history: Tensor,
    history_bounds: Tensor,
    page_size: int,
) -> None:
    """Take every row one token further, in place: ``ids`` become its input.

    Args:
        ids: int64 [B], the ids chosen last.
        positions: int32 [3, B], increased by one.
        kv_lens: int32 [B], increased by one.
        slots: int64 [B], then the slot of the row's last position; -1 marks a padding row and stays.
        page_table: int32 [B, max_pages]; read at the page of that position.
        history: int64 [L], gets each row's id at the end of the row's part.
        history_bounds: int64 [B, 2], begin and end of each row's part; the end is increased by one. Rows may
            share a part if they append the same id at the same place.

    Raises:
        ValueError: wrong dtypes or shapes; a position outside the page table or an end outside the history.
            The last two are found on the CPU before anything is written; a device leaves such a row with the
            slot -1 or its old history, and ``check_device`` raises them.
    """
    kernels(ids).advance(ids, positions, kv_lens, slots, page_table, history, history_bounds, page_size)


def advance_torch(
    ids: Tensor,
    positions: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    page_table: Tensor,
    history: Tensor,
    history_bounds: Tensor,
    page_size: int,
) -> None:
    """``advance`` as a plain torch composition."""
    at = kv_lens.long()
    page = page_table.gather(1, (at // page_size).clamp(max=page_table.shape[1] - 1)[:, None])[:, 0]
    slots.copy_(torch.where(slots < 0, slots, page * page_size + at % page_size))
    kv_lens += 1
    positions += 1
    history[history_bounds[:, 1]] = ids
    history_bounds[:, 1] += 1
