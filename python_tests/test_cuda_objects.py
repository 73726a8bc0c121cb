"""The compiled CUDA code itself: every kernel for every architecture, nothing spilled to local memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from ming_rt import ops

GENERAL, HOPPER = "sm_80", "sm_90a"
# Kernels that may use local memory, with the reason.
TABLE = "the range reduction of large angles indexes a table"
LOCAL_MEMORY = {
    "rope_table": TABLE,
    "conv_frames": TABLE,
    "sine_source": TABLE,
    "istft": TABLE,
    "attention_plain": "the form for any dtype, head_dim and stride; bfloat16 models run on tensor cores",
}


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    stack: int


def cuobjdump() -> str | None:
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(wheel) if wheel.is_file() else None)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if ops.cuda_missing:
        pytest.skip(ops.cuda_missing)
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed (`pip install nvidia-cuda-cuobjdump`)")
    module = importlib.util.find_spec("ming_rt._cuda").origin
    done = subprocess.run([tool, "--dump-resource-usage", module], capture_output=True, text=True, check=True)
    found, arch, name = [], "", ""
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Kernel(name, arch, int(match[1]), int(match[2]) + int(match[3])))
    return found


def test_every_kernel_is_compiled_for_both_architectures(kernels):
    names = {arch: {k.name for k in kernels if k.arch == arch} for arch in (GENERAL, HOPPER)}
    assert len(names[GENERAL]) > 10
    # Internal linkage puts a hash of the compilation into a name; both architectures share it.
    assert names[GENERAL] <= names[HOPPER]


def test_nothing_is_spilled(kernels):
    spilled = [k for k in kernels if k.stack and not any(allowed in k.name for allowed in LOCAL_MEMORY)]
    assert not spilled
