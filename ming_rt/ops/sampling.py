"""Choice of the next token from a row of logits (contract: csrc/ops/sampling/sampling.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ming_rt.ops._native import kernels


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    repetition_penalty: Tensor,
    no_repeat_ngram_size: Tensor,
    history: Tensor,
    history_bounds: Tensor,
    uniforms: Tensor,
    n_logprobs: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token per row: penalties over the history, then greedy choice or a draw from the filtered softmax.

    Args:
        logits: float32 [B, V].
        temperature: float32 [B]; 0 = the largest logit (lowest id on ties), the next three are then unused.
        top_k: int32 [B]; keep the k largest logits and all equal to the k-th; 0 = all.
        top_p: float32 [B], in (0, 1]; then keep the fewest most likely ids whose probability reaches it.
        uniforms: float32 [B], in [0, 1]; where to read the inverse cumulative distribution, in id order.
        repetition_penalty: float32 [B], above 0; logits of history ids are divided by it, negative ones
            multiplied; 1 = off.
        no_repeat_ngram_size: int32 [B]; ids that would complete an n-gram of the history are out; 0 = off.
        history: int64 [L], prompt and generated ids of all rows.
        history_bounds: int64 [B, 2], begin and end of each row's ids in history; rows may share them.
        n_logprobs: how many of the most likely ids to report.

    Returns:
        ids int64 [B]; their logprobs float32 [B]; the most likely ids int64 [B, n] and their logprobs float32
        [B, n], best first. Logprobs are the log-softmax of the unmodified logits. The id is -1, and the other
        results of the row are undefined, where its logits hold NaN or +inf or nothing is left to choose.

    Raises:
        ValueError: wrong dtypes, shapes or parameters.
    """
    rows, vocab = logits.shape
    native = kernels(logits)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    top_ids = torch.empty((rows, n_logprobs), dtype=torch.int64, device=logits.device)
    logprob, top_logprob = (torch.empty_like(t, dtype=torch.float32) for t in (ids, top_ids))
    nbytes = native.sample_workspace_bytes(rows, vocab)
    native.sample(
        logits,
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        no_repeat_ngram_size,
        history,
        history_bounds,
        uniforms,
        ids,
        logprob,
        top_ids,
        top_logprob,
        torch.empty(nbytes, dtype=torch.uint8, device=logits.device) if nbytes else None,
    )
    return ids, logprob, top_ids, top_logprob


def sample_torch(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    repetition_penalty: Tensor,
    no_repeat_ngram_size: Tensor,
    history: Tensor,
    history_bounds: Tensor,
    uniforms: Tensor,
    n_logprobs: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sample`` as a plain torch composition."""
    vocab, bounds, chosen = logits.shape[1], history_bounds.tolist(), []
    for row, raw in enumerate(logits):
        scores, past = raw.clone(), history[slice(*bounds[row])]
        seen = past[(past >= 0) & (past < vocab)].unique()
        penalty = repetition_penalty[row]
        scores[seen] = torch.where(raw[seen] < 0, raw[seen] * penalty, raw[seen] / penalty)
        if no_repeat_ngram_size[row]:
            scores[ngram_bans_torch(past, int(no_repeat_ngram_size[row]), vocab)] = -torch.inf
        if not (raw < torch.inf).all() or not scores.max().isfinite():
            chosen.append(torch.tensor(-1, device=logits.device))
            continue
        if temperature[row] == 0:
            chosen.append(scores.argmax())
            continue
        scores = scores / temperature[row]
        k = int(top_k[row])
        if 0 < k < vocab:
            scores[scores < scores.topk(k).values[-1]] = -torch.inf
        if top_p[row] < 1:
            ranked, order = scores.sort(descending=True, stable=True)
            probs = ranked.softmax(-1)
            drop = probs.double().cumsum(-1) - probs >= top_p[row]
            drop[0] = False
            scores[order[drop]] = -torch.inf
        cumulative = scores.softmax(-1).double().cumsum(-1)
        chosen.append((cumulative <= uniforms[row].double() * cumulative[-1]).sum().clamp(max=vocab - 1))
    ids = torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=logits.device)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(n_logprobs, dim=-1)
    return ids, logprobs.gather(1, ids[:, None].clamp(min=0))[:, 0], top.indices, top.values


def ngram_bans(history: Tensor, n: int, vocab: int) -> Tensor:
    """Ids that would complete an n-gram already in ``history`` (the rule ``sample`` applies).

    history: int64 [L] of one sequence; n: 0 = none -> bool [vocab].
    Raises ValueError on a negative n or a wrong dtype.
    """
    banned = torch.zeros(vocab, dtype=torch.bool, device=history.device)
    kernels(history).ngram_bans(history, n, banned.view(torch.uint8))
    return banned


def ngram_bans_torch(history: Tensor, n: int, vocab: int) -> Tensor:
    """``ngram_bans`` as a plain torch composition."""
    banned = torch.zeros(vocab, dtype=torch.bool, device=history.device)
    if 0 < n <= len(history):
        grams = history.unfold(0, n, 1)
        ends = grams[(grams[:, :-1] == history[len(history) - n + 1 :]).all(1), -1]
        banned[ends[(ends >= 0) & (ends < vocab)]] = True
    return banned
