"""Upstream's torch archives (``.pt``) as safetensors files, written once.

The talker's parts of the Lite generations come as ``torch.save`` archives: flow.pt or flow_stream.pt,
hift.pt or hift_v2.pt, and speaker presets. Such a file is a zip of a pickle and raw numbers. Before torch
reads it, as data only, the zip must be one that torch writes (nothing compressed, one directory) and the
pickle must name nothing but tensors; afterwards every value must be a dense tensor that its file can hold.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ming_rt.errors import WeightsError

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
SPEAKER = "vp_emb"  # the name of a preset that is a bare tensor, as newer presets have it
TEXTS = ("prompt_text",)  # values that are text
_VOCODER_PREFIX = "generator."
# Weight norm's magnitude and direction, as torch has named them in turn.
_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)

_MAX_DIRECTORY = 16 << 20  # bytes of a zip's list of files
_MAX_PICKLE = 16 << 20
_MAX_TEXT = 10_000
_MAX_NAME = 300
_MAX_FILES = 256
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
# Instructions that name things in other ways; torch writes none of them.
_MAKES_OBJECTS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


@dataclass(frozen=True)
class Archive:
    """What an archive holds: tensors by upstream's names, on the CPU, and the texts of a preset."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


def read_archive(path: str | Path) -> Archive:
    """Reads one ``.pt`` file.

    A state dict may be the value of "model", then what lies beside it is left out; "generator." is taken out
    of names; a bare tensor is called "vp_emb". Both spellings of weight norm stay as they are.

    Raises WeightsError, one sentence for everything that is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_zip(file, path.name, size)
            file.seek(0)
            try:
                value = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as problem:  # what a broken archive raises has no common type
                line = (str(problem).splitlines() or [type(problem).__name__])[0]
                raise WeightsError(f"{path.name}: torch cannot read it ({line:.200})") from None
    except OSError as problem:
        raise WeightsError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    archive, problems = _contents(value)
    if (total := sum(t.nbytes for t in archive.tensors.values())) > 2 * size:
        problems.append(f"{total} bytes of tensors out of a file of {size}")
    if problems:
        raise WeightsError([f"{path.name}: {problem}" for problem in problems])
    return archive


def write_safetensors(archive: Archive, target: str | Path) -> None:
    """Writes ``target`` whole or not at all; the texts become its metadata.

    Raises WeightsError where that cannot be done.
    """
    target = Path(target)
    storages: set[int] = set()
    tensors = {}
    for name, tensor in archive.tensors.items():
        dense = tensor.contiguous()
        place = dense.untyped_storage().data_ptr()
        if dense.untyped_storage().nbytes() != dense.nbytes or place in storages:
            dense = dense.clone()
        storages.add(place)
        tensors[name] = dense
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # what any new file gets here; the library makes a private one
        save_file(tensors, part, metadata=archive.texts or None)
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"{target}: cannot be written ({problem})") from None
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Converted:
    """One file that was written."""

    source: Path
    target: Path
    tensors: int


def convert(
    source: str | Path, out: str | Path | None = None, *, force: bool = False
) -> tuple[Converted, ...]:
    """Writes every ``.pt`` file of a checkpoint as a ``.safetensors`` file of the same name.

    Args:
        source: a directory, searched with its folders, or one file.
        out: where the files go, in the same folders; beside the archives if not given.
        force: replace files that are there already.

    Raises WeightsError where there is no archive, an archive cannot be used, or a file is there already; then
    nothing is written. Also where a file cannot be written.
    """
    source = Path(source)
    root = source if source.is_dir() else source.parent
    found = sorted(source.rglob("*.pt")) if source.is_dir() else [source]
    if not found:
        raise WeightsError(f"{source}: found no .pt file")
    if len(found) > _MAX_FILES:
        raise WeightsError(f"{source}: found {len(found)} .pt files, expected at most {_MAX_FILES}")
    base = root if out is None else Path(out)
    targets = {path: (base / path.relative_to(root)).with_suffix(".safetensors") for path in found}
    if not force and (there := [target for target in targets.values() if target.exists()]):
        raise WeightsError([f"{target}: is there already; --force replaces it" for target in there])
    problems: list[str] = []
    for path in found:  # read twice rather than kept: together they may be larger than memory
        try:
            read_archive(path)
        except WeightsError as error:
            problems += error.problems
    if problems:
        raise WeightsError(problems)
    written = []
    for path, target in targets.items():
        archive = read_archive(path)
        write_safetensors(archive, target)
        written.append(Converted(path, target, len(archive.tensors)))
    return tuple(written)


# --- before torch reads it ---


def _check_zip(file: IO[bytes], name: str, size: int) -> None:
    """Refuses a zip that unpacks to more than it is, that readers could read differently, or with code."""
    _check_directory(file, name, size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename.lower() for entry in entries]
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                raise WeightsError(f"{name}: holds compressed files, which torch does not write")
            if sum(entry.file_size for entry in entries) > size:
                raise WeightsError(f"{name}: declares more bytes than its own {size}")
            if len(set(names)) != len(names) or len({text.split("/")[0] for text in names}) != 1:
                raise WeightsError(f"{name}: expected one folder of files of different names")
            pickles = [entry for entry in entries if entry.filename.count("/") == 1
                       and entry.filename.endswith("/data.pkl")]  # fmt: skip
            if len(pickles) != 1:
                raise WeightsError(f"{name}: expected an archive with a data.pkl")
            if pickles[0].file_size > _MAX_PICKLE:
                raise WeightsError(
                    f"{name}: data.pkl has {pickles[0].file_size} bytes, expected at most {_MAX_PICKLE}"
                )
            data = archive.read(pickles[0])
    except WeightsError:
        raise
    except Exception as problem:  # zipfile raises whatever a damaged field leads to
        raise WeightsError(f"{name}: not a whole torch archive ({problem!s:.200})") from None
    _check_pickle(data, name)


def _check_directory(file: IO[bytes], name: str, size: int) -> None:
    """The zip's end names one directory right before it, so that every reader finds the same."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\5\6":
        raise WeightsError(f"{name}: not a torch archive, or not the whole of one (its end is no zip's)")
    length, offset = struct.unpack("<II", end[12:20])
    behind = size - 22
    if tail[-42:-38] == b"PK\6\7":  # the form for large files, which torch always writes
        behind = size - 98
        (place,) = struct.unpack("<Q", tail[-34:-26])
        if place != behind or tail[:4] != b"PK\6\6":
            raise WeightsError(f"{name}: the end of the zip is damaged")
        length, offset = struct.unpack("<QQ", tail[40:56])
    if offset + length != behind or end[20:] != b"\0\0":
        raise WeightsError(f"{name}: the end of the zip is damaged")
    if length > _MAX_DIRECTORY:
        raise WeightsError(f"{name}: a list of files of {length} bytes, expected at most {_MAX_DIRECTORY}")


