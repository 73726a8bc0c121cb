"""Finds the golden cases: directories of recorded inputs and outputs of the original implementation.

The root is the environment variable ``MING_RT_GOLDEN``, or ``python_tests/golden``. Cases are recognised by
the files and keys they hold, never by their names, so that any other set of such cases can be tested.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(os.environ.get("MING_RT_GOLDEN") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class GoldenCase:
    """One case directory; its files are read on first use."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def has(self, *files: str) -> bool:
        return all((self.path / f).is_file() for f in files)

    def json(self, file: str):
        return json.loads((self.path / file).read_text(encoding="utf-8"))

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / file)

    @cached_property
    def config(self) -> dict:
        return self.json("config.json") if self.has("config.json") else {}

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.tensors("inputs.safetensors") if self.has("inputs.safetensors") else {}

    def inputs_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs, on a device."""
        return {name: tensor.to(device) for name, tensor in self.inputs.items()}

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        return self.tensors("outputs.safetensors") if self.has("outputs.safetensors") else {}

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.tensors("weights.safetensors")


def all_cases() -> list[GoldenCase]:
    """Every directory under the root that holds recorded outputs."""
    marks = ("outputs.safetensors", "cases.json", "encode.json", "smart_resize.json")
    found = {p.parent for mark in marks for p in ROOT.rglob(mark)}
    return [GoldenCase(p) for p in sorted(found)]


def golden_cases(wanted: Callable[[GoldenCase], bool]):
    """Parametrises a test with ``case`` over the cases that ``wanted`` accepts and marks it golden.

    A test without any case under the root is not collected at all.
    """

    def decorate(test):
        params = [pytest.param(case, id=case.name) for case in all_cases() if wanted(case)]
        if not params:
            return None
        return pytest.mark.golden(pytest.mark.parametrize("case", params)(test))

    return decorate
