"""Shared fixtures. Kernel tests take ``isa`` to run once per instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory) -> Path:
    """A user's cache directory of this test run, for XDG_CACHE_HOME."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def demo_model(cache_home) -> Callable[[str], Path]:
    """Directory of a generation's demo checkpoint, made once in ``cache_home``."""
    from ming_rt.demo import default_checkpoint

    def directory(generation: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache_home))
            return default_checkpoint(generation)

    return directory


@pytest.fixture(scope="session")
def demo_files(cache_home):
    """The demo's picture, recording and video."""
    from ming_rt.demo import demo_media

    return demo_media(cache_home / "media")
