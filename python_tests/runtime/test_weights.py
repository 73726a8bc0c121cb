"""Checkpoint files, hostile and honest, and the weight sources over them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ming_rt.errors import CapacityError, WeightsError
from ming_rt.runtime.checkpoint import Checkpoint
from ming_rt.runtime.progress import ProgressBar
from ming_rt.runtime.weights import (
    CheckpointSource,
    PlanSource,
    RandomSource,
    RecordingSource,
    load,
)


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from a header that may be nonsense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"model.a": entry([2], 0, 8)}, b"\0" * 4, "file truncated"),
        ({"model.a": entry([3], 0, 8)}, b"\0" * 8, "needs 12 bytes"),
        ({"model.a": entry([2], 0, 8), "model.b": entry([2], 4, 12)}, b"\0" * 12, "overlap those of model.a"),
        (
            {"model.a": entry([2], 0, 8), "model.b": entry([1], 12, 16)},
            b"\0" * 16,
            "4 unused bytes before model.b",
        ),
        ({"model.a": entry([2], 4, 12)}, b"\0" * 12, "4 unused bytes before model.a"),
        ({"model.a": entry([2], 0, 8)}, b"\0" * 12, "4 unused bytes at the end"),
        ({"model.a": entry([2], 0, 8, "F31")}, b"\0" * 8, "unknown dtype 'F31'"),
        ({"model.a": entry([2], 0, 8, 5)}, b"\0" * 8, "unknown dtype 5"),
        ({"model.a": entry([-1, -2], 0, 8)}, b"\0" * 8, "expected up to 8 integers"),
        ({"model.a": entry([2.0], 0, 8)}, b"\0" * 8, "expected up to 8 integers"),
        ({"model.a": entry([True, 2], 0, 8)}, b"\0" * 8, "expected up to 8 integers"),
        ({"model.a": entry([1] * 9, 0, 4)}, b"\0" * 4, "expected up to 8 integers"),
        ({"model.a": entry([2**32, 2**32], 0, 0)}, b"", "overflows"),
        ({"model.a": entry([2**61, 2**61, 2**6], 0, 0)}, b"", "overflows"),
        ({"model.a": entry([2], 8, 0)}, b"\0" * 8, "0 <= begin <= end"),
        ({"model.a": entry([2], -8, 0)}, b"\0" * 8, "0 <= begin <= end"),
        ({"model.a": entry([2], 0, 10**400)}, b"\0" * 8, "file truncated"),
        ({"model.a": entry([2], "0", 8)}, b"\0" * 8, "expected two integers"),
        ({"model.a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "no object of dtype"),
        ({"model.a": [1]}, b"", "no object of dtype"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b"[]", b"", "no JSON object"),
        (b"{", b"", "not valid JSON"),
        (b'{"model.a": {}, "model.a": {}}', b"", "more than once"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, b"", "nested deeper"),
    ],
)
def test_hostile_header(tmp_path, header, data, message):
    write_raw(tmp_path / "model.safetensors", header, data)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        checkpoint.check()


@pytest.mark.parametrize(
    ("length", "message"),
    [(100, "in a file of"), (2**63, "expected at most 100000000"), (100_000_001, "expected at most")],
)
def test_header_length(tmp_path, length, message):
    write_raw(tmp_path / "model.safetensors", {}, length=length)
    assert any(message in problem for problem in Checkpoint(tmp_path).problems)


def test_files_that_are_none(tmp_path):
    with pytest.raises(WeightsError, match="found neither"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert "too short" in Checkpoint(tmp_path).problems[0]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in Checkpoint(tmp_path).problems[0]
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in Checkpoint(tmp_path).problems[0]


def test_problem_list_is_bounded(tmp_path):
    write_raw(tmp_path / "model.safetensors", {f"model.{i}": entry([1], 0, 4, "X") for i in range(5000)})
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.problems) == 1000
    with pytest.raises(WeightsError) as error:
        checkpoint.check()
    assert "and 950 more" in str(error.value)


def test_names_cannot_reach_the_terminal(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"model.\x1b[2J" + "x" * 1000: entry([1], 0, 4, "X")})
    (problem,) = Checkpoint(tmp_path).problems
    assert "\x1b" not in problem
    assert len(problem) < 300


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../secret.safetensors", "expected the name of a .safetensors file"),
        ("/etc/passwd", "expected the name of a .safetensors file"),
        ("sub/model.safetensors", "expected the name of a .safetensors file"),
        ("..", "expected the name of a .safetensors file"),
        ("", "expected the name of a .safetensors file"),
        ("a\0.safetensors", "no such file"),
        ("missing.safetensors", "no such file"),
        ("link.safetensors", "a link out of the checkpoint directory"),
        ("loop.safetensors", "no such file"),
    ],
)
def test_index_paths(tmp_path, file, message):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"model.a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (directory / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (directory / "loop.safetensors").symlink_to(directory / "loop.safetensors")
    write_index(directory, {"model.a": file})
    checkpoint = Checkpoint(directory)
    assert len(checkpoint.problems) == 1
    assert message in checkpoint.problems[0]
    assert checkpoint.tensors == {}


def test_links_inside_and_into_a_hub_cache(tmp_path):
    save_file({"model.a": torch.ones(2)}, tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    write_index(tmp_path, {"model.a": "link.safetensors"})
    assert Checkpoint(tmp_path).problems == []
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"model.a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(blobs / "0123")
    checkpoint = Checkpoint(snapshot)
    assert checkpoint.problems == []
    assert checkpoint.view("model.a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"model.a": 3}}', b"{}", b'{"a": NaN}']
)
def test_wrong_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(WeightsError):
        Checkpoint(tmp_path).check()


def test_index_and_shards_disagree(tmp_path):
    save_file({"model.a": torch.zeros(2), "model.extra": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"model.a": torch.zeros(2), "model.b": torch.zeros(2)}, tmp_path / "two.safetensors")
    files = {"model.a": "one.safetensors", "model.b": "two.safetensors", "model.c": "one.safetensors"}
    write_index(tmp_path, files | {"model.d": "gone.safetensors"})
    with pytest.raises(WeightsError) as error:
        Checkpoint(tmp_path).check()
    problems = "\n".join(error.value.problems)
    assert len(error.value.problems) == 4
    assert "model.a: in both one.safetensors and two.safetensors" in problems
    assert "model.extra: in one.safetensors, but not listed" in problems
    assert "model.c: listed for one.safetensors" in problems
    assert "gone.safetensors: no such file" in problems


def test_shards_of_other_parts_are_not_opened(tmp_path):
    save_file({"model.a": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"model.a": "one.safetensors", "talker.x": "two.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.problems == []
    assert checkpoint.not_opened == {"talker.x": "two.safetensors"}
    assert len(Checkpoint(tmp_path, prefixes=("",)).problems) == 1


def test_single_file_wins_over_an_index(tmp_path):
    save_file({"model.a": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"model.b": "gone.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert (list(checkpoint.tensors), checkpoint.problems) == (["model.a"], [])


def test_views(tmp_path):
    tensors = {
        "model.f32": torch.randn(3, 5),
        "model.bf16": torch.randn(7, 2).bfloat16(),
        "model.f16": torch.randn(4).half(),
        "model.scalar": torch.tensor(2.5),
        "model.none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = Checkpoint(tmp_path)
        for name, expected in tensors.items():
            found = checkpoint.view(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            found.mul_(0)  # a private copy of the page, not the file
    assert (tmp_path / "model.safetensors").read_bytes() == before
    view = checkpoint.view("model.bf16")
    del checkpoint
    assert torch.count_nonzero(view) == 0  # the mapping lives as long as the view


def test_misaligned_tensor_is_copied(tmp_path):
    data = b"\x01" + struct.pack("<2f", 1.5, -2.0)
    header = {"model.byte": entry([1], 0, 1, "U8"), "model.a": entry([2], 1, 9)}
    text = json.dumps(header)
    write_raw(tmp_path / "model.safetensors", text.ljust(-(-len(text) // 8) * 8).encode(), data)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.problems == []
    assert checkpoint.view("model.a").tolist() == [1.5, -2.0]
    with pytest.raises(WeightsError, match="stored as U8"):
        checkpoint.view("model.byte")


class Toy:
    """A model in miniature: one packed-style read, one owned, one sharded, one optional."""

    def __init__(self, src) -> None:
        self.a = src.tensor("model.a.weight", (4, 6)).clone()
        self.norm = src.tensor("model.norm.weight", (6,), src.dtype)
        self.part = src.tensor("audio.b", (6, 4), src.dtype, (1, src.rank, src.world))
        self.bias = src.tensor("model.bias", (6,), src.dtype) if src.has("model.bias") else None


TOY = {
    "model.a.weight": torch.arange(24.0).view(4, 6).half(),
    "model.norm.weight": torch.arange(6.0),
    "audio.b": torch.arange(24.0).view(6, 4).bfloat16(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load(tmp_path, dtype):
    save_file({**TOY, "talker.x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    seen = []
    model = load(Toy, Checkpoint(tmp_path), dtype, progress=lambda done, total: seen.append((done, total)))
    assert model.a.dtype == torch.float16
    assert model.norm.dtype == model.part.dtype == dtype
    assert torch.equal(model.a, TOY["model.a.weight"])
    assert torch.equal(model.part.float(), TOY["audio.b"].float())
    assert model.bias is None
    total = 24 * 2 + 6 * 4 + 24 * 2
    assert [total for _, total in seen] == [total] * 3
    assert seen[-1][0] == total


def test_load_optional_and_sharded(tmp_path):
    save_file({**TOY, "model.bias": torch.ones(6)}, tmp_path / "model.safetensors")
    model = load(Toy, Checkpoint(tmp_path), torch.float32, rank=1, world=2)
    assert torch.equal(model.part, TOY["audio.b"][:, 2:].float())
    assert model.part.is_contiguous()
    assert model.bias is not None
    with pytest.raises(ValueError, match="does not divide"):
        load(Toy, Checkpoint(tmp_path), torch.float32, rank=0, world=3)


def test_accounting_names_everything_at_once(tmp_path):
    tensors = {
        "model.norm.weight": torch.zeros(7),
        "model.a.weight": torch.zeros(4, 6, dtype=torch.int32),
        "model.a.weight_scale": torch.zeros(1),
        "audio.old": torch.zeros(2),
        "talker.x": torch.zeros(2),
        "vision.unused": torch.zeros(2),  # no vision part was built: not ours
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load(Toy, Checkpoint(tmp_path), torch.float32)
    assert sorted(error.value.problems) == [
        "audio.b: missing, expected shape [6, 4]",
        "audio.old: unexpected (shape [2] in model.safetensors)",
        "model.a.weight: stored as I32, expected F32, F16 or BF16",
        "model.a.weight_scale: unexpected (shape [1] in model.safetensors)",
        "model.norm.weight: shape [7], expected [6]",
    ]


def test_nothing_is_read_before_the_check(tmp_path):
    save_file({"model.norm.weight": torch.zeros(7)}, tmp_path / "model.safetensors")
    read = []
    checkpoint = Checkpoint(tmp_path)
    checkpoint.view = lambda name: read.append(name)  # type: ignore[method-assign]
    with pytest.raises(WeightsError):
        load(Toy, checkpoint, torch.float32)
    assert read == []


def test_a_tensor_is_asked_for_once(tmp_path):
    save_file(TOY, tmp_path / "model.safetensors")
    plan = PlanSource(Checkpoint(tmp_path), torch.bfloat16)
    Toy(plan)
    plan.check()
    Toy(plan)
    with pytest.raises(WeightsError, match="asked for twice"):
        plan.check()


def test_plan_counts(tmp_path):
    plan = PlanSource(dtype=torch.bfloat16, rank=0, world=2)
    model = Toy(plan)
    assert model.part.is_meta
    assert model.part.shape == (6, 2)
    assert (plan.parameters, plan.nbytes) == (24 + 6 + 24, 2 * (24 + 6 + 12))
    plan.check()


@pytest.mark.parametrize(
    ("quant", "dtype", "expected"),
    [
        # model.a [3, 70] packed, model.b [70] kept, vision.c [3, 2, 70] packed; [n, kp] of whole 16 bytes.
        (None, torch.bfloat16, 3 * 72 * 2 + 70 * 2 + 3 * 144 * 2),
        (None, torch.float32, 3 * 72 * 4 + 70 * 4 + 3 * 140 * 4),
        # Whole groups of 64 with a bfloat16 scale each; the encoders are not quantised.
        ("int8", torch.bfloat16, 3 * 2 * (64 + 2) + 70 * 2 + 3 * 144 * 2),
        ("int4", torch.bfloat16, 3 * 2 * (32 + 2) + 70 * 2 + 3 * 144 * 2),
    ],
)
def test_plan_counts_the_packed_layout(quant, dtype, expected):
    plan = PlanSource(dtype=dtype, quant=quant, rows=True)
    plan.tensor("model.a", (3, 70))
    plan.tensor("model.b", (70,), dtype)
    plan.tensor("vision.c", (3, 2, 70))
    assert plan.nbytes == expected


def test_source_without_a_plan_still_refuses(tmp_path):
    save_file(TOY, tmp_path / "model.safetensors")
    source = CheckpointSource(Checkpoint(tmp_path), torch.float32)
    with pytest.raises(WeightsError, match=r"audio\.b: shape \[6, 4\], expected \[6, 5\]"):
        source.tensor("audio.b", (6, 5))
    with pytest.raises(WeightsError, match=r"audio\.c: missing"):
        source.tensor("audio.c", (6, 5))


class Late:
    """An upload that keeps what it was given and arrives as a copy; ``Uploader`` has tests of its own."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, host: torch.Tensor, taken) -> torch.Tensor:
        self.seen.append(host.clone())
        taken()
        return host.clone()


