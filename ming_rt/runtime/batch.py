"""One forward step of the thinker: the packed tokens of several sequences and where their KV entries live."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """i64 ``[N]``: where each token's keys and values go, ``page * page_size + offset``."""
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
