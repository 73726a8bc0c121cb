"""Communication between the ranks of one model; a single process is the group of one."""

from __future__ import annotations

import torch


class Comm:
    """The group of one rank: every collective is the identity. Multi-process groups derive from it."""

    rank = 0
    world = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of ``x`` over the ranks, in rank order on every rank (the same bits everywhere)."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of all ranks concatenated along the last dim, in rank order."""
        return x
