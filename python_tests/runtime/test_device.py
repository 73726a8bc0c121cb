"""Devices: what can be asked for, why one cannot be had, uploads, and every tensor in its place."""

from __future__ import annotations

import gc
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import ming_rt
from ming_rt import ops
from ming_rt.config import GENERATIONS, OmniConfig
from ming_rt.demo import config_dict, preprocessor_dict
from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.models.omni import Omni
from ming_rt.models.thinker import Thinker
from ming_rt.runtime.device import Device, available, cuda_reason, resolve
from ming_rt.runtime.upload import Uploader
from ming_rt.runtime.weights import PlanSource


@pytest.fixture
def machine(monkeypatch):
    """``machine((9, 0), ...)`` pretends to GPUs of these capabilities and to all that is needed for them."""

    def pretend(*capabilities: tuple[int, int], driver: str | None = None, torch_cuda: str | None = "13.0"):
        def device_count() -> int:
            if driver:
                raise RuntimeError(driver)
            return len(capabilities)

        monkeypatch.setitem(sys.modules, "ming_rt._cuda", SimpleNamespace(device_count=device_count))
        monkeypatch.setattr(ops, "cuda_missing", None)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(name=f"GPU {index}", total_memory=80 << 30),
        )

    return pretend


@pytest.mark.parametrize(
    "text",
    ["gpu", "", "cuda:", "cuda:-1", "cuda:1.5", "cuda:٣", "cuda:99999", "CUDA", "cpu:0", "cpu\n", "x" * 999],
)
def test_other_words_are_no_devices(machine, text):
    machine((9, 0))
    with pytest.raises(
        InvalidRequestError, match=r"^device: found .*expected 'auto', 'cpu', 'cuda', 'cuda:N'"
    ):
        resolve(text)


@pytest.mark.parametrize("value", [3, None, True, b"cpu", torch.device("cpu"), ["cpu"]])
def test_other_types_are_no_devices(value):
    with pytest.raises(InvalidRequestError, match=r"^device: found"):
        resolve(value)


def test_the_cpu_is_always_there(machine):
    machine(driver="no driver")
    for text in ("cpu", "auto"):
        found = resolve(text)
        assert (found.kind, found.torch, str(found)) == ("cpu", torch.device("cpu"), "cpu")
        assert found.total_memory > 1 << 28
        assert ops.isa() in found.name
    assert str(available()[0]) == "cpu"


@pytest.mark.parametrize(
    ("pretended", "reason"),
    [
        (
            {"driver": "CUDA driver version is insufficient\nmore"},
            r"^no GPU can be reached \(.* insufficient\)$",
        ),
        ({"torch_cuda": None}, r"this torch \(.*\) is a build without CUDA$"),
        ({}, "^no GPU is visible$"),
    ],
)
def test_why_there_is_no_gpu(machine, monkeypatch, pretended, reason):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(**pretended)
    told = cuda_reason()
    with pytest.raises(UnsupportedError) as error:
        resolve("cuda:1")
    assert str(error.value) == f"device: found 'cuda:1', but {told}"
    assert re.search(reason, told)
    assert resolve("auto").kind == "cpu"


def test_hidden_gpus_are_named(machine, monkeypatch):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_reason() == "no GPU is visible; CUDA_VISIBLE_DEVICES is ''"
    machine(driver="no CUDA-capable device is detected")
    assert cuda_reason() == (
        "no GPU can be reached (no CUDA-capable device is detected); CUDA_VISIBLE_DEVICES is ''"
    )


def test_kernels_that_are_missing_come_first(machine, monkeypatch):
    machine((9, 0), torch_cuda=None)
    monkeypatch.setattr(ops, "cuda_missing", "nobody built them")
    assert cuda_reason() == "nobody built them"


