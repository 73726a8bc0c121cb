"""The talkers' rule for the next audio token, in terms of ``ops.sample``.

All generations draw from the softmax of the ``TOP_K`` largest logits, with all ties of the last one, at
temperature 1 and without penalties. Where the end is ruled out it still takes one of the places.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_K = 20


def ban_end(logits: Tensor, banned: Tensor, end_id: int) -> Tensor:
    """Rule out the end in some rows and give the ``top_k`` of ``ops.sample`` that keeps all others' places.

    The other ids at or above the ``TOP_K``-th largest logit are counted before the end is taken out, and just
    as many are to be kept. Taking the end out first would let another id in for it.
    Without any banned row the answer is ``TOP_K`` everywhere and this need not be called.

    Args:
        logits: f32 ``[b, V]``; the end's column becomes -inf in banned rows, in place.
        banned: bool ``[b]``.
        end_id: id of ``<audio_eos>``.

    Returns:
        i32 ``[b]``, on the same device; nothing waits for the device.
    """
    least = logits.topk(min(TOP_K, logits.shape[1]), dim=-1).values[:, -1:]
    end = logits[:, end_id]
    others = (logits >= least).sum(dim=-1) - (end >= least[:, 0]).long()
    end.masked_fill_(banned, -torch.inf)
    return torch.where(banned, others, TOP_K).int()
