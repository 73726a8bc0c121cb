"""The part of the Hopper grouped products that is ours, without a GPU: which sum goes where, rounded how."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def cuda_headers() -> Path | None:
    """The include folder of the CUDA toolkit, which CuTe reads; None without one."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        tops = [line.split("=", 1)[1] for line in asked.stderr.splitlines() if "TOP=" in line]
        homes += [Path(top) for top in tops]
    found = (home / "include" for home in [*homes, Path("/usr/local/cuda")])
    return next((folder for folder in found if (folder / "cuda_runtime.h").exists()), None)


def test_epilogue_puts_every_sum_where_it_belongs(tmp_path):
    headers = cuda_headers()
    if headers is None:
        pytest.skip("CuTe needs the headers of the CUDA toolkit")
    program = tmp_path / "epilogue"
    system = [ROOT / "third_party" / "cutlass" / "include", headers, headers / "cccl"]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-w", "-fpermissive", "-pthread"]
    command += [f"-I{HERE / 'sm90_epilogue'}", f"-I{ROOT / 'csrc'}"]
    command += [flag for folder in system for flag in ("-isystem", str(folder))]
    command += [str(HERE / "sm90_epilogue" / "main.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