def test_a_torch_that_fails_where_the_driver_does_not(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_reason().endswith("cannot use the CUDA driver, which the kernels can")


def test_an_old_gpu_is_refused(machine):
    machine((7, 5))
    reason = "cuda:0 (GPU 0) has compute capability 7.5, expected at least 8.0"
    assert cuda_reason() == reason
    with pytest.raises(UnsupportedError) as error:
        resolve("cuda")
    assert str(error.value) == f"device: found 'cuda', but {reason}"
    assert resolve("auto").kind == "cpu"


def test_the_first_good_gpu_is_taken(machine):
    machine((7, 0), (8, 6), (9, 0))
    assert cuda_reason() is None
    for text, index in (("auto", 1), ("cuda", 1), ("cuda:1", 1), ("cuda:2", 2), ("cuda:02", 2)):
        found = resolve(text)
        assert (found.kind, found.torch, str(found)) == ("cuda", torch.device("cuda", index), f"cuda:{index}")
    assert (found.name, found.capability, found.total_memory) == ("GPU 2", (9, 0), 80 << 30)
    with pytest.raises(UnsupportedError, match=r"cuda:0 \(GPU 0\) has compute capability 7.0"):
        resolve("cuda:0")
    with pytest.raises(UnsupportedError, match="found 'cuda:99', expected a number below 3"):
        resolve("cuda:99")
    assert [str(d) for d in available()][:3] == ["cpu", "cuda:1", "cuda:2"]


def test_emulation_that_is_not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "ming_rt._emu", None)
    with pytest.raises(UnsupportedError, match=r"found 'emu', but .* not built .*MING_RT_MODULES=emu"):
        resolve("emu")


@pytest.fixture
def emulation(monkeypatch):
    """The calls of ``ops.emulate``, with kernels that are the CPU's own."""
    calls: list[bool] = []
    monkeypatch.setitem(sys.modules, "ming_rt._emu", SimpleNamespace())
    monkeypatch.setattr(ops, "emulate", calls.append)
    monkeypatch.setattr(ops, "is_emulating", lambda: bool(calls and calls[-1]))
    return calls


def test_emulation_ends_with_its_last_user(emulation):
    assert resolve("emu").torch == torch.device("cpu")
    Device().hold()()
    assert emulation == []
    first, second = Device("emu").hold(), Device("emu").hold()
    first()
    first()
    assert emulation == [True]
    second()
    assert emulation == [True, False]


def test_emulation_goes_on_for_whoever_began_it(emulation):
    ops.emulate(True)
    Device("emu").hold()()
    assert emulation == [True, True, True]


def test_emulated_goes_back_to_what_was_before(monkeypatch):
    """Nested, or while a session on "emu" is open, it does not end what it did not begin."""
    monkeypatch.setitem(sys.modules, "ming_rt._emu", SimpleNamespace())
    with ops.emulated():
        with ops.emulated():
            assert ops.is_emulating()
        assert ops.is_emulating()
    assert not ops.is_emulating()


def test_a_session_holds_the_emulation(emulation, demo_model):
    options = {"device": "emu", "dtype": "float32", "kv_bytes": 16 << 20}
    with ming_rt.load(demo_model("v1.5"), **options) as session:
        assert session.info.device == "emu"
        assert emulation == [True]
    assert emulation == [True, False]
    session = ming_rt.load(demo_model("v1.5"), **options)
    del session
    gc.collect()
    assert emulation == [True, False, True, False]
    with pytest.raises(ming_rt.CapacityError):
        ming_rt.load(demo_model("v1.5"), **options | {"kv_bytes": 1 << 47})
    assert emulation == [True, False, True, False, True, False]


# Uploads.


