"""Looking at intermediates: a model calls ``tap(name, tensor)`` on its way; by default nobody listens."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tap = Callable[[str, torch.Tensor], None]


def no_tap(name: str, tensor: torch.Tensor) -> None:
    """Discards an intermediate."""


def prefixed(tap: Tap, prefix: str) -> Tap:
    """A tap that puts ``prefix`` before every name."""
    return lambda name, tensor: tap(prefix + name, tensor)
