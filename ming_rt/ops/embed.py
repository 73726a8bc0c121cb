"""Rows of an embedding table, media features in place of placeholders (contract: csrc/ops/embed/embed.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels


def embed(
    ids: Tensor, table: Tensor, media_rows: Tensor | None = None, media_feats: Tensor | None = None
) -> Tensor:
    """The table's row of every id; rows named in ``media_rows`` take ``media_feats`` instead.

    Args:
        ids: int64 [N]; those outside the table (placeholders may be) count as the nearest inside.
        table: [V, H] float32 or bfloat16.
        media_rows: int64 [M], rows of the result, each named once; given exactly when ``media_feats`` is.
        media_feats: [M, H], dtype of the table.

    Returns:
        [N, H], dtype of the table.

    Raises ValueError on a wrong dtype or shape or (on the CPU) a media row outside the result.
    """
    y = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    kernels(table).embed(ids, table, media_rows, media_feats, y)
    return y


def embed_torch(
    ids: Tensor, table: Tensor, media_rows: Tensor | None = None, media_feats: Tensor | None = None
) -> Tensor:
    """``embed`` as a plain torch composition."""
    y = table[ids.clamp(0, table.shape[0] - 1)]
    if media_rows is not None and media_feats is not None:
        y[media_rows] = media_feats
    return y