def test_the_stored_dtype_crosses_the_bus(tmp_path):
    save_file(TOY, tmp_path / "model.safetensors")
    upload, checkpoint, given_back = Late(), Checkpoint(tmp_path), []
    advise = checkpoint.advise
    checkpoint.advise = lambda name, advice: (given_back.append(name), advise(name, advice))
    source = CheckpointSource(checkpoint, torch.float32, rank=1, world=2, upload=upload)
    model = Toy(source)
    source.finish()
    assert [t.dtype for t in upload.seen] == [torch.float16, torch.float32, torch.bfloat16]
    assert [tuple(t.shape) for t in upload.seen] == [(4, 6), (6,), (6, 2)], "only the rank's share"
    assert given_back == ["model.a.weight", "model.norm.weight", "audio.b"]
    assert model.a.dtype == torch.float16
    assert torch.equal(model.a, TOY["model.a.weight"])
    assert model.part.dtype == torch.float32
    assert torch.equal(model.part, TOY["audio.b"][:, 2:].float())


def test_memory_that_runs_out_on_the_device(tmp_path):
    save_file(TOY, tmp_path / "model.safetensors")

    def build(src):
        if src.device.type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        Toy(src)

    with pytest.raises(CapacityError, match="cpu: the weights of 108 bytes do not fit"):
        load(build, Checkpoint(tmp_path), torch.bfloat16)


