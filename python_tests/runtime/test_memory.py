"""Free memory respects the limits of a container; a GPU's memory is shared out before it is filled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import ming_rt
from ming_rt.config import OmniConfig
from ming_rt.demo import config_dict, preprocessor_dict
from ming_rt.errors import CapacityError
from ming_rt.pipelines import session
from ming_rt.runtime import planner
from ming_rt.runtime.device import Device
from ming_rt.runtime.memory import available_memory
from ming_rt.runtime.options import EngineOptions
from ming_rt.runtime.planner import RESERVE, MemoryPlan, activation_bytes, thinker_values, vision_values


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, 1000 * 1024),
        ({"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 1\ninactive_file 3000"}, 4000),
        ({"memory.max": "5000", "memory.current": "6000", "memory.stat": "anon 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "7000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "cache 1",
            },
            6000,
        ),
    ],
)
def test_the_smaller_limit_counts(tmp_path, files, expected):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  1000 kB\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert available_memory(meminfo, tmp_path / "cgroup") == expected


def test_this_machine_has_some():
    assert available_memory() > 1 << 20


PLAN = MemoryPlan("cuda:0 (GPU)", 1000, 100, 0.9, weights=300, activations=50, media=20, reserve=30)


def test_the_cache_takes_what_the_rest_leaves():
    assert PLAN.kv == 900 - 100 - 300 - 50 - 20 - 30 == 400
    assert replace(PLAN, utilization=1).kv == 500
    assert replace(PLAN, weights=701).kv == -1
    PLAN.check(400, "a cache")


def test_too_little_is_told_with_all_numbers():
    with pytest.raises(CapacityError) as error:
        PLAN.check(401, "a cache of 64 tokens")
    assert str(error.value) == (
        "cuda:0 (GPU): a cache of 64 tokens needs 401 bytes of KV cache, 400 are left: "
        "gpu_memory_utilization 0.9 of 1000 bytes, less 100 in use, 300 for weights, 50 for activations, "
        "20 for encoded media and 30 in reserve"
    )
    with pytest.raises(CapacityError, match=r"the rest alone lacks 500: gpu_memory_utilization 0\.9 of"):
        replace(PLAN, weights=1200).check(1, "a cache")


def test_activations_grow_with_what_they_hold():
    config = OmniConfig.from_dict(config_dict("v1.5", "real"), preprocessor_dict("v1.5"))
    thinker = config.thinker
    # By hand: 4 x 2048, then 6 experts of 1408 + 2048 + 6; 2 shared of 1408: gate and up in float32, which is
    # four values, and the inner row; twice 64 logits.
    assert thinker_values(thinker) == 4 * 2048 + 6 * (1408 + 2048 + 6) + (4 + 1) * 2 * 1408 + 2 * 64
    bare = replace(config, vision=None, audio={})
    step = 512 * 2 * thinker_values(thinker) + 3 * 4 * thinker.vocab_size * 16
    assert activation_bytes(bare, torch.bfloat16, 512, 16) == step * 11 // 10
    narrow, wide = (activation_bytes(bare, dtype, 512, 0) for dtype in (torch.bfloat16, torch.float32))
    assert wide == pytest.approx(2 * narrow, abs=1)
    seen = activation_bytes(config, torch.bfloat16, 512, 16)
    vision = config.vision
    assert vision is not None
    assert seen == 49152 * (1176 * 6 + 2 * vision_values(vision)) * 11 // 10, "a video outweighs a step"
    assert 1 << 30 < seen < 3 << 30
    assert activation_bytes(config, torch.bfloat16, 1 << 20, 16) > 10 * seen


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(free)``: the plan of a session asks a pretended GPU of 24 GB for its free memory."""

    def pretend(free: int, **options) -> EngineOptions:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24_000_000_000))
        config = OmniConfig.from_dict(config_dict("v1.5"), preprocessor_dict("v1.5"))
        asked = EngineOptions(page_size=session.PAGE_SIZE)
        place = Device("cuda", torch.device("cuda", 0), "GPU")
        plan = planner.memory_plan(place, 0.9, 2_000_000_000, config, torch.bfloat16, asked)
        assert (plan.total, plan.used, plan.reserve) == (24_000_000_000, 24_000_000_000 - free, RESERVE)
        limits = (options.get("kv_bytes"), options.get("max_model_len"))
        return planner.with_pages(asked, config.thinker, torch.bfloat16, *limits, plan)

    return pretend


PAGE = 32 * 2 * 3 * 2 * 128 * 2  # bytes: 32 tokens, key and value, 3 layers, 2 heads of 128, bfloat16


def test_pages_of_a_gpu(gpu):
    whole = gpu(24_000_000_000)
    assert whole.max_model_len == 32768
    assert whole.num_pages == 16 * 32768 // 32, "no more than all sequences can fill"
    little = gpu(6_000_000_000)
    assert 100 < little.num_pages < whole.num_pages
    assert gpu(6_000_000_000 + 10 * PAGE).num_pages == little.num_pages + 10
    assert gpu(24_000_000_000, kv_bytes=7 * PAGE + 5).num_pages == 7
    assert gpu(24_000_000_000, max_model_len=100).num_pages == 16 * 4
    with pytest.raises(CapacityError, match=r"cuda:0 \(GPU\): a cache of 32 tokens needs 98304 bytes"):
        gpu(4_500_000_000)
    with pytest.raises(CapacityError, match=r"a cache of 1000000 tokens needs .*, less 18000000000 in use"):
        gpu(6_000_000_000, max_model_len=1_000_000)
    with pytest.raises(CapacityError, match=r"needs 9000000000 bytes of KV cache"):
        gpu(6_000_000_000, kv_bytes=9_000_000_000)
    with pytest.raises(CapacityError, match=r"^max_model_len: 4096 tokens need"):
        gpu(24_000_000_000, max_model_len=4096, kv_bytes=PAGE)


def test_a_gpu_that_is_too_small_is_told_before_the_weights_are_read(monkeypatch, demo_model):
    place = Device("cuda", torch.device("cuda", 0), "GPU")
    monkeypatch.setattr(session, "resolve", lambda device: place)
    monkeypatch.setattr(session.weights, "load", lambda *a, **k: pytest.fail("the weights were read"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    with pytest.raises(CapacityError, match=r"cuda:0 \(GPU\): a cache of 32 tokens needs .* for weights"):
        ming_rt.load(demo_model("v1.5"), device="cuda", quant="int4")
