"""Bench rows of the rope ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu

# name, query heads, KV heads, head_dim, frequencies, per-head norm
MODELS = [("lite", 16, 4, 128, 64, False), ("flash", 32, 4, 128, 32, True)]
PAGE = 32


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Angle tables, rotation fused with the KV append (decode, prefill), the vision tower's rotation."""
    device = generator.device
    counts = (1, 8, 16, 512, 4096) if on_gpu(generator) else (1, 16, 512)
    inv_freq, axis = ops.inv_freq(600000.0, 128).to(device), ops.axis_table("3D", 64).to(device)
    for tokens in counts:
        positions = torch.randint(0, 8000, (3, tokens), generator=generator, dtype=torch.int32, device=device)
        yield Case(
            "rope_table",
            f"{tokens}x64",
            "fp32",
            lambda: ops.rope_table(positions, inv_freq, axis),  # noqa: B023
            lambda: ops.rope_table_torch(positions, inv_freq, axis),  # noqa: B023
            bytes=tokens * 64 * 8,
        )
    for name, heads, kv_heads, dim, freqs, norm in MODELS:
        for tokens in counts:
            width = (heads + 2 * kv_heads) * dim
            qkv = torch.randn(tokens, width, generator=generator, device=device).bfloat16()
            angles = torch.randn(tokens, freqs, generator=generator, device=device)
            pages = torch.zeros(2, tokens // PAGE + 4, kv_heads, PAGE, dim, dtype=qkv.dtype, device=device)
            slots = torch.arange(tokens, device=device) + 5
            weights = [torch.ones(dim, dtype=qkv.dtype, device=device)] * 2 if norm else [None, None]
            arguments = (qkv, angles.cos(), angles.sin(), *pages, slots, heads, *weights, 1e-6)
            yield Case(
                "rope_append",
                f"{name} {tokens} tokens",
                "bf16",
                lambda: ops.rope_append(*arguments),  # noqa: B023
                lambda: ops.rope_append_torch(*arguments),  # noqa: B023
                bytes=qkv.numel() * 4 + angles.numel() * 8,
            )
    qkv = torch.randn(4096, 3 * 16 * 80, generator=generator, device=device).bfloat16()
    angles = torch.randn(4096, 40, generator=generator, device=device)
    cos, sin = angles.cos(), angles.sin()
    yield Case(
        "rope_qk",
        "vision 4096x16x80",
        "bf16",
        lambda: ops.rope_qk_(qkv, cos, sin, 16),
        lambda: ops.rope_qk_torch_(qkv, cos, sin, 16),
        bytes=qkv.numel() * 8 // 3 + angles.numel() * 8,
    )