def _check_pickle(data: bytes, name: str) -> None:
    """Refuses a pickle that asks for anything but tensors and their storages."""
    try:
        found = (_asks(opcode.name, argument) for opcode, argument, _ in pickletools.genops(io.BytesIO(data)))
        asks = next(filter(None, found), None)
    except (ValueError, IndexError, struct.error, OverflowError) as problem:
        raise WeightsError(f"{name}: data.pkl is damaged ({problem!s:.200})") from None
    if asks:
        raise WeightsError(f"{name}: its pickle asks for {asks!r:.200}, expected nothing but dense tensors")


def _asks(opcode: str, argument: Any) -> str | None:
    """What an instruction of a pickle wants from outside, unless tensors need it."""
    if opcode == "GLOBAL":
        return None if argument in _NAMED else str(argument).replace(" ", ".")
    return opcode if opcode in _MAKES_OBJECTS else None


# --- after ---


def _contents(value: Any) -> tuple[Archive, list[str]]:
    """The tensors and texts of a loaded value, and what is wrong with it."""
    if isinstance(value, Tensor):
        value = {SPEAKER: value}
    if isinstance(value, Mapping) and isinstance(value.get("model"), Mapping):
        value = value["model"]
    archive = Archive({}, {})
    if not isinstance(value, Mapping) or not value:
        return archive, [f"expected a dict of tensors, found {_kind(value)}"]
    problems: list[str] = []
    for key, item in value.items():
        if (
            not isinstance(key, str)
            or not key.isprintable()
            or not 0 < len(key) <= _MAX_NAME
            or key == "__metadata__"
        ):
            problems.append(f"expected names of tensors as keys, found {key!r:.80}")
            continue
        name = key.replace(_VOCODER_PREFIX, "")
        if key in TEXTS and isinstance(item, str):
            if len(item) > _MAX_TEXT or any(0xD800 <= ord(char) < 0xE000 for char in item):
                problems.append(f"{key}: expected up to {_MAX_TEXT} characters of valid Unicode")
            archive.texts[key] = item
        elif problem := _problem(item):
            problems.append(f"{key}: {problem}")
        elif name in archive.tensors or not name:
            problems.append(f"{key}: there is a {name!r} already once {_VOCODER_PREFIX!r} is removed")
        else:
            archive.tensors[name] = item.detach()
    return archive, problems or _weight_norm_problems(archive.tensors)


def _kind(value: object) -> str:
    return (
        "an empty dict"
        if isinstance(value, Mapping) and not value
        else f"a value of type {type(value).__name__}"
    )


def _problem(item: object) -> str | None:
    """Why a value is no dense tensor that its own storage holds."""
    if not isinstance(item, Tensor):
        return f"expected a dense tensor, found {_kind(item)}"
    if item.layout != torch.strided or item.is_quantized or item.device.type != "cpu" or item.is_nested:
        return f"expected a dense tensor, found one of layout {item.layout} on {item.device.type}"
    if item.dtype not in DTYPES:
        return f"expected floats or integers, found {item.dtype}"
    if item.dim() > 8 or item.nbytes > item.untyped_storage().nbytes():
        return f"shape {list(item.shape)!r:.80} repeats values or has more than 8 dimensions"
    return None


def _weight_norm_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Magnitudes without directions, and the other way round."""
    problems = []
    for pair in _WEIGHT_NORM:
        for ours, theirs in (pair, pair[::-1]):
            for name in tensors:
                stem = name.removesuffix(ours)
                if stem != name and stem + theirs not in tensors:
                    problems.append(f"{name}: weight norm without {stem + theirs}")
    return problems
