"""Linear layers, whole or split over the ranks of one model."""

from __future__ import annotations

import torch

from ming_rt import ops
from ming_rt.errors import UnsupportedError
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.weights import WeightSource


def share(what: str, count: int, world: int) -> int:
    """``count / world``.

    Raises:
        UnsupportedError: it does not divide; the message names ``what``.
    """
    if count % world:
        raise UnsupportedError(
            f"{what}: {count} cannot be split over {world} ranks; expected a divisor of it"
        )
    return count // world


class Replicated:
    """A view of a ``WeightSource`` for the encoders: every rank gets the whole tensor, none is quantised."""

    rank, world, quant = 0, 1, None

    def __init__(self, src: WeightSource) -> None:
        self.dtype, self.device = src.dtype, src.device
        self.tensor, self.has = src.tensor, src.has


class Linear:
    """``y = act(x W^T + b)``, the whole layer on every rank."""

    def __init__(self, src: WeightSource, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        self.weight = ops.pack_weight(src.tensor(f"{name}.weight", (outputs, inputs)), src.dtype)
        self.bias = src.tensor(f"{name}.bias", (outputs,), src.dtype) if bias else None

    def __call__(
        self, x: torch.Tensor, *, act: str | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x`` ``[M, inputs]`` -> ``[M, outputs]``; ``residual`` is added after the activation."""
        return ops.linear(x, self.weight, self.bias, act=act, residual=residual)


class RowParallelLinear:
    """Each rank holds its share of the inputs; the partial sums meet in one all_reduce.

    Without a ``comm`` the partial sum is returned, for a caller that adds more before it reduces.
    """

    def __init__(
        self,
        src: WeightSource,
        comm: Comm | None,
        name: str,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
    ) -> None:
        share(name, inputs, src.world)
        shard = (1, src.rank, src.world)
        self.comm = comm
        weight = src.tensor(f"{name}.weight", (outputs, inputs), shard=shard)
        self.weight = ops.pack_weight(weight, src.dtype, quant=src.quant)
        whole_bias = src.tensor(f"{name}.bias", (outputs,), src.dtype) if bias else None
        self.bias = whole_bias if src.rank == 0 else None  # added once, not once per rank

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[M, inputs / world]`` -> ``[M, outputs]``."""
        y = ops.linear(x, self.weight, self.bias)
        return self.comm.all_reduce(y) if self.comm else y


class QKVLinear:
    """Merged projection; the rows are all query heads, then all key heads, then all value heads.

    Each rank takes the same share of the three groups: ``heads / world`` and ``kv_heads / world`` heads.
    """

    def __init__(
        self,
        src: WeightSource,
        name: str,
        inputs: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
    ) -> None:
        self.heads = share(f"{name} query heads", heads, src.world)
        self.kv_heads = share(f"{name} key/value heads", kv_heads, src.world)
        outputs = (heads + 2 * kv_heads) * head_dim
        groups = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)

        def mine(whole: torch.Tensor) -> torch.Tensor:
            if src.world == 1:
                return whole
            return torch.cat([g.chunk(src.world)[src.rank] for g in whole.split(groups)])

        # Read whole: a mapped view costs nothing, and three row ranges are taken from it.
        weight = mine(src.tensor(f"{name}.weight", (outputs, inputs)))
        self.weight = ops.pack_weight(weight, src.dtype, quant=src.quant)
        self.bias = mine(src.tensor(f"{name}.bias", (outputs,), src.dtype)) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, inputs]`` -> ``[N, (heads + 2 kv_heads) * head_dim]`` of this rank."""
        return ops.linear(x, self.weight, self.bias)
