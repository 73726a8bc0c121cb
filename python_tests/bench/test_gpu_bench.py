"""The bench of a GPU without one: a clock that counts costs, made-up rows, the engine on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

bench = pytest.importorskip("ming_rt.bench", reason="the bench is part of the installed package")

from ming_rt.bench import gpu_report, gpu_run, gpu_thinker, gpu_timing, peers  # noqa: E402
from ming_rt.bench.timing import Case, Row  # noqa: E402
from ming_rt.runtime.device import Device  # noqa: E402

FLUSH = 100e-6


class FakeClock:
    """A device on which a call costs what it says: ``(hot, cold)`` seconds, cold after a flush."""

    def __init__(self) -> None:
        self.now, self.flushed, self.launch = 0.0, False, 3e-6

    def work(self, hot: float, cold: float):
        def call():
            self.now += cold if self.flushed else hot
            self.flushed = False
            return torch.ones(2)

        return call

    def seconds(self, run) -> float:
        begin = self.now
        run()
        return self.now - begin + self.launch

    def graph(self, call, times, *, flush):
        if getattr(call, "waits", False):
            raise gpu_timing.NotCapturableError("it waits for the device")

        def replay():
            for _ in range(times):
                if flush:
                    self.flush()
                if call is not None:
                    call()

        return replay

    def flush(self) -> None:
        self.now += FLUSH
        self.flushed = True


def case(clock: FakeClock, **changes) -> Case:
    values = {
        "op": "op",
        "shape": "1x1",
        "dtype": "bf16",
        "ours": clock.work(10e-6, 20e-6),
        "torch": clock.work(40e-6, 60e-6),
        "bytes": 2_000_000,
        "flops": 40_000_000,
    }
    return Case(**{**values, **changes})


def test_cold_and_hot_times_leave_flush_and_launch_out():
    clock = FakeClock()
    row = gpu_timing.measure(clock, case(clock, peers={"other": lambda: clock.work(5e-6, 30e-6)}), 0.001)
    # The launch of a graph (3 us) is spread over its 40 calls.
    assert row.extra["hot_us"] == pytest.approx(10, abs=0.1)
    assert row.median_us == pytest.approx(20)
    assert row.torch_us == pytest.approx(60)
    assert row.extra["cold_us_by_peer"] == pytest.approx({"torch": 60, "other": 30})
    assert row.extra["best_peer"] == "other"
    assert row.extra["ratio_to_best"] == pytest.approx(1.5)
    assert row.extra["hot_ratio_to_best"] == pytest.approx(0.5, abs=0.05)
    assert row.extra["relative_error"] == 0
    assert row.gb_s == pytest.approx(100)
    assert row.tflop_s == pytest.approx(2)


def test_a_call_that_waits_is_timed_as_it_is_and_named():
    clock = FakeClock()
    slow = clock.work(40e-6, 60e-6)
    slow.waits = True
    row = gpu_timing.measure(clock, case(clock, torch=slow), 0.001)
    assert row.torch_us == pytest.approx(63)
    assert row.extra["eager"] == {"torch": "it waits for the device"}


def test_peers_that_cannot_run_are_named_with_the_reason():
    clock = FakeClock()

    def missing():
        raise gpu_timing.SkippedError("not installed")

    def broken():
        raise ValueError("wrong shape\nand more")

    row = gpu_timing.measure(
        clock, case(clock, torch=broken, peers={"a": missing, "b": lambda: broken}), 0.001
    )
    assert row.extra["skipped"] == {
        "torch": "failed: ValueError: wrong shape",
        "a": "not installed",
        "b": "failed: ValueError: wrong shape",
    }
    assert math.isnan(row.torch_us)
    assert row.extra["best_peer"] is None
    assert row.extra["relative_error"] is None


def test_ours_must_run():
    clock = FakeClock()

    def broken():
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        gpu_timing.measure(clock, case(clock, ours=broken), 0.001)


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]), 1 / math.sqrt(34)),
        ((torch.ones(2), None), (torch.ones(2), None), 0.0),
        (torch.ones(2), torch.ones(3), None),
        (None, torch.ones(2), None),
    ],
)
def test_relative_error(ours, other, expected):
    assert gpu_timing.relative_error(ours, other) == pytest.approx(expected)


def made_row(op="linear", **extra) -> Row:
    facts = {
        "hot_us": 8.0,
        "cold_us_by_peer": {"torch": 20.0, "triton": 12.0},
        "best_peer": "triton",
        "ratio_to_best": 1.2,
        "skipped": {"fbgemm": "not installed"},
        "eager": {"triton": "it waits"},
        "relative_error": 1e-3,
    }
    return Row(op, "1x2", "bf16", 10.0, 9.0, 11.0, 20.0, 2000.0, 1.0, {**facts, **extra})


def made_report(rows, **missing) -> gpu_report.GpuReport:
    environment = {
        "gpu": "NVIDIA H200",
        "capability": "9.0",
        "before": {"driver_version": "580", "clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz"},
        "after": {"clocks.sm": "1980 MHz"},
        "torch": "2.11",
        "cuda": "13.0",
        "triton": None,
        "ming_rt": "0.1",
        "commit": "abc",
        "date": "2026-11-20",
    }
    ceilings = gpu_report.GpuCeilings(4000.0, 800.0, 50.0, 4000.0)
    return gpu_report.GpuReport(rows, ceilings, environment, **missing)


def test_report(tmp_path):
    whole = gpu_thinker.row("decode batch 8 at 1024", [1e-3, 2e-3, 4e-3], 8, read=4e9)
    report = made_report(
        [whole, made_row()], failed={"rope x": "ValueError: no"}, left_out=["sample lite b1 greedy fp32"]
    )
    text = report.markdown()
    assert "| decode batch 8 at 1024 | 2.00 ms | 4000 tok/s | 50 % |" in text
    assert "| 10.0 | 9.0-11.0 | 8.0 | triton* | 12.0 | **1.20** | 2000 | 1.00 | 50 % | 1e-03 |" in text
    assert "- linear, fbgemm, 1 rows: not installed" in text
    assert "- `rope x`: ValueError: no" in text
    assert "- `sample lite b1 greedy fp32`" in text
    assert "SM 345 MHz and 1980 MHz (at most 1980 MHz)" in text
    paths = report.write(tmp_path)
    body = json.loads(paths[1].read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert body["rows"][0]["torch_us"] is None
    assert body["rows"][1]["extra"]["best_peer"] == "triton"
    assert body["failed"] == {"rope x": "ValueError: no"}
    assert body["rows"][1]["command"] == "ming-rt bench ops --device cuda --only 'linear 1x2 bf16'"


def test_progress_goes_on_after_a_failure_and_stops_at_the_budget(tmp_path, capsys):
    progress = gpu_run.Progress(tmp_path / "rows.jsonl", budget=1e9)

    def broken():
        raise RuntimeError("out of memory")

    progress.attempt("a", broken)
    progress.attempt("b", made_row)
    progress.budget = 0
    progress.attempt("c", made_row)
    assert progress.failed == {"a": "RuntimeError: out of memory"}
    assert [row.op for row in progress.rows] == ["linear"]
    assert progress.left_out == ["c"]
    assert json.loads((tmp_path / "rows.jsonl").read_text())["op"] == "linear"
    assert "x1.20 of triton" in capsys.readouterr().err


def test_environment_of_a_machine_with_and_without_the_tools(tmp_path, monkeypatch):
    monkeypatch.delenv("MING_RT_COMMIT", raising=False)

    def answers(command, **_):
        return SimpleNamespace(
            stdout="NVIDIA H200, 580.1, 345 MHz\n" if command[0] == "nvidia-smi" else "abc\n"
        )

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command)

    found = gpu_run.query_gpu(answers)
    assert (found["name"], found["driver_version"]) == ("NVIDIA H200", "580.1")
    assert gpu_run.query_gpu(missing) == {"nvidia-smi": "nvidia-smi"}
    assert gpu_run.commit(tmp_path, answers) == "abc+"
    assert gpu_run.commit(tmp_path, fails) == "unknown"
    monkeypatch.setenv("MING_RT_COMMIT", "def")
    assert gpu_run.commit(tmp_path, fails) == "def"
    assert gpu_run.version("no-such-package") is None


def test_ceilings_on_the_cpu():
    class Wall(FakeClock):
        def seconds(self, run):
            run()
            return 1e-3

    c = gpu_run.measure_ceilings(Wall(), "cpu", scale=256)
    assert c.copy_gb_s == pytest.approx((4 << 30) / 256 / 1e-3 / 1e9)
    assert c.read_gb_s == c.copy_gb_s
    assert c.bf16_tflop_s == pytest.approx(2 * 32**3 / 1e-3 / 1e12)


def test_a_whole_run(tmp_path, monkeypatch):
    clock = FakeClock()
    place = SimpleNamespace(torch=torch.device("cpu"), name="Made-up GPU", capability=(9, 0))
    monkeypatch.setattr(gpu_run, "resolve", lambda _: place)
    monkeypatch.setattr(gpu_run, "CudaClock", lambda: clock)
    monkeypatch.setattr(
        gpu_run, "measure_ceilings", lambda _: gpu_report.GpuCeilings(100.0, 4.0, 2.0, copy_gb_s=100.0)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def broken():
        raise RuntimeError("no kernel")

    made = [case(clock), case(clock, op="broken", ours=broken), case(clock, op="other")]
    monkeypatch.setattr(gpu_run, "op_cases", lambda _, first: made)
    report = gpu_run.run(("ops",), only="1x1", seconds=0.001, out=tmp_path)
    assert [row.op for row in report.rows] == ["op", "other"]
    assert report.failed == {"broken 1x1 bf16": "RuntimeError: no kernel"}
    assert "Made-up GPU (sm 9.0)" in report.markdown()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert report.roofline_share(report.rows[0]) == pytest.approx(1.0)
    assert gpu_run.run(("ops",), budget=-1).left_out == ["op 1x1 bf16 and all after it"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "tpu"],
        ["load", "--device", "cuda"],
        ["--budget", "5"],
        ["--device", "cuda", "--budget", "nan"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments, capsys):
    from ming_rt.cli import main

    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("ming-rt bench: ")


def test_no_gpu_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from ming_rt.cli import main

    assert main(["bench", "ops", "--device", "cuda", "--only", "nothing at all"]) == 1
    assert "device: found 'cuda', but " in capsys.readouterr().err


def test_whole_model_rows_through_the_engine(monkeypatch):
    for name, value in {"CONTEXT": 12, "SHORT": 2, "LONG": 6, "PREFILL": 40, "GRID": (1, 4, 6)}.items():
        monkeypatch.setattr(gpu_thinker, name, value)
    monkeypatch.setattr(gpu_thinker, "IMAGE_PROMPT", 20)
    monkeypatch.setattr(gpu_thinker, "RUNS", 1)
    build = gpu_thinker.build
    monkeypatch.setattr(gpu_thinker, "build", lambda device: build(device, size="tiny"))
    monkeypatch.setattr(gpu_thinker.Prompts.image, "__defaults__", ((1, 4, 6),))
    progress = gpu_run.Progress()
    gpu_thinker.measure(progress, Device())
    assert progress.failed == {}
    assert [row.shape for row in progress.rows] == [
        "decode batch 1 at 12",
        "decode batch 8 at 12",
        "prefill 40",
        "first token of a 20-token image prompt",
    ]
    gpu_thinker.measure(progress, Device(), only="no such row")
    assert len(progress.rows) == 4


def test_floors_of_the_real_model():
    from ming_rt.config import ThinkerConfig
    from ming_rt.demo import config_dict

    config = ThinkerConfig.from_dict(config_dict("v1.5", size="real"))
    one = gpu_thinker.decode_bytes(config, 1, 0)
    assert one == pytest.approx(4.98e9, rel=0.01)  # 2.49 billion active parameters
    assert gpu_thinker.decode_bytes(config, 1, 1000) - one == 57_344 * 1000
    experts = gpu_thinker.decode_bytes(config, 8, 0) / one
    assert 3 < experts < 4.5  # about 35 of 64 experts in place of 6
    matrices = 2 * 2.23e9 * 4096
    attention = 28 * 4 * 16 * 128 * 4096 * 4096 / 2
    assert gpu_thinker.prefill_flops(config, 4096) == pytest.approx(matrices + attention, rel=0.01)


def test_sdpa_peers_agree_where_they_run():
    q, k, v = (torch.randn(1, heads, 5, 16) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    made = peers.sdpa_peers(lambda: (q, k, v), causal=True)
    torch.testing.assert_close(made["sdpa math"]()(), expected)


def test_grouped_peers_name_what_is_missing(monkeypatch):
    x, w, offsets = torch.randn(5, 8), torch.randn(2, 6, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    made = peers.grouped_peers(lambda: (x, w), offsets, swiglu=False)
    assert sorted(made) == ["fbgemm", "grouped_mm", "triton"]
    with pytest.raises(gpu_timing.SkippedError, match="fbgemm-gpu-genai is not installed"):
        made["fbgemm"]()
