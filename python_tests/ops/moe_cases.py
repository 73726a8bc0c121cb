"""Experts and choices of them that the tests of routing and of the experts share."""

from __future__ import annotations

import torch

from ming_rt import ops

LOADS = ["random", "hot", "single", "two"]


def choices(rng, tokens, experts, top_k, load):
    """topk_ids: random; every token also on expert 0; all on the first top_k; only first and last experts."""
    if load == "single":
        return torch.arange(top_k, dtype=torch.int32).repeat(tokens, 1)
    ids = torch.rand(tokens, experts, generator=rng)
    if load == "hot":
        ids[:, 0] = 2.0
    if load == "two" and experts > 2 * top_k:
        ids[:, top_k : experts - top_k] = -1.0
    return ids.topk(top_k).indices.sort().values.int()


def make_experts(rng, experts, hidden, width, dtype, quant=None):
    """The packed experts, and the float64 weights they hold."""
    packed = ops.pack_experts(experts, hidden, width, dtype, quant=quant)
    plain = []
    for e in range(experts):
        gate, up = ((torch.randn(width, hidden, generator=rng) * hidden**-0.5).to(dtype) for _ in range(2))
        down = (torch.randn(hidden, width, generator=rng) * width**-0.5).to(dtype)
        packed.set(e, gate, up, down)
        plain.append((torch.cat([gate, up]).double(), down.double()))
    return packed, [packed.unpack(e, torch.float64) for e in range(experts)] if quant else plain
