"""The small cases for compute-sanitizer, on the emulated kernels (and a GPU where there is one)."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, using

gpu_small = pytest.importorskip(
    "ming_rt.bench.gpu_small", reason="the bench is part of the installed package"
)


@pytest.fixture(params=[backend for backend in BACKENDS if backend in ("emu", "cuda")])
def gpu(request):
    """The emulated kernels, and a GPU if there is one."""
    with using(request.param):
        yield request.param


def test_the_cpu_agrees_with_itself(capsys):
    assert gpu_small.run("cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_small.CASES)
    assert all(" ok 0.0e+00" in line for line in lines)


@pytest.mark.parametrize("name", gpu_small.CASES)
def test_devices_agree_with_the_cpu(name, gpu, capsys):
    assert gpu_small.run(gpu, name) == 0, capsys.readouterr().out


def test_what_differs_is_counted(monkeypatch, capsys):
    calls = iter([torch.ones(3), torch.tensor([1.0, 1.0, float("nan")])])

    def broken(_):
        raise ValueError("no kernel")

    monkeypatch.setattr(gpu_small, "CASES", {"nan": lambda _: next(calls), "broken": broken})
    monkeypatch.setitem(gpu_small.CASES, "good", lambda _: [torch.ones(2)])
    assert gpu_small.run("cpu") == 2
    out = capsys.readouterr().out
    assert "WRONG inf" in out
    assert "WRONG ValueError: no kernel" in out
