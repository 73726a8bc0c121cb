"""Bench rows of attention: encoders, prefill and decode at the real head counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from .. import peers
from ..timing import Case, on_gpu

# tag, heads, head_dim, segment length, segments
ENCODERS = [
    ("vision full 1024", 16, 80, 1024, 1),
    ("vision full 4096", 16, 80, 4096, 1),
    ("vision windows 64x64", 16, 80, 64, 64),
    ("whisper 1500", 20, 64, 1500, 1),
    ("sanm 500", 4, 128, 500, 1),
]
# tag, items, frames of each, chunk (None: full attention), bias of relative positions; 8 heads of 64
FLOWS = [
    ("flow full 200", 2, 200, None, False),
    ("flow full 860", 2, 860, None, False),
    ("flow chunks 500/50", 2, 500, 50, False),
    ("flow encoder 250", 1, 250, None, True),
]
THINKERS = [("lite", 16, 4, 128), ("flash", 32, 4, 128)]
PREFILL = [(128, 128), (512, 512), (2048, 2048), (512, 2048)]  # queries, keys
DECODE = [(context, batch) for context in (128, 1024, 8192) for batch in (1, 4, 16)]
GPU_PREFILL = [*PREFILL, (4096, 4096), (8192, 8192)]
GPU_DECODE = [(context, batch) for context in (1024, 8192, 32768) for batch in (1, 8, 32)]
PAGE = 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def paged_arguments(generator, dtype, heads, kv_heads, dim, queries, keys, batch):
    """A shuffled cache holding `batch` sequences of `keys` tokens each, and their last `queries` queries."""
    device = generator.device
    per_sequence = -(-keys // PAGE)
    shape = (batch * per_sequence, kv_heads, PAGE, dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
    table = torch.randperm(shape[0], generator=generator, device=device).view(batch, per_sequence).int()
    q = torch.randn(batch * queries, heads, dim, generator=generator, device=device).to(dtype)
    cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * queries
    return q, k, v, table, cu, torch.full((batch,), keys, dtype=torch.int32, device=device)


def gathered(q, k, v, table, cu, lengths):
    """The same as contiguous q, k, v [B, heads, rows, dim] for scaled_dot_product_attention."""
    batch, keys = table.shape[0], int(lengths[0])
    k, v = (
        x[table.long()].transpose(1, 2).reshape(batch, x.shape[1], -1, x.shape[3])[:, :, :keys].contiguous()
        for x in (k, v)
    )
    return q.view(batch, -1, *q.shape[1:]).transpose(1, 2).contiguous(), k, v


def flow_cases(generator: torch.Generator) -> Iterator[Case]:
    """The flow model's, in fp32: guidance as a batch of two, chunks, and a bias that rows share in memory."""
    device, heads, dim = generator.device, 8, 64
    for tag, items, frames, chunk, biased in FLOWS:
        qkv = torch.randn(items * frames, 3, heads, dim, generator=generator, device=device)
        q, k, v = qkv.unbind(1)
        ends = [min(end, frames) for end in range(chunk or frames, frames + (chunk or 1), chunk or frames)]
        cu = [0, *(item * frames + end for item in range(items) for end in ends)]
        keys = [(item * frames, item * frames + end) for item in range(items) for end in ends]
        cu, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in (cu, keys))
        options = {"keys": keys}
        if biased:
            wide = torch.randn(heads, frames, 2 * frames - 1, generator=generator, device=device)
            strides = (wide.stride(0), wide.stride(1) - 1, 1)
            options["bias"] = wide.as_strided((heads, frames, frames), strides, frames - 1)
        pairs = int(((keys[:, 1] - keys[:, 0]) * cu.diff()).sum())
        yield Case(
            "attention_varlen",
            tag,
            "fp32",
            lambda: ops.attention_varlen(q, k, v, cu, **options),  # noqa: B023
            lambda: ops.attention_varlen_torch(q, k, v, cu, **options),  # noqa: B023
            bytes=qkv.nbytes * 4 // 3,
            flops=4 * pairs * heads * dim,
        )


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Against scaled_dot_product_attention; the paged rows gather the pages for it first."""
    yield from flow_cases(generator)
    for name, dtype in DTYPES.items():
        for tag, heads, dim, length, segments in ENCODERS:
            if name == "fp32" and length > 2000:
                continue
            qkv = torch.randn(
                length * segments, 3, heads, dim, generator=generator, device=generator.device
            ).to(dtype)
            q, k, v = qkv.unbind(1)
            cu = torch.arange(segments + 1, dtype=torch.int32, device=generator.device) * length

            def separate(q=q, k=k, v=v, segments=segments):
                return [x.unflatten(0, (segments, -1)).transpose(1, 2).contiguous() for x in (q, k, v)]

            yield Case(
                "attention_varlen",
                tag,
                name,
                lambda: ops.attention_varlen(q, k, v, cu),  # noqa: B023
                lambda: ops.attention_varlen_torch(q, k, v, cu),  # noqa: B023
                bytes=qkv.numel() * qkv.element_size() * 4 // 3,
                flops=4 * segments * length * length * heads * dim,
                peers=peers.sdpa_peers(separate, causal=False),
            )
        for model, heads, kv_heads, dim in THINKERS:
            prefill, decode = (GPU_PREFILL, GPU_DECODE) if on_gpu(generator) else (PREFILL, DECODE)
            shapes = [(f"prefill {n}/{m}", n, m, 1) for n, m in prefill]
            shapes += [(f"decode {m} b{batch}", 1, m, batch) for m, batch in decode]
            for tag, queries, keys, batch in shapes:
                if name == "fp32" and (model == "flash" or batch == 16 or on_gpu(generator)):
                    continue  # flash runs in bf16, and so does everything on a GPU
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
                    peers=peers.sdpa_peers(
                        lambda arguments=arguments: gathered(*arguments), causal=queries == keys
                    )
                    if queries in (1, keys)
                    else {},
                )
