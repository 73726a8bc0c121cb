"""Bench rows of the mixture of experts at the real dimensions of the two backbones.

Ming-Lite-Omni whole (64 experts, top 6); Ming-flash-omni with 64 of its 256 experts on the CPU, to fit in
memory, and with all of them on a GPU. Loads:
``even`` (a random choice per token), ``hot`` (expert 0 in every token, the other choices random) and ``same``
(every token chooses the same experts, all others stay empty).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ming_rt import ops

from .. import peers
from ..timing import Case, on_gpu


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
GPU_ROWS = {"lite": (*ROWS["lite"], 4096), "flash": (1, 2, 4, 8, 16, 32, 64, 512, 4096)}
LOADS = ("even", "hot", "same")
QUANTS = ("int8", "int4")


class Plain:
    """Plain weights: gate_up [E, 2 * width, hidden], down [E, hidden, width], a pair of them per expert."""

    def __init__(self, gate: Tensor, down: Tensor, experts: int) -> None:
        self.gate_up = torch.cat([gate, gate]).repeat(experts, 1, 1)
        self.down = down.repeat(experts, 1, 1)
        self.pairs = list(zip(self.gate_up, self.down, strict=True))


def choices(model: Model, tokens: int, load: str, generator: torch.Generator) -> Tensor:
    """topk_ids int32 [tokens, top_k] of one load."""
    rows = 1 if load == "same" else tokens
    scores = torch.rand(rows, model.experts, generator=generator, device=generator.device)
    scores = scores.expand(tokens, -1).clone()
    if load == "hot":
        scores[:, 0] = 2.0
    return scores.topk(model.top_k).indices.sort().values.int()


def route_case(model: Model, tokens: int, generator: torch.Generator) -> Case:
    """Three routers, a third of the tokens each."""
    device = generator.device
    x = torch.randn(tokens, model.hidden, generator=generator, device=device).bfloat16()
    weights = torch.randn(3, model.routed, model.hidden, generator=generator, device=device)
    weights *= model.hidden**-0.5
    sigmoid = model.route["kind"] == "grouped_sigmoid"
    bias = torch.zeros(3, model.routed, device=device) if sigmoid else None
    routers = ops.RouterWeights(weights, bias)
    modality = torch.arange(tokens, device=device).remainder(3).to(torch.uint8) if tokens > 1 else None
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
    device = generator.device
    y = torch.randn(tokens * model.top_k, model.hidden, generator=generator, device=device).bfloat16()
    weights = torch.rand(tokens, model.top_k, generator=generator, device=device)
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
    model: Model, tokens: int, load: str, packed: ops.ExpertWeights, plain: Plain, generator: torch.Generator
) -> Iterator[Case]:
    """The two grouped products of one load."""
    device = generator.device
    ids = choices(model, tokens, load, generator)
    rows, offsets = ops.moe_permute(ids, model.experts)
    active, slots = int((offsets[1:] > offsets[:-1]).sum()), ids.numel()
    x = torch.randn(tokens, model.hidden, generator=generator, device=device).bfloat16()
    h = torch.randn(slots, model.width, generator=generator, device=device).bfloat16()
    expert = model.hidden * model.width
    shape = f"{model.name}:{tokens} top{model.top_k}/{model.experts} {load}"
    suffix = "" if packed.quant is None else f" {packed.quant}"
    each = {"gate_up": packed.gate_up.nbytes / model.experts, "down": packed.down.nbytes / model.experts}
    yield Case(
        f"grouped_gemm_swiglu{suffix}",
        shape,
        "bf16",
        lambda: ops.grouped_gemm_swiglu(x, rows, offsets, model.top_k, packed),
        lambda: ops.grouped_gemm_swiglu_torch(x, rows, offsets, model.top_k, plain.pairs),
        bytes=int(active * each["gate_up"]) + 2 * (x.numel() + h.numel()),
        flops=4 * slots * expert,
        peers=peers.grouped_peers(
            lambda: (x[rows.long() // model.top_k], plain.gate_up), offsets, swiglu=True
        ),
    )
    yield Case(
        f"grouped_gemm_down{suffix}",
        shape,
        "bf16",
        lambda: ops.grouped_gemm_down(h, rows, offsets, packed),
        lambda: ops.grouped_gemm_down_torch(h, rows, offsets, plain.pairs),
        bytes=int(active * each["down"]) + 2 * (h.numel() + slots * model.hidden),
        flops=2 * slots * expert,
        peers=peers.grouped_peers(lambda: (h, plain.down), offsets, swiglu=False),
    )


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Every step for both models, tokens from one up, even and skewed loads."""
    gpu = on_gpu(generator)
    for model in (LITE, replace(FLASH, experts=FLASH.routed) if gpu else FLASH):
        for tokens in (1, 8, 16, 512, 4096) if gpu else (1, 16, 512):
            yield route_case(model, tokens, generator)
            yield from small_cases(model, tokens, generator)
        gate, down = (
            (torch.randn(n, k, generator=generator, device=generator.device) * k**-0.5).bfloat16()
            for n, k in ((model.width, model.hidden), (model.hidden, model.width))
        )
        packed = ops.pack_experts(model.experts, model.hidden, model.width, torch.bfloat16)
        for e in range(model.experts):  # equal values in separate memory
            packed.set(e, gate, gate, down)
        plain = Plain(gate, down, model.experts)
        skewed = (16, 512, 4096) if gpu else (16, 512)
        for quant in QUANTS if gpu else ():
            few = ops.pack_experts(model.experts, model.hidden, model.width, torch.bfloat16, quant=quant)
            for e in range(model.experts):
                few.set(e, gate, gate, down)
            for tokens in (1, 8):
                yield from grouped_cases(model, tokens, LOADS[0], few, plain, generator)
        for tokens in (GPU_ROWS if gpu else ROWS)[model.name]:
            for load in LOADS if tokens in skewed else LOADS[:1]:
                yield from grouped_cases(model, tokens, load, packed, plain, generator)
        del packed, plain
