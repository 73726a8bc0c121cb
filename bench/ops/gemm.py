"""Bench rows of linear, linear_swiglu and weight packing at the models' real dimensions.

Weights rotate through several copies that together exceed the last cache level, as the layers of a model do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ming_rt import ops

from ..timing import Case, on_gpu

ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
GPU_ROWS = (*ROWS, 4096)
QUANTS = ("int8", "int4")
ROTATION = 128 << 20  # bytes of weights a rotation covers
GPU_ROTATION = 320 << 20

# tag, outputs N, inputs K
LITE = [("qkv", 3072, 2048), ("shared_down", 2048, 2816)]
FLASH = [("flash_qkv", 5120, 4096)]


def rotation(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Equal weights in separate memory; their values do not matter to the time."""
    first = (torch.randn(n, k, generator=generator, device=generator.device) * k**-0.5).to(dtype)
    covered = GPU_ROTATION if on_gpu(generator) else ROTATION
    return [first] + [first.clone() for _ in range(covered // (n * k * dtype.itemsize))]


def linear_case(tag: str, x: Tensor, plain: list[Tensor], packed: list[ops.PackedWeight]) -> Case:
    """One product of x with each weight in turn; torch's weights are never quantised."""
    (n, k), m, size = plain[0].shape, x.shape[0], x.element_size()
    ours, torchs = itertools.cycle(packed), itertools.cycle(plain)
    return Case(
        "linear" if packed[0].quant is None else f"linear {packed[0].quant}",
        f"{tag}:{m}x{n}x{k}",
        NAMES[x.dtype],
        lambda: ops.linear(x, next(ours)),
        lambda: ops.linear_torch(x, next(torchs)),
        bytes=packed[0].nbytes + m * (n + k) * size,
        flops=2 * m * n * k,
    )


def swiglu_case(tag: str, x: Tensor, plain: list[Tensor], packed: list[ops.PackedWeight]) -> Case:
    """The gated product of x with each [2I, K] weight in turn."""
    (n, k), m, size = plain[0].shape, x.shape[0], x.element_size()
    ours, torchs = itertools.cycle(packed), itertools.cycle(plain)
    return Case(
        "linear_swiglu",
        f"{tag}:{m}x2x{n // 2}x{k}",
        NAMES[x.dtype],
        lambda: ops.linear_swiglu(x, next(ours)),
        lambda: ops.linear_swiglu_torch(x, next(torchs)),
        bytes=(n * k + m * (n // 2 + k)) * size,
        flops=2 * m * n * k,
    )


def pack_case(w: Tensor, dtype: torch.dtype) -> Case:
    """Packing one weight into fresh memory."""
    n, k = w.shape
    layout = ops.pack_weight(w, dtype).layout
    return Case(
        "pack_weight",
        f"{n}x{k} from {str(w.dtype).removeprefix('torch.')}",
        NAMES[dtype],
        lambda: ops.pack_weight(w, dtype),
        lambda: ops.pack_weight_torch(w, dtype, layout),
        bytes=n * k * (w.element_size() + dtype.itemsize),
    )


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Attention and shared-expert projections, the head, a vision projection in fp32, packing."""
    bf16, fp32, device = torch.bfloat16, torch.float32, generator.device
    all_rows = GPU_ROWS if on_gpu(generator) else ROWS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    for dtype, shapes, rows in (
        (bf16, LITE, all_rows),
        (bf16, FLASH, (1, 16, 512)),
        (fp32, LITE[:1], all_rows),
        (fp32, [("vision_proj", 1280, 1280)], (256, 1024)),
    ):
        for tag, n, k in shapes:
            plain = rotation(n, k, dtype, generator)
            packed = [ops.pack_weight(w, dtype) for w in plain]
            for m in rows:
                yield linear_case(tag, normal(m, k).to(dtype), plain, packed)
            for quant in QUANTS if on_gpu(generator) and dtype == bf16 else ():
                packed = [ops.pack_weight(w, dtype, quant=quant) for w in plain]
                for m in (1, 8):
                    yield linear_case(tag, normal(m, k).to(dtype), plain, packed)
    plain = rotation(2 * 2816, 2048, bf16, generator)
    packed = [ops.pack_gate_up(w[:2816], w[2816:], bf16) for w in plain]
    for m in all_rows:
        yield swiglu_case("shared", normal(m, 2048).to(bf16), plain, packed)
    del plain, packed
    head = normal(2048, 2048).bfloat16().repeat(62, 1)[:126464]
    packed = [ops.pack_weight(head, bf16)]
    for m in (1, 8):
        yield linear_case("lm_head", normal(m, 2048).to(bf16), [head], packed)
    del head, packed
    for source in (fp32, bf16):
        yield pack_case(normal(2816, 2048).to(source), bf16)
