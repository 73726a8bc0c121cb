"""Weight normalisation, undone while loading."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ming_rt.runtime.weights import Shard, WeightSource

SPELLINGS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)


class WeightNormed:
    """A view of a ``WeightSource`` in which every ``X.weight`` is ``g v / |v|`` of two stored tensors.

    ``|v|`` is the norm over all dims but the first, in fp32, or in fp64 where that is asked for. Both of
    torch's spellings of the two names are read; a source that knows no names is asked for the older one,
    ``X.weight_g`` and ``X.weight_v``.
    """

    def __init__(self, src: WeightSource) -> None:
        self.src = src
        self.dtype, self.device, self.quant = src.dtype, src.device, src.quant
        self.rank, self.world = src.rank, src.world
        self.has = src.has

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        """As ``WeightSource.tensor``; a weight of its own, never a view."""
        base, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return self.src.tensor(name, shape, dtype, shard)
        if shard is not None:
            raise ValueError(f"{name}: expected a whole weight, got shard {shard}")
        full = tuple(shape)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        names = next((s for s in SPELLINGS if self.src.has(f"{base}.{s[1]}")), SPELLINGS[-1])
        gain, direction = (
            self.src.tensor(f"{base}.{part}", size, work)
            for part, size in zip(names, ((full[0], *(1,) * (len(full) - 1)), full), strict=True)
        )
        norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, len(full))), keepdim=True)
        return (direction * (gain / norm)).to(dtype or work)
