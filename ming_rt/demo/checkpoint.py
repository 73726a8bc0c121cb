"""Writes a tiny random checkpoint in upstream's directory layout."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ming_rt.config import Generation, OmniConfig
from ming_rt.demo.configs import config_dict, preprocessor_dict
from ming_rt.demo.tokenizer import write_tokenizer
from ming_rt.models.omni import Omni
from ming_rt.runtime.weights import RandomSource, RecordingSource, default_scale

# Part of the cache path: raise it when a change here makes other files.
VERSION = 2
SHARD_BYTES = 6 << 20


def default_checkpoint(generation: Generation = "v1.5") -> Path:
    """The demo checkpoint in the user's cache directory, made there the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "ming_rt" / f"demo-{VERSION}" / generation
    return directory if directory.is_dir() else make_checkpoint(directory, generation)


def make_checkpoint(directory: str | Path, generation: Generation = "v1.5", seed: int = 0) -> Path:
    """Writes a checkpoint with random weights; the same arguments give the same bytes.

    The directory appears complete or not at all, also when several processes make it at once.

    Raises:
        FileExistsError: ``directory`` exists with other content.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write(temporary, generation, seed)
        temporary.chmod(0o755)
        try:
            temporary.rename(directory)
        except OSError:  # somebody else was faster
            if not (directory / "config.json").is_file():
                raise FileExistsError(f"{directory}: exists and is no checkpoint") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _write(directory: Path, generation: Generation, seed: int) -> None:
    config, preprocessor = config_dict(generation), preprocessor_dict(generation)
    _write_json(directory / "config.json", config)
    _write_json(directory / "preprocessor_config.json", preprocessor)
    readable = write_tokenizer(directory, generation)
    if generation in ("preview", "v1"):
        _write_cmvn(directory / preprocessor["wav_frontend_args"]["cmvn_file"])
    stored = torch.float32 if generation == "v1" else torch.bfloat16
    omni = OmniConfig.from_dict(config, preprocessor)
    source = RecordingSource(
        RandomSource(seed, torch.float32, _scale(omni.thinker.routed_scaling_factor)),
        lambda name: torch.float32 if name.endswith(".expert_bias") else stored,
    )
    Omni(omni, source)
    # Added tokens and parts of characters are drowned out, so that the random answer is made of words.
    head = source.tensors["model.lm_head.weight"]
    loud = torch.zeros(len(head), dtype=torch.bool)
    loud[readable] = True
    head[~loud] *= 0.25
    _write_shards(directory, source.tensors)


def _scale(routed_scaling: float) -> Callable[[str, tuple[int, ...]], tuple[float, float]]:
    """Plain random layers with two of them quieter.

    Experts: where two routers' scores tie, rounding must not decide the answer. Attention: its average over
    the prompt would drown the last token, and the answer would be one word over and over.
    """

    def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        mean, std = default_scale(name, shape)
        if ".experts." in name and name.endswith("down_proj.weight"):
            std *= 0.25 / routed_scaling
        elif name.endswith("attention.dense.weight"):
            std *= 0.2
        return mean, std

    return scale


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards of about SHARD_BYTES in the order of the model, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_cmvn(path: Path) -> None:
    """Mean and variance normalisation of the filter bank as a Kaldi network in text form."""
    shift = [-(8.0 + 5.0 * (1.0 - math.exp(-band / 8.0))) for band in range(80)] * 7
    scale = [0.16 + 0.0005 * band for band in range(80)] * 7

    def row(values: list[float]) -> str:
        return f"<LearnRateCoef> 0 [ {' '.join(f'{v:.6f}' for v in values)} ]"

    lines = ["<Nnet>", "<Splice> 560 560", "[ 0 ]", "<AddShift> 560 560", row(shift)]
    lines += ["<Rescale> 560 560", row(scale), "</Nnet>"]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
