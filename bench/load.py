"""Loading of a checkpoint from the page cache: header checks, conversion and packing included.

The baseline does the same work with ``safetensors`` and torch: read, convert, pack every matrix
alike. Rates count the bytes stored on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ming_rt.config import ThinkerConfig
from ming_rt.demo import config_dict
from ming_rt.models.thinker import Thinker
from ming_rt.ops import pack_weight_torch
from ming_rt.runtime.weights import Checkpoint, RandomSource, RecordingSource, load

from .timing import Case, Row, measure

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_layers(directory: Path, config: ThinkerConfig, stored: torch.dtype) -> int:
    """Writes a thinker's random weights as one file; returns their bytes."""
    source = RecordingSource(RandomSource(dtype=stored), lambda _: stored)
    Thinker(config, source)
    save_file(source.tensors, directory / "model.safetensors")
    return sum(tensor.nbytes for tensor in source.tensors.values())


def prepare_torch(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor in the compute dtype, a matrix in the packed layout."""
    if tensor.dim() == 2:
        return pack_weight_torch(tensor, torch.bfloat16)
    return tensor.to(torch.bfloat16, copy=True)


def rows(seconds: float = 4.0, only: str = "") -> Iterator[Row]:
    """One Lite layer with embeddings and head, stored as bfloat16 and as float32, into bfloat16."""
    config = ThinkerConfig.from_dict(config_dict("v1.5", size="real", num_layers=1))
    for name, stored in STORED.items():
        shape = f"1 Lite layer, {name} on disk"
        if only not in f"load {shape} bf16":
            continue
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            stored_bytes = write_layers(directory, config, stored)

            def ours(directory=directory) -> Thinker:
                return load(lambda src: Thinker(config, src), Checkpoint(directory), torch.bfloat16)

            def baseline(directory=directory) -> dict[str, torch.Tensor]:
                tensors = load_file(directory / "model.safetensors")
                return {key: prepare_torch(tensor) for key, tensor in tensors.items()}

            yield measure(Case("load", shape, "bf16", ours, baseline, stored_bytes), seconds)
