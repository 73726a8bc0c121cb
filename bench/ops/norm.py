"""Bench rows of rms_norm and layer_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from .. import peers
from ..timing import Case, on_gpu

SIZES = [(1, 2048), (16, 2048), (512, 2048), (1, 4096), (512, 4096), (1024, 1280)]
GPU_SIZES = [*SIZES, (8, 2048), (4096, 2048), (4096, 4096)]


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Residual-fused RMSNorm of both backbones, the vision tower's, and the audio encoder's LayerNorm."""
    device = generator.device
    for rows, dim in GPU_SIZES if on_gpu(generator) else SIZES:
        x = torch.randn(rows, dim, generator=generator, device=device).bfloat16()
        residual, weight = torch.randn_like(x), torch.ones(dim, dtype=x.dtype, device=device)

        def composition(x=x, residual=residual, weight=weight):
            return ops.rms_norm_torch(x, weight, 1e-6, residual=residual)

        yield Case(
            "rms_norm+residual",
            f"{rows}x{dim}",
            "bf16",
            lambda: ops.rms_norm(x, weight, 1e-6, residual=residual),  # noqa: B023
            composition,
            bytes=x.numel() * 8,
            peers={"compile": lambda: peers.compiled(composition)},
        )
    x = torch.randn(1500, 1280, generator=generator, device=device).bfloat16()
    weight = torch.ones(1280, dtype=x.dtype, device=device)
    bias = torch.zeros(1280, dtype=x.dtype, device=device)
    yield Case(
        "layer_norm",
        "1500x1280",
        "bf16",
        lambda: ops.layer_norm(x, weight, bias, 1e-5),
        lambda: ops.layer_norm_torch(x, weight, bias, 1e-5),
        bytes=x.numel() * 4,
    )
