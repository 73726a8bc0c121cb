"""Softmax attention over contiguous segments and over the paged KV cache (contract: csrc/ops/attention)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ming_rt.ops._native import kernels


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention inside each segment (vision full or windowed, audio encoders, flow).

    Args:
        q: [N, Hq, D] float32 or bfloat16; rows and heads may be strided.
        k, v: [N, Hkv, D], dtype of q, Hq a multiple of Hkv; query head h uses KV head h // (Hq / Hkv).
        cu_seqlens: int32 [B + 1], rows cu_seqlens[b] .. cu_seqlens[b + 1] form segment b; from 0 to N, empty
            segments allowed.
        scale: of the scores, default 1 / sqrt(D).
        keys: int32 [B, 2]: segment b sees rows keys[b, 0] .. keys[b, 1] of k and v ([M, Hkv, D] then, M any
            number) instead of its own; rows may be seen by several segments. No row: the result is 0.
        bias: float32 [Hq, N, K], added to the products of queries and keys before the scale; column j belongs
            to the j-th key that the row's segment sees. Rows may overlap in memory. Only with keys.

    Returns:
        [N, Hq, D] in q's dtype; a row's bits do not depend on the other segments.

    Raises:
        ValueError: wrong dtype, shape or offsets.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels(q).attention_varlen(q, k, v, cu_seqlens, _scale(q, scale), keys, bias, out)
    return out


def attention_varlen_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``attention_varlen`` as a plain torch composition."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    segments = list(pairwise(cu_seqlens.tolist()))
    for (begin, end), (first, last) in zip(
        segments, segments if keys is None else keys.tolist(), strict=True
    ):
        parts = (
            x[rows].transpose(0, 1)[None]
            for x, rows in ((q, slice(begin, end)), (k, slice(first, last)), (v, slice(first, last)))
        )
        mask = None
        if bias is not None:
            mask = (bias[:, begin:end, : last - first] * _scale(q, scale)).to(q.dtype)[None]
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        y = scaled_dot_product_attention(*parts, **options)
        out[begin:end] = y[0].transpose(0, 1) if last > first else 0
    return out


def attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its paged keys: prefill, chunk and decode alike.

    Args:
        q: [N, Hq, D] float32 or bfloat16; rows and heads may be strided.
        k_pages, v_pages: [P, Hkv, page, D], dtype of q, Hq a multiple of Hkv.
        page_table: int32 [B, max_pages]; token t of sequence b lives in page page_table[b, t // page] at
            offset t % page. Entries beyond the last used page are not read.
        cu_seqlens_q: int32 [B + 1]; rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of q are the last tokens of
            sequence b, in order.
        kv_lens: int32 [B], tokens of each sequence, its queries included.
        scale: of the scores, default 1 / sqrt(D).

    Returns:
        [N, Hq, D] in q's dtype; a row's bits are the same alone, in any batch, chunked or whole. On CUDA
        sequences of up to 8 queries take another kernel than longer ones, with a rounding of its own.

    Raises:
        ValueError: wrong dtype, shape or offsets, a length the table cannot hold, a page outside [0, P).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    native, max_keys = kernels(q), page_table.shape[-1] * k_pages.shape[-2]
    nbytes = native.attention_workspace_bytes(q.shape[0], kv_lens.numel(), q.shape[-2], q.shape[-1], max_keys)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=q.device) if nbytes else None
    native.attention_paged(
        q, k_pages, v_pages, page_table, cu_seqlens_q, kv_lens, _scale(q, scale), out, workspace
    )
    return out


def attention_paged_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float | None = None,
) -> Tensor:
    """``attention_paged`` as a plain torch composition."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds, page_size = cu_seqlens_q.tolist(), k_pages.shape[2]
    for b, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[b], bounds[b + 1]
        pages = page_table[b, : -(-kv_len // page_size)].long()
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :kv_len] for x in (k_pages, v_pages))
        options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if end - begin == kv_len:
            options["is_causal"] = True
        elif end - begin > 1:
            mask = torch.ones(end - begin, kv_len, dtype=torch.bool)
            options["attn_mask"] = mask.tril(kv_len - (end - begin))
        y = scaled_dot_product_attention(q[begin:end].transpose(0, 1)[None], k, v, **options)
        out[begin:end] = y[0].transpose(0, 1)
    return out


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
