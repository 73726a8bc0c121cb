"""The facts of ``ming-rt info``: devices, and what a checkpoint holds and needs, told by its headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ming_rt.config import Generation, OmniConfig, ThinkerConfig
from ming_rt.errors import MingError
from ming_rt.models.omni import Omni
from ming_rt.ops.packed import Quant
from ming_rt.runtime.checkpoint import Checkpoint
from ming_rt.runtime.device import Device, available, cuda_reason
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.weights import PlanSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Sub-folders with weights of their own.
_FOLDERS = {
    "talker": ("talker",),
    "image generation": ("transformer", "vae", "connector", "mlp", "byt5"),
}


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint. ``parameters`` and ``nbytes`` count what could be opened."""

    name: str
    used: bool
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def render(self) -> str:
        """One line for a terminal."""
        count = f"{self.tensors:>6} tensors  {_count(self.parameters):>8}" if self.tensors else " " * 24
        line = f"{self.name:<17} {count}  {_size(self.nbytes):>9}  {'/'.join(self.dtypes)}"
        if self.folders:
            line += f"  in {', '.join(f'{folder}/' for folder in self.folders)}"
        return line.rstrip() + ("" if self.used else "  (not used)")


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts about one checkpoint directory; all sizes in bytes.

    ``parameters_total`` are those of the parts in use, ``parameters_active`` those of the thinker that one
    text token meets (embedding table included). ``weight_bytes`` and ``kv_bytes_per_token`` are by compute
    dtype, ``quantised_bytes`` are the weights on a GPU by ``quant``, computed with in bfloat16.
    ``problems`` would stop a load, ``notes`` would not.
    """

    directory: str
    generation: Generation
    description: str
    parts: tuple[Part, ...]
    parameters_total: int
    parameters_active: int
    disk_bytes: int
    kv_bytes_per_token: dict[str, int]
    weight_bytes: dict[str, int]
    quantised_bytes: dict[str, int]
    max_positions: int
    ignored_keys: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def render(self) -> str:
        """A few aligned lines for a terminal."""
        lines = [self.directory, f"generation     {self.generation}: {self.description}"]
        lines += _listed("parts", [part.render() for part in self.parts])
        lines += [
            f"parameters     {_count(self.parameters_total)} in use, "
            f"{_count(self.parameters_active)} active per token",
            f"on disk        {_size(self.disk_bytes)}",
        ]
        needs = []
        for name, weights in self.weight_bytes.items():
            kv = self.kv_bytes_per_token[name]
            needs.append(
                f"{name:<9} weights {_size(weights):>9}, KV cache {kv} B per token "
                f"({_size(kv * self.max_positions)} for {self.max_positions})"
            )
        for name, weights in self.quantised_bytes.items():
            needs.append(f"{name:<9} weights {_size(weights):>9} on a GPU, KV cache as with bfloat16")
        lines += _listed("memory", needs)
        for label, items in (("ignored keys", self.ignored_keys), ("notes", self.notes)):
            lines += _listed(label, items) if items else []
        return "\n".join(lines + _listed("problems", self.problems or ("none",)))


@dataclass(frozen=True)
class DevicesInfo:
    """The devices a session can use, and why no GPU is among them (None where one is)."""

    devices: tuple[Device, ...]
    cuda_reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        devices = [asdict(device) | {"device": str(device)} for device in self.devices]
        for device in devices:
            del device["torch"]
        return {"devices": devices, "cuda_reason": self.cuda_reason}

    def render(self) -> str:
        """A few aligned lines for a terminal."""
        lines = []
        for device in self.devices:
            lines.append(f"{device!s:<9} {device.name}, {_size(device.total_memory)}")
            if device.capability:
                lines[-1] += f", compute capability {'.'.join(map(str, device.capability))}"
        if self.cuda_reason:
            lines.append(f"no GPU: {self.cuda_reason}")
        return "\n".join(_listed("devices", lines))


def devices_info() -> DevicesInfo:
    """Asks build, torch and driver what there is."""
    return DevicesInfo(tuple(available()), cuda_reason())


def checkpoint_info(directory: str | Path) -> CheckpointInfo:
    """Reads configs and safetensors headers of a checkpoint directory.

    Damaged or missing weights are reported in ``problems``; only a config that cannot be read raises
    (ConfigError).
    """
    directory = Path(directory)
    config = OmniConfig.from_dir(directory)
    problems: list[str] = []
    checkpoint = whole = None
    try:
        checkpoint, whole = Checkpoint(directory), Checkpoint(directory, prefixes=("",))
    except MingError as error:
        problems.append(str(error))
    plans = {name: PlanSource(checkpoint, dtype) for name, dtype in DTYPES.items()}
    quantised = {
        quant: PlanSource(checkpoint, torch.bfloat16, quant=quant, rows=True) for quant in get_args(Quant)
    }
    try:
        for plan in (*plans.values(), *quantised.values()):
            Omni(config, plan)
    except MingError as error:
        problems.append(str(error))
    plan = plans["bfloat16"]
    problems += plan.problems()
    thinker = config.thinker
    cache = (thinker.num_hidden_layers, thinker.num_key_value_heads, thinker.head_dim)
    return CheckpointInfo(
        directory=str(directory),
        generation=config.generation,
        description=_describe(thinker),
        parts=tuple(_parts(directory, config, whole)),
        parameters_total=plan.parameters,
        parameters_active=active_parameters(thinker, plan.shapes),
        disk_bytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        kv_bytes_per_token={name: KVCache.bytes_per_token(*cache, dtype) for name, dtype in DTYPES.items()},
        weight_bytes={name: plan.nbytes for name, plan in plans.items()},
        quantised_bytes={name: plan.nbytes for name, plan in quantised.items()},
        max_positions=thinker.rope.max_position_embeddings,
        ignored_keys=config.ignored_keys,
        problems=tuple(problems),
        notes=tuple(note for note in (whole.problems if whole else ()) if note not in problems),
    )


def active_parameters(thinker: ThinkerConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters one text token meets: all of the thinker but unchosen experts and the media routers."""
    total = routed = 0
    for name, shape in shapes.items():
        if not name.startswith("model.") or ".image_gate." in name or ".audio_gate." in name:
            continue
        size = torch.Size(shape).numel()
        if ".mlp.experts." in name:
            routed += size
        else:
            total += size
    return total + routed * thinker.num_experts_per_tok // thinker.num_experts


