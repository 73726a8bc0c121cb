"""Bench rows of the mixture of experts at the real dimensions of the two backbones.

Ming-Lite-Omni whole (64 experts, top 6); Ming-flash-omni with 64 of its 256 experts, to fit in memory. Loads:
``even`` (a random choice per token), ``hot`` (expert 0 in every token, the other choices random) and ``same``
(every token chooses the same experts, all others stay empty).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ming_rt import ops

from ..timing import Case


@dataclass(frozen=True)
class Model:
    """Dimensions of one MoE layer; ``experts`` are those the grouped products of the bench hold."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    routed: int  # experts the router knows
    route: dict


SIGMOID = {"kind": "grouped_sigmoid", "n_group": 8, "topk_group": 4, "scaling": 2.5}
LITE = Model("lite", 2048, 1408, 64, 6, 64, {"kind": "softmax"})
FLASH = Model("flash", 4096, 1024, 64, 8, 256, SIGMOID)
ROWS = {"lite": (1, 2, 4, 8, 16, 32, 64, 512), "flash": (1, 16, 512)}
LOADS = ("even", "hot", "same")


def choices(model: Model, tokens: int, load: str, generator: torch.Generator) -> Tensor:
    """topk_ids int32 [tokens, top_k] of one load."""
    scores = torch.rand(1 if load == "same" else tokens, model.experts, generator=generator)
    scores = scores.expand(tokens, -1).clone()
    if load == "hot":
        scores[:, 0] = 2.0
    return scores.topk(model.top_k).indices.sort().values.int()


def route_case(model: Model, tokens: int, generator: torch.Generator) -> Case:
    """Three routers, a third of the tokens each."""
    x = torch.randn(tokens, model.hidden, generator=generator).bfloat16()
    weights = torch.randn(3, model.routed, model.hidden, generator=generator) * model.hidden**-0.5
    bias = torch.zeros(3, model.routed) if model.route["kind"] == "grouped_sigmoid" else None
    routers = ops.RouterWeights(weights, bias)
    modality = torch.arange(tokens).remainder(3).to(torch.uint8) if tokens > 1 else None
    return Case(
        "moe_route",
        f"{model.name}:{tokens}x{model.hidden} E{model.routed} top{model.top_k}",
        "fp32",
        lambda: ops.moe_route(x, routers, modality, top_k=model.top_k, **model.route),
        lambda: ops.moe_route_torch(x, (weights, bias), modality, top_k=model.top_k, **model.route),
        bytes=x.numel() * 2 + weights[0].numel() * 4 * min(tokens, 3),
        flops=2 * tokens * model.routed * model.hidden,
    )


def small_cases(model: Model, tokens: int, generator: torch.Generator) -> Iterator[Case]:
    """Permutation and weighted combination."""
    shape = f"{model.name}:{tokens} top{model.top_k}"
    ids = choices(model, tokens, "even", generator)
    yield Case(
        "moe_permute",
        shape,
        "i32",
        lambda: ops.moe_permute(ids, model.experts),
        lambda: ops.moe_permute_torch(ids, model.experts),
        bytes=ids.numel() * 8,
    )
    y = torch.randn(tokens * model.top_k, model.hidden, generator=generator).bfloat16()
    weights = torch.rand(tokens, model.top_k, generator=generator)
    shared = y[:tokens].clone()
    yield Case(
        "moe_combine",
        f"{shape} x{model.hidden}",
        "bf16",
        lambda: ops.moe_combine(y, weights, shared),
        lambda: ops.moe_combine_torch(y, weights, shared),
        bytes=(y.numel() + 2 * shared.numel()) * 2,
    )


def grouped_cases(
    model: Model, tokens: int, load: str, packed: ops.ExpertWeights, plain: list, generator: torch.Generator
) -> Iterator[Case]:
    """The two grouped products of one load."""
    ids = choices(model, tokens, load, generator)
    rows, offsets = ops.moe_permute(ids, model.experts)
    active, slots = int((offsets[1:] > offsets[:-1]).sum()), ids.numel()
    x = torch.randn(tokens, model.hidden, generator=generator).bfloat16()
    h = torch.randn(slots, model.width, generator=generator).bfloat16()
    expert = model.hidden * model.width
    shape = f"{model.name}:{tokens} top{model.top_k}/{model.experts} {load}"
    yield Case(
        "grouped_gemm_swiglu",
        shape,
        "bf16",
        lambda: ops.grouped_gemm_swiglu(x, rows, offsets, model.top_k, packed),
        lambda: ops.grouped_gemm_swiglu_torch(x, rows, offsets, model.top_k, plain),
        bytes=2 * (2 * active * expert + x.numel() + h.numel()),
        flops=4 * slots * expert,
    )
    yield Case(
        "grouped_gemm_down",
        shape,
        "bf16",
        lambda: ops.grouped_gemm_down(h, rows, offsets, packed),
        lambda: ops.grouped_gemm_down_torch(h, rows, offsets, plain),
        bytes=2 * (active * expert + h.numel() + slots * model.hidden),
        flops=2 * slots * expert,
    )


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Every step for both models, tokens from one up, even and skewed loads."""
    for model in (LITE, FLASH):
        for tokens in (1, 16, 512):
            yield route_case(model, tokens, generator)
            yield from small_cases(model, tokens, generator)
        gate = (torch.randn(model.width, model.hidden, generator=generator) * model.hidden**-0.5).bfloat16()
        down = (torch.randn(model.hidden, model.width, generator=generator) * model.width**-0.5).bfloat16()
        packed = ops.pack_experts(model.experts, model.hidden, model.width, torch.bfloat16)
        plain = []
        for e in range(model.experts):  # equal values in separate memory
            packed.set(e, gate, gate, down)
            plain.append((torch.cat([gate, gate]), down.clone()))
        for tokens in ROWS[model.name]:
            for load in LOADS if tokens in (16, 512) else LOADS[:1]:
                yield from grouped_cases(model, tokens, load, packed, plain, generator)
        del packed, plain
