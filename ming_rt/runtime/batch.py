"""One forward step of the thinker: the packed tokens of several sequences and where their KV entries live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ming_rt.runtime import transfer
from ming_rt.runtime.transfer import CPU

if TYPE_CHECKING:
    from ming_rt.runtime.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """Tokens of ``B`` sequences packed without pads into ``N`` rows; a decode step is a chunk of one token.

    The tokens of a sequence are the last ones of its ``kv_lens`` cached positions, so whole prefill, chunked
    prefill and decode are the same thing and mix freely.
    """

    input_ids: torch.Tensor
    """i64 ``[N]``."""
    positions: torch.Tensor
    """i32 ``[3, N]``: (t, h, w); equal on all axes for text and for the 1-D generations."""
    slots: torch.Tensor
    """i64 ``[N]``: where each token's keys and values go, ``page * page_size + offset``; -1 = nowhere."""
    page_table: torch.Tensor
    """i32 ``[B, max_pages]``: the pages of each sequence in order; entries past its length are never read."""
    cu_seqlens_q: torch.Tensor
    """i32 ``[B + 1]``: cumulative number of new tokens."""
    kv_lens: torch.Tensor
    """i32 ``[B]``: cached tokens of each sequence, this step included."""
    logit_rows: torch.Tensor
    """i64 ``[R]``: the tokens whose logits are wanted."""
    modality: torch.Tensor | None = None
    """u8 ``[N]``: router of each token (0 text, 1 image, 2 audio); None = all text."""
    media_rows: torch.Tensor | None = None
    """i64 ``[M]``: tokens whose word embedding is replaced by ``media_feats``."""
    media_feats: torch.Tensor | None = None
    """``[M, H]``."""
    want_hidden: bool = False
    """Also return the input embeddings and the last hidden state of all ``N`` tokens."""


def pack_batch(chunks: Sequence[Chunk], page_size: int, device: torch.device = CPU) -> Batch:
    """The tokens of one step side by side, with the cache slots and pages of their requests.

    All numbers reach the device in one copy that nobody waits for.
    """
    requests = [c.request for c in chunks]
    ends = np.cumsum([0, *(c.stop - c.start for c in chunks)])
    page_table = np.zeros((len(chunks), max(len(r.pages) for r in requests)), np.int32)
    slots = np.empty(ends[-1], np.int64)
    media_rows, media_feats = [], []
    for row, (chunk, begin, end) in enumerate(zip(chunks, ends[:-1], ends[1:], strict=True)):
        request = chunk.request
        pages = page_table[row, : len(request.pages)]
        pages[:] = request.pages
        index = np.arange(chunk.start, chunk.stop)
        slots[begin:end] = pages[index // page_size].astype(np.int64) * page_size + index % page_size
        if request.media_feats is not None:
            part = request.media_slice(chunk.start, chunk.stop)
            if part.stop > part.start:
                media_rows.append(request.media_rows[part] - chunk.start + begin)
                media_feats.append(request.media_feats[part])
    modality = np.concatenate([c.request.modality[c.start : c.stop] for c in chunks])
    arrays = {
        "input_ids": np.concatenate([c.request.tokens[c.start : c.stop] for c in chunks]),
        "positions": np.concatenate([c.request.positions[:, c.start : c.stop] for c in chunks], axis=1),
        "slots": slots,
        "page_table": page_table,
        "cu_seqlens_q": ends.astype(np.int32),
        "kv_lens": np.array([c.stop for c in chunks], np.int32),
        "logit_rows": ends[1:][[c.samples for c in chunks]] - 1,
    }
    if modality.any():
        arrays["modality"] = modality
    if media_rows:
        arrays["media_rows"] = np.concatenate(media_rows)
    tensors = transfer.send(list(arrays.values()), device)
    return Batch(
        **dict(zip(arrays, tensors, strict=True)),
        media_feats=torch.cat(media_feats) if media_feats else None,
        want_hidden=any(c.request.return_hidden and c.start < c.request.num_prompt for c in chunks),
    )