def test_random_source_depends_on_seed_and_name_only():
    def draw(seed: int, name: str, shape=(300, 1000), **options) -> torch.Tensor:
        return RandomSource(seed, torch.float32).tensor(name, shape, **options)

    for shape in ((8, 16), (300, 1000)):  # drawn, and taken from the pool
        first = draw(0, "a.weight", shape)
        assert torch.equal(first, draw(0, "a.weight", shape))
        assert not torch.equal(first, draw(1, "a.weight", shape))
        assert not torch.equal(first, draw(0, "b.weight", shape))
        assert torch.equal(first[:, 4:8], draw(0, "a.weight", shape, shard=(1, 1, shape[1] // 4)))
        assert 0.5 < first.std() * shape[1] ** 0.5 < 1.5
    rows = draw(0, "a.weight")
    assert len(torch.unique(rows[:, 0])) == 300
    norm = RandomSource().tensor("norm.weight", (512,), torch.float32)
    assert 0.9 < norm.mean() < 1.1


def test_recording_source_names_what_a_checkpoint_needs():
    source = RecordingSource(
        RandomSource(0, torch.float32), lambda name: torch.float32 if "norm" in name else torch.bfloat16
    )
    model = Toy(source)
    assert model.a.is_meta
    assert {name: (tuple(t.shape), t.dtype) for name, t in source.tensors.items()} == {
        "model.a.weight": ((4, 6), torch.bfloat16),
        "model.norm.weight": ((6,), torch.float32),
        "audio.b": ((6, 4), torch.bfloat16),
    }


class Terminal:
    def __init__(self, tty: bool) -> None:
        self.text, self.tty = "", tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        self.text += ""


def test_progress_bar():
    terminal = Terminal(tty=True)
    bar = ProgressBar("loading", terminal)  # type: ignore[arg-type]
    bar(0, 4 << 30)
    bar(4 << 30, 4 << 30)
    assert terminal.text.endswith("GB/s\n")
    assert "4.3/4.3 GB" in terminal.text
    for quiet, total in ((Terminal(tty=False), 4 << 30), (Terminal(tty=True), 1 << 20)):
        ProgressBar("loading", quiet)(total, total)  # type: ignore[arg-type]
        assert quiet.text == ""


MEMORY_PROGRAM = """
import sys, threading, time, torch
from ming_rt.runtime.weights import Checkpoint, load

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def build(src):
    kept = []
    for i in range(0, 96, 3):
        three = [src.tensor(f"model.{j}.weight", (512, 1024)) for j in range(i, i + 3)]
        for w in three:
            kept.append(torch.empty(w.shape, dtype=src.dtype, device=w.device).copy_(w))  # as packing would
    kept.append(src.tensor("model.big", (40960, 1024), src.dtype))
    return kept

torch.ones(1 << 20).to(torch.bfloat16).sum()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # restart the kernel's own high-water mark
model = load(build, Checkpoint(sys.argv[1]), torch.bfloat16)
peak = status("VmHWM") - before
print(sum(t.nbytes for t in model), peak)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory"
)
def test_peak_memory(tmp_path):
    """All resident memory counts, also the mapped file's pages: the kernel's high-water mark of the RSS."""
    tensors = {f"model.{i}.weight": torch.full((512, 1024), float(i)) for i in range(96)}
    tensors["model.big"] = torch.ones(40960, 1024)
    save_file(tensors, tmp_path / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    loaded, peak = map(int, result.stdout.split())
    assert loaded == 2 * (96 * 512 * 1024 + 40960 * 1024)
    assert peak <= 1.1 * loaded, f"peak {peak / 1e6:.0f} MB for {loaded / 1e6:.0f} MB"
