"""Shared fixtures. Kernel tests take ``isa`` to run once per instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch

from ming_rt import ops


@pytest.fixture(params=ops.available_isas())
def isa(request):
    """Runs the test with each instruction set this CPU has."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(1234)
