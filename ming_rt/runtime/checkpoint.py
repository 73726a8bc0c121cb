"""A checkpoint directory's safetensors files, validated and mapped: names -> dtype, shape, bytes.

Nothing in the files is trusted. Everything wrong is collected in ``Checkpoint.problems`` (one sentence
each), so that one error can list it all; only tensors without a problem can be read.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ming_rt.errors import WeightsError
from ming_rt.strict_json import load_json, parse_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The thinker and its encoders; everything else (talker., image generation parts) belongs to other models.
THINKER_PREFIXES = (
    "model.",
    "vision.",
    "linear_proj.",
    "audio.",
    "linear_proj_audio.",
    "whisper_encoder.",
    "linear_proj_whisper.",
)

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MAX_HEADER = 100_000_000
_MAX_INDEX = 64 << 20
_MAX_PROBLEMS = 1000  # a hostile header could have a million
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# MAP_NORESERVE: a private mapping of a shard larger than free memory must not be refused, nothing is written.
_MAP_FLAGS = mmap.MAP_PRIVATE | (0x4000 if os.uname().sysname == "Linux" else 0)


def _label(name: str) -> str:
    """A name from a file for a message: bounded, nothing a terminal would act on."""
    return name if len(name) <= 200 and name.isprintable() else f"{name!r:.200}"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie: ``file``'s bytes ``begin`` to ``end``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // _DTYPE_BYTES[self.dtype]


class Checkpoint:
    """Validated view of ``model.safetensors`` or of an index and its shards; reads no tensor data by itself.

    Where both exist the single file wins, as in the library that upstream loads with.

    Args:
        directory: the checkpoint directory.
        prefixes: only shards holding a tensor under one of these are opened; ``("",)`` opens all.

    ``tensors`` maps names to places, ``problems`` lists what is wrong, ``not_opened`` maps the names of
    tensors in shards that were not opened to the shard. Raises WeightsError where there is nothing to read.
    """

    def __init__(self, directory: str | Path, prefixes: Iterable[str] = THINKER_PREFIXES) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self.not_opened: dict[str, str] = {}
        self._maps: dict[str, mmap.mmap] = {}
        if (self.directory / SINGLE_FILE).exists():
            self._add_file(SINGLE_FILE)
        elif (self.directory / INDEX_FILE).exists():
            self._read_index(tuple(prefixes))
        else:
            raise WeightsError(f"{self.directory}: found neither {SINGLE_FILE} nor {INDEX_FILE}")

    def check(self) -> None:
        """Raises one WeightsError listing all problems, if there are any."""
        if self.problems:
            raise WeightsError(self.problems)

    def under(self, prefixes: Iterable[str]) -> Iterator[TensorInfo]:
        """The tensors whose name starts with one of ``prefixes``."""
        starts = tuple(prefixes)
        return (info for name, info in self.tensors.items() if name.startswith(starts))

    def view(self, name: str) -> torch.Tensor:
        """The tensor's bytes in place: no copy. Writing to it never reaches the file."""
        info = self.tensors[name]
        dtype = FLOAT_DTYPES.get(info.dtype)
        if dtype is None:
            raise WeightsError(f"{name}: stored as {info.dtype}, expected F32, F16 or BF16")
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        buffer = self._maps[info.file]
        if info.begin % dtype.itemsize:  # legal in the format, but no address for a kernel
            raw = torch.frombuffer(buffer, dtype=torch.uint8, count=info.nbytes, offset=info.begin)
            return raw.clone().view(dtype).view(info.shape)
        return torch.frombuffer(buffer, dtype=dtype, count=info.numel, offset=info.begin).view(info.shape)

    def advise(self, name: str, advice: int) -> None:
        """Gives the kernel ``advice`` (mmap.MADV_...) on the pages of a tensor."""
        info = self.tensors[name]
        start = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if info.end > start:
            self._maps[info.file].madvise(advice, start, info.end - start)

    def drop_pages(self) -> None:
        """Gives all pages of the files back; they are read again when touched."""
        for buffer in self._maps.values():
            buffer.madvise(mmap.MADV_DONTNEED)

    def _problem(self, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def _read_index(self, prefixes: tuple[str, ...]) -> None:
        try:
            index = load_json(
                self.directory / INDEX_FILE, max_bytes=_MAX_INDEX, max_depth=8, error=WeightsError
            )
        except WeightsError as error:
            self._problem(str(error))
            return
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            self._problem(f"{INDEX_FILE}: expected an object with weight_map: tensor name -> file name")
            return
        wanted = {file for name, file in weight_map.items() if name.startswith(prefixes)}
        opened = {file for file in sorted(wanted) if self._add_file(file)}
        for name, file in weight_map.items():
            if file not in wanted:
                self.not_opened[name] = file
            elif file in opened and (name not in self.tensors or self.tensors[name].file != file):
                self._problem(f"{_label(name)}: listed for {file} in {INDEX_FILE}, but not in that file")
        for info in self.tensors.values():
            if info.name not in weight_map:
                self._problem(f"{_label(info.name)}: in {info.file}, but not listed in {INDEX_FILE}")

    def _add_file(self, file: str) -> bool:
        """Maps one file and adds its tensors; a file that cannot be used at all becomes a problem."""
        try:
            buffer = self._map(file)
            header, start = _read_header(buffer, file)
        except WeightsError as error:
            self._problem(str(error))
            return False
        self._maps[file] = buffer
        data_bytes = len(buffer) - start
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            problem, info = _read_entry(name, entry, file, start, data_bytes)
            if info is None:
                self._problem(f"{_label(name)}: {problem}")
                continue
            spans.append((info.begin - start, info.end - start, name))
            if name in self.tensors:
                self._problem(f"{_label(name)}: in both {self.tensors[name].file} and {file}")
            else:
                self.tensors[name] = info
        self._check_spans(
            spans, file, data_bytes, complete=len(spans) == len(header.keys() - {"__metadata__"})
        )
        return True

    def _check_spans(
        self, spans: list[tuple[int, int, str]], file: str, data_bytes: int, complete: bool
    ) -> None:
        """The tensors fill the data part exactly; holes are only certain if every entry was readable."""
        position, before = 0, "the header"
        for begin, end, name in sorted(spans):
            if begin < position:
                self._problem(f"{_label(name)}: its bytes in {file} overlap those of {_label(before)}")
            elif begin > position and complete:
                self._problem(f"{file}: {begin - position} unused bytes before {_label(name)}")
            if end > position:
                position, before = end, name
        if complete and position < data_bytes:
            self._problem(f"{file}: {data_bytes - position} unused bytes at the end")

    def _map(self, file: str) -> mmap.mmap:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(f"{file!r:.200}: expected the name of a .safetensors file in {self.directory}")
        path = self.directory / file
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            raise WeightsError(f"{file}: no such file in {self.directory}") from None
        if real.parent not in self._allowed_folders():
            raise WeightsError(f"{file}: a link out of the checkpoint directory, expected a file inside it")
        descriptor = None
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer.
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise WeightsError(f"{file}: not a regular file")
            if status.st_size < 8:
                raise WeightsError(f"{file}: {status.st_size} bytes, too short for a safetensors header")
            buffer = mmap.mmap(descriptor, 0, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise WeightsError(f"{file}: cannot be read ({error.strerror})") from None
        finally:
            if descriptor is not None:
                os.close(descriptor)
        buffer.madvise(mmap.MADV_SEQUENTIAL)
        return buffer

    def _allowed_folders(self) -> tuple[Path, ...]:
        """The directory itself; in a Hugging Face cache also the blobs its snapshot links to."""
        real = self.directory.resolve()
        if real.parent.name == "snapshots":
            return real, real.parent.parent / "blobs"
        return (real,)


def _read_header(buffer: mmap.mmap, file: str) -> tuple[dict[str, Any], int]:
    """The header object and the offset at which tensor data starts. Raises WeightsError."""
    length = int.from_bytes(buffer[:8], "little")
    if length > _MAX_HEADER:
        raise WeightsError(f"{file}: header of {length} bytes, expected at most {_MAX_HEADER}")
    if 8 + length > len(buffer):
        raise WeightsError(f"{file}: header of {length} bytes in a file of {len(buffer)}")
    header = parse_json(
        buffer[8 : 8 + length], f"{file} header", max_bytes=_MAX_HEADER, max_depth=8, error=WeightsError
    )
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: the header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{file}: __metadata__ is no object of strings")
    return header, 8 + length


def _read_entry(
    name: str, entry: Any, file: str, start: int, data_bytes: int
) -> tuple[str, TensorInfo | None]:
    """One tensor of a header: ("", place) or (what is wrong, None)."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"its entry in {file} is no object of dtype, shape, data_offsets", None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    size = _DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        return f"unknown dtype {dtype!r:.50} in {file}", None
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(d) is int and d >= 0 for d in shape):
        return f"shape {shape!r:.100} in {file}, expected up to 8 integers from 0", None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        return f"data_offsets {offsets!r:.100} in {file}, expected two integers", None
    begin, end = offsets
    if not 0 <= begin <= end:
        return f"data_offsets {offsets!r:.100} in {file}, expected 0 <= begin <= end", None
    if end > data_bytes:
        return f"ends at data byte {end!s:.40} of {file}, which has {data_bytes} (file truncated?)", None
    needed = size
    for dim in shape:
        needed *= dim
        if needed >> 62:
            return f"shape {shape!r:.100} in {file} overflows", None
    if needed != end - begin:
        return f"shape {shape!r:.100} of {dtype} needs {needed} bytes, {file} has {end - begin}", None
    return "", TensorInfo(name, dtype, tuple(shape), file, start + begin, start + end)
