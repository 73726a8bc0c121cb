"""Bench rows of attention: encoders, prefill and decode at the real head counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case

# tag, heads, head_dim, segment length, segments
ENCODERS = [
    ("vision full 1024", 16, 80, 1024, 1),
    ("vision full 4096", 16, 80, 4096, 1),
    ("vision windows 64x64", 16, 80, 64, 64),
    ("whisper 1500", 20, 64, 1500, 1),
    ("sanm 500", 4, 128, 500, 1),
]
THINKERS = [("lite", 16, 4, 128), ("flash", 32, 4, 128)]
PREFILL = [(128, 128), (512, 512), (2048, 2048), (512, 2048)]  # queries, keys
DECODE = [(context, batch) for context in (128, 1024, 8192) for batch in (1, 4, 16)]
PAGE = 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def paged_arguments(generator, dtype, heads, kv_heads, dim, queries, keys, batch):
    """A shuffled cache holding `batch` sequences of `keys` tokens each, and their last `queries` queries."""
    per_sequence = -(-keys // PAGE)
    shape = (batch * per_sequence, kv_heads, PAGE, dim)
    k, v = (torch.empty(shape, dtype=dtype).normal_(generator=generator) for _ in range(2))
    table = torch.randperm(shape[0], generator=generator).view(batch, per_sequence).int()
    q = torch.randn(batch * queries, heads, dim, generator=generator).to(dtype)
    cu = torch.arange(batch + 1, dtype=torch.int32) * queries
    return q, k, v, table, cu, torch.full((batch,), keys, dtype=torch.int32)


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Against scaled_dot_product_attention; the paged rows gather the pages for it first."""
    for name, dtype in DTYPES.items():
        for tag, heads, dim, length, segments in ENCODERS:
            if name == "fp32" and length > 2000:
                continue
            qkv = torch.randn(length * segments, 3, heads, dim, generator=generator).to(dtype)
            q, k, v = qkv.unbind(1)
            cu = torch.arange(segments + 1, dtype=torch.int32) * length
            yield Case(
                "attention_varlen",
                tag,
                name,
                lambda: ops.attention_varlen(q, k, v, cu),  # noqa: B023
                lambda: ops.attention_varlen_torch(q, k, v, cu),  # noqa: B023
                bytes=qkv.numel() * qkv.element_size() * 4 // 3,
                flops=4 * segments * length * length * heads * dim,
            )
        for model, heads, kv_heads, dim in THINKERS:
            shapes = [(f"prefill {n}/{m}", n, m, 1) for n, m in PREFILL]
            shapes += [(f"decode {m} b{batch}", 1, m, batch) for m, batch in DECODE]
            for tag, queries, keys, batch in shapes:
                if name == "fp32" and (model == "flash" or batch == 16):
                    continue  # the CPU runs flash in bf16
                arguments = paged_arguments(generator, dtype, heads, kv_heads, dim, queries, keys, batch)
                pairs = queries * (2 * keys - queries + 1) // 2
                yield Case(
                    "attention_paged",
                    f"{model} {tag}",
                    name,
                    lambda: ops.attention_paged(*arguments),  # noqa: B023
                    lambda: ops.attention_paged_torch(*arguments),  # noqa: B023
                    bytes=sum(x.numel() * x.element_size() for x in arguments[1:3]) + 2 * arguments[0].nbytes,
                    flops=4 * batch * pairs * heads * dim,
                )
