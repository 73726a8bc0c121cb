"""What a model can run on: the CPU, an NVIDIA GPU, or the CUDA kernels emulated on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ming_rt import ops
from ming_rt.errors import InvalidRequestError, UnsupportedError, shown

CPU = torch.device("cpu")
LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix units and asynchronous copies
_FORMS = re.compile(r"auto|cpu|emu|cuda(:[0-9]{1,4})?")


@dataclass(frozen=True)
class Device:
    """One device. ``torch`` is where its tensors live, the CPU for "emu"; ``total_memory`` is in bytes.

    ``str()`` gives the form that ``resolve`` takes: "cpu", "cuda:0", "emu".
    """

    kind: Literal["cpu", "cuda", "emu"] = "cpu"
    torch: torch.device = CPU
    name: str = "CPU"
    capability: tuple[int, int] | None = None
    total_memory: int = 0

    def __str__(self) -> str:
        return str(self.torch) if self.kind == "cuda" else self.kind

    def current(self) -> AbstractContextManager[object]:
        """Makes a GPU torch's current one for a while: pinned memory is allocated through it alone."""
        return torch.cuda.device(self.torch) if self.kind == "cuda" else nullcontext()

    def hold(self) -> Callable[[], None]:
        """Directs the ops to this device's kernels until the function returned is called (once or more).

        Matters to "emu" only, whose tensors look like the CPU's: every CPU tensor of the process then goes to
        the emulated kernels, so that a "cpu" session must not run beside it.
        """
        return _Emulation() if self.kind == "emu" else lambda: None


def resolve(device: str = "auto") -> Device:
    """The device meant by "auto" (a GPU if one can be used, else the CPU), "cpu", "cuda", "cuda:N" or "emu".

    "cuda" is the first GPU that can be used; CUDA_VISIBLE_DEVICES hides and orders them as everywhere.

    Raises:
        InvalidRequestError: none of these forms.
        UnsupportedError: this build or machine has no such device.
    """
    if not isinstance(device, str) or not _FORMS.fullmatch(device):
        raise InvalidRequestError(
            f"device: found {shown(device)}, expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'emu'"
        )
    if device == "cpu":
        return _cpu()
    if device == "emu":
        try:
            importlib.import_module("ming_rt._emu")
        except ImportError as error:
            raise UnsupportedError(
                f"device: found 'emu', but the emulated kernels are not built ({_line(error)}); "
                "MING_RT_MODULES=emu python setup.py build_ext --inplace builds them"
            ) from error
        return Device("emu", name="CUDA kernels emulated on the CPU", total_memory=_cpu().total_memory)
    reason = cuda_reason()
    if reason and device != "auto":
        raise UnsupportedError(f"device: found {device!r}, but {reason}")
    if reason:
        return _cpu()
    count = torch.cuda.device_count()
    if ":" not in device:
        return _gpu(next(index for index in range(count) if not _too_old(index)))
    index = int(device.partition(":")[2])
    if index >= count:
        raise UnsupportedError(
            f"device: found {device!r}, expected a number below {count}, as many GPUs are visible"
        )
    if fault := _too_old(index):
        raise UnsupportedError(f"device: found {device!r}, but {fault}")
    return _gpu(index)


def available() -> list[Device]:
    """Every device that ``resolve`` would give out."""
    found = [_cpu()]
    if cuda_reason() is None:
        found += [_gpu(index) for index in range(torch.cuda.device_count()) if not _too_old(index)]
    if importlib.util.find_spec("ming_rt._emu"):
        found.append(resolve("emu"))
    return found


def cuda_reason() -> str | None:
    """Why no GPU can be used, in one sentence without a full stop; None where one can."""
    if ops.cuda_missing:
        return ops.cuda_missing
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is a build without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    note = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {shown(hidden)}"
    try:
        if not importlib.import_module("ming_rt._cuda").device_count():
            return f"no GPU is visible{note}"
    except RuntimeError as error:  # the driver is missing, too old, or finds nothing
        return f"no GPU can be reached ({_line(error)}){note}"
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) cannot use the CUDA driver, which the kernels can"
    faults = [_too_old(index) for index in range(torch.cuda.device_count())]
    return faults[0] if all(faults) else None


def _too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
    return (
        f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {found}, "
        f"expected at least {least}"
    )


def _cpu() -> Device:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(name=f"{platform.machine()}, {ops.isa()}", total_memory=memory)


def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        "cuda",
        torch.device("cuda", index),
        properties.name,
        torch.cuda.get_device_capability(index),
        properties.total_memory,
    )


def _line(error: Exception) -> str:
    """The first line of a message that somebody else wrote."""
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


class _Emulation:
    """One user of the emulated kernels; the last one to go leaves the ops as the first one found them."""

    _lock = threading.RLock()  # a user may go in a garbage collection on the thread that holds it
    _users: ClassVar[set[_Emulation]] = set()
    _before = False

    def __init__(self) -> None:
        with self._lock:
            if not self._users:
                _Emulation._before = ops.is_emulating()
                ops.emulate(True)
            self._users.add(self)

    def __call__(self) -> None:
        with self._lock:
            if self in self._users:
                self._users.remove(self)
                if not self._users:
                    ops.emulate(self._before)
