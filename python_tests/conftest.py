"""Shared fixtures. Kernel tests take ``backend`` (or ``isa``, for ops that run on the CPU only)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from ming_rt import ops
from ming_rt.runtime.device import resolve

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = (
    *ops.available_isas(),
    "emu",
    *(["cuda"] if torch.cuda.is_available() and not ops.cuda_missing else []),
)


@functools.cache
def build_emulation() -> None:
    """Compiles the CUDA sources for the CPU, or what changed of them."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MING_RT_MODULES": "emu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"building ming_rt._emu failed:\n{done.stdout}\n{done.stderr}"


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Kernels of one backend: an instruction set of the CPU, ``emu`` (CUDA kernels emulated) or ``cuda``."""
    if backend in ops.ISAS:
        before = ops.isa()
        ops.set_isa(backend)
        try:
            yield
        finally:
            ops.set_isa(before)
        return
    if backend == "emu":
        build_emulation()
    with ops.emulated() if backend == "emu" else nullcontext():
        yield
        ops.check_device()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each instruction set of this CPU, the emulated CUDA kernels, and a GPU if there is one.

    A test's tensors are made on the GPU then.
    """
    with using(request.param), torch.device("cuda") if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.fixture(params=ops.available_isas())
def isa(request):
    """Each instruction set of this CPU."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def device(request):
    """The device of each backend, for whole models; tensors have to be put there."""
    with using(request.param):
        yield resolve(request.param if request.param in ("emu", "cuda") else "cpu")


@pytest.fixture
def rng(request) -> torch.Generator:
    """A generator with a fixed seed, on the device of the test's backend."""
    on_gpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda"
    return torch.Generator("cuda" if on_gpu else "cpu").manual_seed(1234)


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