def _parts(directory: Path, config: OmniConfig, whole: Checkpoint | None) -> Iterable[Part]:
    """The parts in use first, then what else lies in the directory."""
    prefixes = {"thinker": ("model.",)}
    if config.vision:
        prefixes["vision"] = ("vision.", "linear_proj.")
    for name, audio in config.audio.items():
        prefixes[f"audio ({name})"] = (f"{audio.prefix}.", f"{audio.proj_prefix}.")
    for name, starts in prefixes.items():
        yield _part(name, starts, whole, used=True)
    used = tuple(prefix for starts in prefixes.values() for prefix in starts)
    others = (
        {name.split(".", 1)[0] for name in whole.tensors if not name.startswith(used)} if whole else set()
    )
    for name in sorted(others | {"talker"}):
        folders = tuple(f for f in _FOLDERS.get(name, ()) if (directory / f).is_dir())
        part = _part(name, (f"{name}.",), whole, used=False, folders=folders)
        if part.tensors or folders:
            yield part
    folders = tuple(f for f in _FOLDERS["image generation"] if (directory / f).is_dir())
    if folders:
        yield Part("image generation", False, 0, 0, _folder_bytes(directory, folders), folders=folders)


def _part(
    name: str,
    prefixes: tuple[str, ...],
    whole: Checkpoint | None,
    *,
    used: bool,
    folders: tuple[str, ...] = (),
) -> Part:
    found = list(whole.under(prefixes)) if whole else []
    size = sum(info.nbytes for info in found)
    if whole and folders:
        size += _folder_bytes(whole.directory, folders)
    dtypes = tuple(sorted({info.dtype for info in found}))
    return Part(name, used, len(found), sum(info.numel for info in found), size, dtypes, folders)


def _folder_bytes(directory: Path, folders: Iterable[str]) -> int:
    return sum(p.stat().st_size for folder in folders for p in (directory / folder).rglob("*") if p.is_file())


def _describe(t: ThinkerConfig) -> str:
    heads = f"{t.num_attention_heads}/{t.num_key_value_heads} heads of {t.head_dim}"
    experts = f"{t.num_experts_per_tok} of {t.num_experts} experts, {3 if t.multi_gate else 1} routers"
    return f"{t.num_hidden_layers} layers, hidden {t.hidden_size}, {heads}, {experts}, rope {t.rope.type}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _listed(label: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    shown = items[:20] + ([f"... and {len(items) - 20} more"] if len(items) > 20 else [])
    return [f"{'' if i else label:<14} {item}" for i, item in enumerate(shown)]
