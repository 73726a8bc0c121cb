"""Gated feed-forward block."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.layers.linear import RowParallelLinear, share
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.weights import WeightSource


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``, the width split over the ranks; without ``comm`` a partial sum."""

    def __init__(
        self, src: WeightSource, comm: Comm | None, name: str, hidden: int, width: int, *, bias: bool = False
    ) -> None:
        share(f"{name} width", width, src.world)
        shard = (0, src.rank, src.world)
        gate = src.tensor(f"{name}.gate_proj.weight", (width, hidden), shard=shard)
        up = src.tensor(f"{name}.up_proj.weight", (width, hidden), shard=shard)
        self.gate_up = ops.pack_gate_up(gate, up, src.dtype, quant=src.quant)
        self.bias = None
        if bias:
            halves = (f"{name}.gate_proj.bias", f"{name}.up_proj.bias")
            self.bias = torch.cat([src.tensor(half, (width,), src.dtype, shard) for half in halves])
        self.down = RowParallelLinear(src, comm, f"{name}.down_proj", width, hidden, bias=bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, hidden]`` -> ``[N, hidden]``."""
        return self.down(ops.linear_swiglu(x, self.gate_up, self.bias))
