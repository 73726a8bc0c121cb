"""The compiled kernels for tensors of each kind of device, or one sentence that says why they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from torch import Tensor

try:
    from ming_rt import _cpu as cpu
except ImportError as error:
    raise ImportError(
        f"ming_rt has no compiled kernels here ({error}); install it with `pip install .`, or with "
        "`pip install -e .` to run from the source tree"
    ) from error

__all__ = [
    "check_device",
    "cpu",
    "cuda_missing",
    "emulate",
    "emulated",
    "is_emulating",
    "kernels",
    "on_device",
]

_modules: dict[str, ModuleType] = {"cpu": cpu}
cuda_missing: str | None = None
"""Why there are no CUDA kernels, or None."""

try:
    _modules["cuda"] = import_module("ming_rt._cuda")
except ModuleNotFoundError:
    cuda_missing = (
        "this build of ming_rt has no CUDA kernels (they are built where nvcc is found and MING_RT_MODULES "
        "does not leave them out)"
    )
except ImportError as error:
    cuda_missing = f"the CUDA kernels cannot be loaded ({error})"


def kernels(tensor: Tensor) -> ModuleType:
    """The kernels for tensors on the device of ``tensor``.

    Raises ValueError where there are none.
    """
    module = _modules.get(tensor.device.type)
    if module is None:
        kind = tensor.device.type
        reason = cuda_missing if kind == "cuda" else "expected CPU or CUDA tensors"
        raise ValueError(f"no kernels for tensors on {kind}: {reason}")
    return module


def is_emulating() -> bool:
    """Whether CPU tensors go to the emulated CUDA kernels."""
    return _modules["cpu"] is not cpu


def emulate(on: bool) -> None:
    """Send CPU tensors to the CUDA kernels emulated on the CPU, in the whole process; for tests of those.

    Raises ImportError where the emulation is not built.
    """
    if not on:
        _modules["cpu"] = cpu
        return
    try:
        _modules["cpu"] = import_module("ming_rt._emu")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the emulated CUDA kernels are not built; in the source tree, "
            "`MING_RT_MODULES=emu python setup.py build_ext --inplace` builds them"
        ) from error


@contextmanager
def emulated() -> Iterator[None]:
    """``emulate`` for a while; goes back to what was before, so that it may be nested."""
    before = is_emulating()
    emulate(True)
    try:
        yield
    finally:
        emulate(before)


def on_device(tensor: Tensor) -> bool:
    """Whether ``tensor`` is served by CUDA kernels, real or emulated."""
    return tensor.device.type == "cuda" or (tensor.device.type == "cpu" and is_emulating())


def check_device() -> None:
    """Raise what a CUDA kernel found wrong with indices in device memory since the last call.

    Kernels skip such accesses and go on; results of the step are then meaningless. Costs no wait for the
    device: call it after results have arrived.

    Raises ValueError: what was expected and the first offending value.
    """
    for module in _modules.values():
        if module is not cpu and (fault := module.take_fault()):
            expected, value = fault
            raise ValueError(f"{expected}, got {value} (found on the device)")
