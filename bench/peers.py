"""Other ways to do the work of our kernels on a GPU: what an engine would call instead.

Each function makes a callable of ready arguments (layouts a peer wants are made outside its time), or raises
``SkippedError``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpu_timing import SkippedError

Call = Callable[[], object]


def compiled(call: Call) -> Call:
    """A torch composition through torch.compile."""
    return torch.compile(call, dynamic=False)


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def torch_grouped(x: Tensor, w: Tensor, offsets: Tensor, swiglu: bool) -> Call:
    """torch's grouped matrix product. x [S, K] sorted by expert, w [E, N, K], offsets int32 [E + 1]."""
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise SkippedError("this torch has no grouped_mm")
    ends, across = offsets[1:].contiguous(), w.transpose(1, 2)
    if swiglu:
        return lambda: _swiglu(product(x, across, offs=ends))
    return lambda: product(x, across, offs=ends)


def triton_grouped(x: Tensor, w: Tensor, offsets: Tensor, swiglu: bool) -> Call:
    """Our own grouped product in Triton."""
    try:
        from .triton_moe import grouped
    except ImportError as error:
        raise SkippedError(f"no Triton: {error}") from error
    return lambda: grouped(x, w, offsets, swiglu)


def fbgemm_grouped(x: Tensor, w: Tensor, offsets: Tensor, swiglu: bool) -> Call:
    """The grouped product of fbgemm-gpu-genai."""
    try:
        importlib.import_module("fbgemm_gpu.experimental.gen_ai")
        product = torch.ops.fbgemm.bf16bf16bf16_grouped_stacked
    except (ImportError, AttributeError, OSError) as error:
        raise SkippedError(f"fbgemm-gpu-genai is not installed: {error}") from error
    counts = offsets.diff().long()
    if swiglu:
        return lambda: _swiglu(product(x, w, counts))
    return lambda: product(x, w, counts)


def grouped_peers(
    make: Callable[[], tuple[Tensor, Tensor]], offsets: Tensor, *, swiglu: bool
) -> dict[str, Callable[[], Call]]:
    """The grouped products. ``make`` gives x [S, K] in grouped order and w [E, N, K], when they are needed.

    They start from rows that are sorted already and leave theirs so; gathering them is not in their time.
    """
    names = {"grouped_mm": torch_grouped, "triton": triton_grouped, "fbgemm": fbgemm_grouped}
    return {
        name: lambda peer=peer: peer(*make(), offsets, swiglu)  # type: ignore[misc]
        for name, peer in names.items()
    }


def sdpa_peers(
    make: Callable[[], tuple[Tensor, Tensor, Tensor]], causal: bool
) -> dict[str, Callable[[], Call]]:
    """scaled_dot_product_attention by backend. ``make`` gives q, k, v [B, heads, rows, dim], contiguous.

    Pages are gathered outside their time. ``causal`` aligns the last query with the last key: only square
    prefill and single queries are asked for.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def peer(backend: SDPBackend) -> Call:
        q, k, v = make()
        grouped = q.shape[1] != k.shape[1]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return call

    backends = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa math": SDPBackend.MATH,
    }
    return {name: lambda backend=backend: peer(backend) for name, backend in backends.items()}  # type: ignore[misc]
