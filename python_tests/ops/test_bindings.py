"""The bindings by themselves: sizes the faces never send are refused before they reach a kernel, and the
kernels' environment (threads, instruction set, fork) behaves as documented."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ming_rt import ops
from ming_rt.ops._native import cpu


def i32(*values: int) -> torch.Tensor:
    """An int32 vector."""
    return torch.tensor(values, dtype=torch.int32)


def u8(*shape: int) -> torch.Tensor:
    """Zero bytes."""
    return torch.zeros(shape, dtype=torch.uint8)


def route_without_routers():
    """moe_route of two tokens over four experts, but of no router at all."""
    outputs = i32(0, 0)[:, None], torch.zeros(2, 1), torch.zeros(2, 4)
    routers, bias = torch.zeros(0, 64 * 8), torch.zeros(0, 4)
    cpu.moe_route(torch.zeros(2, 8), routers, bias, None, *outputs, True, True, 2, 1, 1.0)


def pack_of_many_rows():
    """2^31 rows that share one row of memory: n * k would pass any product of 32 bits."""
    cpu.pack_weight(torch.zeros(1, 8).expand(1 << 31, 8), None, torch.zeros(64), None, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cpu.grouped_gemm_down(
                torch.zeros(1, 4), torch.zeros(1, 0), None, 0, i32(0), i32(0, 1), 1, torch.zeros(1, 0), None
            ),
            "experts: expected 1 to 2.30 outputs and inputs, got n = 0",
        ),
        (route_without_routers, "routers: expected at least one"),
        (pack_of_many_rows, "packed: expected 1 to 2.30 outputs"),
        (
            lambda: cpu.lfr_cmvn(torch.zeros(2, 0), torch.zeros(0), torch.zeros(0), torch.zeros(1, 0), 7, 6),
            "frames: expected at least one value",
        ),
        (
            lambda: cpu.lfr_cmvn(
                torch.zeros(2, 4), torch.zeros(4), torch.zeros(4), torch.zeros(2, 4), 1, 1 << 62
            ),
            "expected a stack and a stride",
        ),
        (
            lambda: cpu.conv_frames([torch.zeros(1, 2, 4)], 2, 3, None, 0.0, 1.0, 0, torch.zeros(1, 2, 4)),
            "expected an activation of 0..2",
        ),
        (
            lambda: cpu.conv_frames([torch.zeros(1, 2, 4)], 2, 0, None, 0.0, 1.0, 1, torch.zeros(1, 2, 4)),
            "expected padding of 0 frames or more",
        ),
        (
            lambda: cpu.istft(
                torch.zeros(3, 18), torch.zeros(16, 18), torch.zeros(16), 1, 1.0, 1.0, False, torch.zeros(2)
            ),
            "hop: expected an eighth to a half",
        ),
        (
            lambda: cpu.resize_u8(u8(4, 0, 3), u8(2, 0, 3), None, None, None, i32(0, 1), i32(1, 1)[:, None]),
            "out: expected at least one pixel",
        ),
        (
            lambda: cpu.resize_u8(u8(4, 1, 3), u8(1, 1, 3), None, None, None, i32(0), i32()[None]),
            "y_weight: expected at least one output and tap",
        ),
        (
            lambda: cpu.resize_u8(u8(4, 1, 3), u8(1, 1, 3), None, None, None, i32(4), i32(1)[None]),
            "y_start: expected windows inside the picture",
        ),
        (
            lambda: cpu.resample(torch.zeros(64), torch.zeros(5), i32(0), torch.zeros(1, 16), 1 << 62),
            "x: expected room for every window",
        ),
        (
            lambda: cpu.rope_qk_(torch.zeros(2, 48), torch.zeros(2, 4), torch.zeros(2, 4), 1 << 62),
            "qkv: expected rows of",
        ),
        (
            lambda: cpu.linear(
                torch.zeros(2, 8), torch.zeros(512), None, 0, 1 << 40, False, None, 0, None, torch.zeros(2, 4)
            ),
            "w: expected 1 to 2.30 outputs",
        ),
    ],
)
def test_sizes_no_kernel_could_run(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wild_pixels_clamp_alike(isa):
    values = torch.tensor([torch.nan, 1e20, -1e20, 3e9, -3e9, 254.5, 0.5, 300.0])
    frames = values[:, None, None, None].expand(8, 2, 20, 3)
    out = ops.resize_frames(frames, 1, 20, "bilinear", to_uint8=True)
    assert out[:, 0, 0, 0].tolist() == [0, 255, 0, 255, 0, 254, 0, 255]
    assert torch.equal(out, out[:, :, :1, :1].expand_as(out))


def run(code: str) -> None:
    """Runs a fresh interpreter, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


ENVIRONMENT = """
import os
import ming_rt._cpu as cpu

def error(name, value, read):
    os.environ[name] = value
    try:
        return read()
    except ValueError as e:
        return str(e)

for bad in ("many", "0", "4096", "2x"):
    assert error("MING_RT_THREADS", bad, cpu.num_threads) == f"MING_RT_THREADS: expected 1..1024, got {bad}"
assert error("MING_RT_THREADS", "3", cpu.num_threads) == 3
assert error("MING_RT_ISA", "sse9", cpu.isa) == "isa: expected portable, avx2 or avx512, got sse9"
assert error("MING_RT_ISA", "portable", cpu.isa) == "portable"
"""


def test_bad_environment_is_an_error():
    run(ENVIRONMENT)


FORK = """
import os, torch
from ming_rt import ops
x, w = torch.randn(512, 256), torch.ones(256)
ops.set_num_threads(3)
y = ops.rms_norm(x, w, 1e-6)
child = os.fork()
if child == 0:
    ops.set_num_threads(ops.num_threads() + 1)
    os._exit(0 if ops.num_threads() == 4 and torch.equal(ops.rms_norm(x, w, 1e-6), y) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.rms_norm(x, w, 1e-6), y)
"""


def test_a_forked_child_has_its_own_threads():
    run(FORK)
