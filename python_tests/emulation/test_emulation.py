"""The emulation of CUDA on the CPU: what it computes, and that it notices what would break on a device."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
THREADS = 96


def compiled(directory: Path, *flags: str) -> Path:
    """The program made of kernels.cu and the emulation."""
    program = directory / "kernels"
    sources = ["-x", "c++", HERE / "kernels.cu", CSRC / "common" / "device.cu", CSRC / "emu" / "emu.cpp"]
    options = ["-std=c++17", "-g", "-O1", "-DMING_EMU=1", "-DMING_BACKEND_CUDA=1", "-Wno-unknown-pragmas"]
    command = [os.environ.get("CXX", "c++"), *options, *flags, f"-I{CSRC}", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulation"))


def run(program: Path, name: str, seed: int | None = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "MING_EMU_SEED": "" if seed is None else str(seed)}
    return subprocess.run([program, name], capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_shared_memory_and_barriers(program, seed):
    expected = [(i + 1) % THREADS for i in range(THREADS)]
    assert [int(x) for x in run(program, "neighbour", seed).stdout.split()] == expected


def test_a_missing_barrier_changes_the_result(program):
    results = {run(program, "no_barrier", seed).stdout for seed in (None, 1, 2)}
    assert len(results) == 3
    assert all("-1" in result.split() for result in results)  # what nobody wrote is 0xffffffff


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_in_a_branch", "not all threads reach"),
        ("barriers_in_two_branches", "threads diverge: one waits at"),
        ("shuffle_in_a_branch", "not all threads reach"),
        ("too_much_shared", "launch refused: 96 threads, 204800 bytes of shared memory"),
    ],
)
def test_divergence_is_an_error_and_no_hang(program, name, message):
    done = run(program, name)
    assert done.returncode == 1
    assert message in done.stderr
    assert "kernels.cu:" in done.stderr or name == "too_much_shared"


@pytest.mark.parametrize("name", ["misaligned", "misaligned_copy"])
def test_a_misaligned_vector_is_an_error(program, name):
    done = run(program, name)
    assert done.returncode == 1
    assert "misaligned: block (0, 0, 0), thread 0: a vector of 16 bytes at an address" in done.stderr


def test_threads_that_left_are_not_waited_for(program):
    out = [int(x) for x in run(program, "early_exit").stdout.split()]
    assert out == [32] * 64 + [6] * 6 + [-7] * 26


def test_background_copies_arrive_at_the_wait(program):
    assert run(program, "background_copy").stdout.split() == [str(8 * THREADS)]
    assert run(program, "no_wait").stdout.split() == ["0"]


def test_matrix_fragments(program):
    assert run(program, "product").stdout.split() == ["128"]


def test_address_sanitizer_sees_an_overrun_of_shared_memory(tmp_path):
    program = compiled(tmp_path, "-fsanitize=address")
    assert run(program, "neighbour", 1).returncode == 0
    assert run(program, "barrier_in_a_branch").returncode == 1
    done = run(program, "overrun")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert "overrun" in done.stderr
