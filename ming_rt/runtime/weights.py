"""Weight sources: where a model's constructor gets its tensors from.

Constructors ask a ``WeightSource`` for each tensor by its checkpoint name and full shape, once. The same
constructor thereby validates a checkpoint and plans its memory (``PlanSource``), loads it
(``CheckpointSource``), fills itself with random numbers (``RandomSource``) or tells which tensors a
checkpoint needs (``RecordingSource``).
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol, TypeVar

import numpy as np
import torch

from ming_rt.errors import CapacityError, WeightsError
from ming_rt.ops.packed import Quant, packed_memory
from ming_rt.runtime.checkpoint import FLOAT_DTYPES, THINKER_PREFIXES, Checkpoint, TensorInfo
from ming_rt.runtime.device import CPU, Device
from ming_rt.runtime.memory import available_memory
from ming_rt.runtime.transfer import send
from ming_rt.runtime.upload import Uploader

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "PlanSource",
    "RandomSource",
    "RecordingSource",
    "Shard",
    "TensorInfo",
    "WeightSource",
    "load",
]

Shard = tuple[int, int, int]  # dim, rank, world: the rank's equal share of that dim
Progress = Callable[[int, int], None]  # bytes done, bytes in total
T = TypeVar("T")

META = torch.device("meta")

# Tensors asked for together are used together: a view's file pages are given back this many requests later.
_IN_USE = 4
_COPY_BYTES = 8 << 20


class WeightSource(Protocol):
    """What model constructors need.

    ``dtype`` is the compute dtype, ``rank`` of ``world`` the split, ``device`` where everything a model keeps
    lives, ``quant`` (None, "int8" or "int4") what the thinker packs its large weights as.
    """

    dtype: torch.dtype
    rank: int
    world: int
    device: torch.device
    quant: Quant | None

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds this tensor (for those that are optional)."""
        ...

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        """The tensor ``name`` of full shape ``shape``; raises WeightsError if it is missing or different.

        It is on ``device``. With ``dtype`` it is converted, contiguous and owned by the caller. Without, it
        keeps the stored dtype and may be a view of the mapped file: for packing at once, not for keeping.
        ``shard`` takes one rank's share of a dim.
        """
        ...


def sharded(shape: Iterable[int], shard: Shard | None) -> tuple[int, ...]:
    """The shape of a rank's share."""
    dims = list(shape)
    if shard is not None:
        dim, rank, world = shard
        if dims[dim] % world or not 0 <= rank < world:
            raise ValueError(
                f"shard {shard} of shape {tuple(dims)}: the dim does not divide into {world} shares"
            )
        dims[dim] //= world
    return tuple(dims)