class FakeLane:
    """A device whose copies happen as late as they may: when somebody waits for them, or at the end."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.buffers: list[torch.Tensor] = []
        self.pending: list[FakeEvent] = []

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.buffers.append(torch.full((nbytes,), 0xEE, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self) -> None:
        self.log.append("begin")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> FakeEvent:
        (which,) = (i for i, b in enumerate(self.buffers) if b.data_ptr() == source.data_ptr())
        self.log.append(f"copy {which}")
        self.pending.append(FakeEvent(self, which, target, source))
        return self.pending[-1]

    def end(self) -> None:
        """The device goes on by itself; the host does not wait here."""
        self.log.append("end")

    def finish(self) -> None:
        """Time passes."""
        while self.pending:
            self.pending[0].run()


class FakeEvent:
    """One copy that has not happened yet, and then has."""

    def __init__(self, lane: FakeLane, which: int, target: torch.Tensor, source: torch.Tensor) -> None:
        self.lane, self.which, self.target, self.source = lane, which, target, source

    def run(self) -> None:
        self.lane.pending.remove(self)
        self.target.copy_(self.source)
        self.source.fill_(0xEE)

    def synchronize(self) -> None:
        self.lane.log.append(f"wait {self.which}")
        while self in self.lane.pending:
            self.lane.pending[0].run()


def test_one_buffer_travels_while_the_other_is_filled():
    lane = FakeLane()
    upload = Uploader(torch.device("cpu"), lane, nbytes=64)
    host = torch.arange(72, dtype=torch.int32).view(8, 9)  # 288 bytes: four full pieces and a half
    taken: list[int] = []
    out = upload(host, lambda: taken.append(len(lane.pending)))
    assert lane.log == [
        "begin", "copy 0", "copy 1", "wait 0", "copy 0", "wait 1", "copy 1", "wait 0", "copy 0", "end",
    ]  # fmt: skip
    assert taken == [0, 1, 1, 1, 1], "one copy is under way while the next piece is read"
    lane.log.clear()
    small = torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16)
    more = [upload(small), upload(small[:1]), upload(small[1:])]
    assert lane.log == [
        "begin", "wait 1", "copy 1", "end",
        "begin", "wait 0", "copy 0", "end",
        "begin", "wait 1", "copy 1", "end",
    ]  # fmt: skip
    lane.finish()
    assert torch.equal(out, host)
    assert [t.tolist() for t in more] == [[1.5, -2.0, 3.25], [1.5], [-2.0, 3.25]]
    assert more[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "host",
    [
        torch.randn(5, 7),
        torch.randn(6, 10)[:, 2:6],
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.arange(1000).to(torch.float16),
    ],
    ids=["plain", "columns", "permuted", "scalar", "empty", "long"],
)
def test_any_tensor_arrives_whole(host):
    lane = FakeLane()
    out = Uploader(torch.device("cpu"), lane, nbytes=32)(host)
    lane.finish()
    assert out.is_contiguous()
    assert torch.equal(out, host)


# Models.


def tensors_of(value: object, path: str = "", seen: set[int] | None = None):
    """(path, tensor) of everything a model keeps."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{index}]", seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}", seen)
    elif type(value).__module__.startswith("ming_rt") and hasattr(value, "__dict__"):
        yield from tensors_of(vars(value), path, seen)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_everything_a_model_keeps_is_on_the_sources_device(generation):
    config = OmniConfig.from_dict(config_dict(generation), preprocessor_dict(generation))
    model = Omni(config, PlanSource())
    kept = dict(tensors_of(model))
    assert len(kept) > 50
    assert [path for path, tensor in kept.items() if not tensor.is_meta] == []
    assert model.device == torch.device("meta")


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_plan_counts_what_a_quantised_thinker_keeps(generation, quant):
    config = OmniConfig.from_dict(config_dict(generation), preprocessor_dict(generation))
    plan = PlanSource(quant=quant, rows=True)
    thinker = Thinker(config.thinker, plan)
    kept = {path: t for path, t in tensors_of(thinker) if ".routers" not in path and ".rope" not in path}
    routers = [s for name, s in plan.shapes.items() if name.endswith(("gate.weight", "gate.expert_bias"))]
    assert routers
    assert sum(t.nbytes for t in kept.values()) == plan.nbytes - sum(
        4 * torch.Size(s).numel() for s in routers
    )
    small = [t for t in kept.values() if t.dtype == torch.uint8]
    assert sum(t.nbytes for t in small) > plan.nbytes // 2, "all large weights but the embedding"


def test_encoders_are_not_quantised():
    config = OmniConfig.from_dict(config_dict("v1"), preprocessor_dict("v1"))
    model = Omni(config, PlanSource(quant="int4"))
    for part in (model.vision, *model.audio.values()):
        assert not [path for path, t in tensors_of(part) if t.dtype == torch.uint8 and "axis" not in path]
