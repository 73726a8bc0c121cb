"""A grouped product in Triton, a peer of ours: a program per expert and column block walks the expert's rows.

Loaded on a GPU only, where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _grouped(
    x, w, y, offsets, outputs, depth,
    x_stride, w_stride, y_stride, swiglu: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    expert, block = tl.program_id(1), tl.program_id(0)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    n = block * columns + tl.arange(0, columns)
    k = tl.arange(0, step)
    expert_rows = 2 * outputs if swiglu else outputs
    weight = w + expert.to(tl.int64) * expert_rows * w_stride
    for first in range(begin, end, rows):
        m = first + tl.arange(0, rows)
        sums = tl.zeros((rows, columns), tl.float32)
        ups = tl.zeros((rows, columns), tl.float32)
        for start in range(0, depth, step):
            at = start + k
            a = tl.load(
                x + m[:, None].to(tl.int64) * x_stride + at[None, :],
                mask=(m[:, None] < end) & (at[None, :] < depth),
                other=0.0,
            )
            mask = (n[None, :] < outputs) & (at[:, None] < depth)
            b = tl.load(weight + n[None, :] * w_stride + at[:, None], mask=mask, other=0.0)
            sums = tl.dot(a, b, sums)
            if swiglu:
                u = tl.load(weight + (outputs + n)[None, :] * w_stride + at[:, None], mask=mask, other=0.0)
                ups = tl.dot(a, u, ups)
        if swiglu:
            sums = sums * tl.sigmoid(sums) * ups
        tl.store(
            y + m[:, None].to(tl.int64) * y_stride + n[None, :],
            sums.to(y.dtype.element_ty),
            mask=(m[:, None] < end) & (n[None, :] < outputs),
        )


def grouped(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, swiglu: bool) -> torch.Tensor:
    """Rows of x [S, K], sorted by expert, times the weights of their expert.

    Args:
        w: [E, N, K]; with ``swiglu`` [E, 2 N, K], the N gate rows first.
        offsets: int32 [E + 1], each expert's first row.

    Returns:
        [S, N], the dtype of x.
    """
    experts, total, depth = w.shape
    outputs = total // 2 if swiglu else total
    y = x.new_empty(x.shape[0], outputs)
    per_expert = x.shape[0] / experts
    rows = 16 if per_expert <= 16 else 64 if per_expert <= 128 else 128
    columns = 64 if swiglu else 128
    _grouped[(triton.cdiv(outputs, columns), experts)](
        x, w, y, offsets, outputs, depth, x.stride(0), w.stride(1), y.stride(0), swiglu,
        rows, columns, 64, num_warps=4 if rows < 128 else 8, num_stages=4,
    )  # fmt: skip
    return y