def take_shard(tensor: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """A rank's share as a view."""
    if shard is None:
        return tensor
    dim, rank, _ = shard
    size = sharded(tensor.shape, shard)[dim]
    return tensor.narrow(dim, rank * size, size)


class PlanSource:
    """Meta tensors; remembers what was asked for.

    ``check()`` compares that with the checkpoint before any data are read; ``nbytes`` and ``parameters``
    count what the model will hold. With ``rows`` the bytes are those of a GPU's packed layout, row padding
    and quantisation included; without, those of the plain values.
    """

    device = META

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        dtype: torch.dtype = torch.bfloat16,
        rank: int = 0,
        world: int = 1,
        *,
        quant: Quant | None = None,
        rows: bool = False,
    ) -> None:
        self.dtype, self.rank, self.world = dtype, rank, world
        self.quant, self.rows = quant, rows
        self.checkpoint = checkpoint
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes = 0
        self.parameters = 0
        self._twice: list[str] = []

    def has(self, name: str) -> bool:
        return self.checkpoint is not None and name in self.checkpoint.tensors

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        full = tuple(shape)
        part = sharded(full, shard)
        if name in self.shapes:
            self._twice.append(name)
        else:
            self.shapes[name] = full
            self.parameters += math.prod(full)
            self.nbytes += self._kept(name, part, dtype)
        stored = self.checkpoint.tensors.get(name) if self.checkpoint else None
        stored_dtype = FLOAT_DTYPES.get(stored.dtype) if stored else None
        return torch.empty(part, dtype=dtype or stored_dtype or self.dtype, device="meta")

    def _kept(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
        """Bytes of a tensor as the model keeps it; one asked for without a dtype gets packed."""
        if dtype is None and self.rows:
            quant = self.quant if name.startswith("model.") else None  # the encoders stay as they are
            packed = packed_memory(shape[0], math.prod(shape[1:]), self.dtype, False, "rows", quant, META)
            return sum(part.nbytes for part in packed if part is not None)
        return math.prod(shape) * (dtype or self.dtype).itemsize

    def problems(self) -> list[str]:
        """Everything wrong: the files' own damage, then missing, malformed and unexpected tensors."""
        if self.checkpoint is None:
            return []
        tensors = self.checkpoint.tensors
        found = list(self.checkpoint.problems)
        found += [f"{name}: asked for twice" for name in self._twice]
        for name, shape in self.shapes.items():
            info = tensors.get(name)
            if info is None:
                found.append(f"{name}: missing, expected shape {list(shape)}")
            elif info.shape != shape:
                found.append(f"{name}: shape {list(info.shape)}, expected {list(shape)}")
            elif info.dtype not in FLOAT_DTYPES:
                found.append(f"{name}: stored as {info.dtype}, expected F32, F16 or BF16")
        loaded = {name.split(".", 1)[0] + "." for name in self.shapes}
        for info in self.checkpoint.under(loaded):
            if info.name not in self.shapes:
                found.append(f"{info.name}: unexpected (shape {list(info.shape)} in {info.file})")
        return found

    def check(self) -> None:
        """Raises one WeightsError naming everything missing, unexpected or malformed."""
        problems = self.problems()
        if problems:
            raise WeightsError(problems)


class CheckpointSource:
    """Tensors of a checkpoint, straight from the mapped files.

    File pages are given back as soon as their tensor was handed on, so that reading adds a few MB to the
    tensors kept. To a GPU the stored bytes travel through two staging buffers; conversion is done there.

    Args:
        progress: called with the stored bytes done and in total.
        upload: takes a tensor of the host to ``device``; None = as it is done for that device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        progress: Progress | None = None,
        rank: int = 0,
        world: int = 1,
        total_bytes: int | None = None,
        *,
        device: torch.device = CPU,
        quant: Quant | None = None,
        upload: Uploader | None = None,
    ) -> None:
        self.dtype, self.rank, self.world = dtype, rank, world
        self.device, self.quant = device, quant
        self.upload = Uploader(device) if upload is None and device.type == "cuda" else upload
        self.checkpoint = checkpoint
        self.progress = progress
        self.done_bytes = 0
        self.total_bytes = (
            sum(info.nbytes for info in checkpoint.under(THINKER_PREFIXES))
            if total_bytes is None
            else total_bytes
        )
        self._in_use: deque[str] = deque()

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        info, full = self.checkpoint.tensors.get(name), tuple(shape)
        if info is None:
            raise WeightsError(f"{name}: missing, expected shape {list(full)}")
        if info.shape != full:
            raise WeightsError(f"{name}: shape {list(info.shape)}, expected {list(full)}")
        while len(self._in_use) >= _IN_USE:
            self.checkpoint.advise(self._in_use.popleft(), mmap.MADV_DONTNEED)
        view = take_shard(self.checkpoint.view(name), shard)
        self.done_bytes += info.nbytes
        if self.progress:
            self.progress(self.done_bytes, self.total_bytes)
        if self.upload:
            uploaded = self.upload(view, lambda: self.checkpoint.advise(name, mmap.MADV_DONTNEED))
            return uploaded if dtype is None else uploaded.to(dtype)
        if dtype is not None:
            return self._copy(info, view, dtype)
        self._in_use.append(name)
        return view

    def finish(self) -> None:
        """Gives all pages back, and a GPU's memory that only reading took.

        Views handed out stay valid (they are read again if used).
        """
        self.checkpoint.drop_pages()
        if self.device.type == "cuda":
            # The model may be used on any stream. Waiting for the whole device would end graphs that other
            # threads are recording.
            torch.cuda.current_stream(self.device).synchronize()
            torch.cuda.empty_cache()

    def _copy(self, info: TensorInfo, view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Converts piece by piece, giving pages back in between."""
        out = torch.empty(view.shape, dtype=dtype)
        rows = view.shape[0] if view.dim() else 1
        step = max(1, rows * _COPY_BYTES // max(1, info.nbytes))
        if step >= rows:
            out.copy_(view)
        for row in range(0, rows, step) if step < rows else ():
            out[row : row + step].copy_(view[row : row + step])
            self.checkpoint.advise(info.name, mmap.MADV_DONTNEED)
        return out


def default_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep a random model's activations near one in any dtype."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "expert_bias":
        return 0.0, 0.02
    if leaf == "positional_embedding":
        return 0.0, 0.1
    if len(shape) == 1:
        return (1.0, 0.05) if leaf == "weight" else (0.0, 0.02)
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


class RandomSource:
    """Normal random tensors, a function of seed and name only. For benches and the demo checkpoint.

    Tensors above ``_POOL`` values repeat a common pool from a name-dependent place: good enough for
    timing, and filled at the speed of a copy. The numbers are the same on every device.
    """

    _POOL = (1 << 18) + 7  # not a multiple of any row length, so that rows differ

    def __init__(
        self,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        scale: Callable[[str, tuple[int, ...]], tuple[float, float]] = default_scale,
        rank: int = 0,
        world: int = 1,
        *,
        device: torch.device = CPU,
        quant: Quant | None = None,
    ) -> None:
        self.dtype, self.rank, self.world = dtype, rank, world
        self.device, self.quant = device, quant
        self.seed, self.scale = seed, scale
        self._pool = self._normal("", self._POOL)

    def has(self, name: str) -> bool:
        return False

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        full = tuple(shape)
        mean, std = self.scale(name, full)
        count = math.prod(full)
        if count <= self._POOL:
            values = self._normal(name, count) * std + mean
            whole = values.to(dtype or self.dtype)
        else:
            pool = (self._pool * std + mean).to(dtype or self.dtype)
            start = zlib.crc32(name.encode()) % self._POOL
            repeats = -(-(start + count) // self._POOL)
            whole = pool.expand(repeats, -1).reshape(-1)[start : start + count]
        part = take_shard(whole.view(full), shard)
        return part.contiguous() if dtype is not None else part

    def _normal(self, name: str, count: int) -> torch.Tensor:
        # numpy's generators give the same numbers on every instruction set; torch's do not promise it.
        generator = np.random.Generator(np.random.Philox(key=[self.seed, zlib.crc32(name.encode())]))
        (values,) = send([generator.standard_normal(count, dtype=np.float32)], self.device)
        return values


class RecordingSource:
    """Makes every tensor a constructor asks for and keeps it in ``tensors`` under its checkpoint name.

    The constructor itself gets meta tensors: nothing is packed or computed.

    Args:
        source: makes the values.
        stored: the on-disk dtype of a tensor, by name.
    """

    world, rank = 1, 0
    device, quant = META, None

    def __init__(self, source: WeightSource, stored: Callable[[str], torch.dtype]) -> None:
        self.source, self.stored, self.dtype = source, stored, source.dtype
        self.tensors: dict[str, torch.Tensor] = {}

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def tensor(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> torch.Tensor:
        stored = self.stored(name)
        self.tensors[name] = self.source.tensor(name, shape, torch.float32).to(stored)
        return torch.empty(sharded(shape, shard), dtype=dtype or stored, device="meta")


def plan(
    build: Callable[[WeightSource], object],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    device: Device | None = None,
    quant: Quant | None = None,
    rank: int = 0,
    world: int = 1,
) -> PlanSource:
    """What a model will read and hold; the arguments are those of ``load``.

    Raises:
        WeightsError: names everything missing, unexpected or malformed.
    """
    rows = device is not None and device.kind != "cpu"
    source = PlanSource(checkpoint, dtype, rank, world, quant=quant, rows=rows)
    build(source)
    source.check()
    return source


def load(
    build: Callable[[WeightSource], T],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    device: Device | None = None,
    quant: Quant | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    planned: PlanSource | None = None,
) -> T:
    """Builds a model from a checkpoint: every tensor is accounted for before the first byte is read.

    Args:
        build: calls the model's constructor with the source it is given; called twice.
        dtype: compute dtype, torch.float32 or torch.bfloat16.
        device: where the model lives; None = the CPU.
        quant: what the thinker's large weights are packed as, "int8" or "int4"; None = ``dtype``.
        progress: called with the stored bytes done and in total.
        planned: the result of ``plan``, if that was called before.

    Raises:
        WeightsError: names everything missing, unexpected or malformed.
        CapacityError: the weights do not fit into the free memory.
    """
    device = device or Device()
    planned = planned or plan(build, checkpoint, dtype, device=device, quant=quant, rank=rank, world=world)
    if device.torch.type == "cpu" and planned.nbytes > (free := available_memory()):
        raise CapacityError(f"the weights need {planned.nbytes} bytes of memory, {free} are free")
    total = sum(checkpoint.tensors[name].nbytes for name in planned.shapes)
    source = CheckpointSource(
        checkpoint, dtype, progress, rank, world, total, device=device.torch, quant=quant
    )
    model: T | None = None
    with suppress(torch.OutOfMemoryError):  # not kept as a cause: its frames hold what was loaded
        model = build(source)
    if model is None:
        raise CapacityError(
            f"{device}: the weights of {planned.nbytes} bytes do not fit into the free memory"
        )
    source.finish()
    return model
