"""The facts behind ``ming-rt info``."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ming_rt.config import OmniConfig, ThinkerConfig
from ming_rt.demo import config_dict, make_checkpoint, preprocessor_dict
from ming_rt.errors import ConfigError
from ming_rt.models.omni import Omni
from ming_rt.models.thinker import Thinker
from ming_rt.runtime.info import active_parameters, checkpoint_info
from ming_rt.runtime.weights import PlanSource


@pytest.mark.parametrize(
    ("generation", "tensors", "total", "active"),
    [
        ("preview", 5659, 16.809e9, 2.753e9),
        ("v1", 5659, 16.809e9, 2.753e9),
        ("v1.5", 5659, 16.809e9, 2.753e9),
        ("flash", 31 * 783 + 9 + 3, 102.955e9, 6.152e9),
    ],
)
def test_published_thinker_sizes(generation, tensors, total, active):
    config = ThinkerConfig.from_dict(config_dict(generation, "real"))
    plan = PlanSource()
    Thinker(config, plan)
    assert len(plan.shapes) == tensors
    assert plan.parameters == pytest.approx(total, rel=5e-5)
    assert active_parameters(config, plan.shapes) == pytest.approx(active, rel=5e-4)


def test_published_encoder_sizes():
    plan = PlanSource()
    Omni(OmniConfig.from_dict(config_dict("flash", "real"), preprocessor_dict("flash")), plan)
    sizes: dict[str, int] = {}
    for name, shape in plan.shapes.items():
        part = name.split(".", 1)[0]
        sizes[part] = sizes.get(part, 0) + torch.Size(shape).numel()
    assert sizes["vision"] == pytest.approx(704.6e6, rel=1e-4)
    assert sizes["linear_proj"] == pytest.approx(50.3e6, rel=1e-3)
    assert sizes["audio"] == pytest.approx(629.6e6 + 5.4e6 + 19.2e6, rel=1e-3)  # with 15000 positions
    lite = PlanSource()
    Omni(OmniConfig.from_dict(config_dict("preview", "real"), preprocessor_dict("preview")), lite)
    sanm = sum(torch.Size(shape).numel() for name, shape in lite.shapes.items() if name.startswith("audio."))
    assert sanm == pytest.approx(158e6, rel=0.01)


@pytest.mark.parametrize("generation", ["preview", "v1", "v1.5", "flash"])
def test_demo_checkpoint(tmp_path, generation):
    directory = make_checkpoint(tmp_path / "demo", generation)
    info = checkpoint_info(directory)
    assert info.generation == generation
    assert (info.problems, info.notes, info.ignored_keys) == ((), (), ())
    assert info.parameters_total == sum(part.parameters for part in info.parts)
    assert 0 < info.parameters_active < info.parameters_total
    assert info.disk_bytes == sum(path.stat().st_size for path in directory.iterdir())
    assert info.kv_bytes_per_token == {"float32": 2 * 3 * 2 * 128 * 4, "bfloat16": 2 * 3 * 2 * 128 * 2}
    assert info.weight_bytes["float32"] == 4 * info.parameters_total
    half = info.weight_bytes["bfloat16"]
    assert 0 < info.quantised_bytes["int4"] < info.quantised_bytes["int8"] < half
    text = info.render()
    for part in info.parts:
        assert part.used
        assert part.name in text
    assert "problems       none" in text
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads(json.dumps(info.as_dict()))["generation"] == generation


def test_parts_that_are_not_used(tmp_path):
    directory = make_checkpoint(tmp_path / "demo", "v1.5")
    save_file({"talker.a": torch.zeros(5)}, directory / "talker.safetensors")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"talker.a": "talker.safetensors", "talker.b": "gone.safetensors"}
    path.write_text(json.dumps(index))
    (directory / "transformer").mkdir()
    (directory / "transformer" / "weights.bin").write_bytes(b"\0" * 1000)
    (directory / "talker").mkdir()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"novelty": 1}))
    info = checkpoint_info(directory)
    unused = {part.name: part for part in info.parts if not part.used}
    assert sorted(unused) == ["image generation", "talker"]
    assert (unused["talker"].tensors, unused["talker"].parameters) == (1, 5)
    assert unused["talker"].folders == ("talker",)
    assert unused["image generation"].nbytes == 1000
    assert info.problems == ()
    assert any("gone.safetensors" in note for note in info.notes)
    assert info.ignored_keys == ("novelty",)
    text = info.render()
    assert "(not used)" in text
    assert "ignored keys   novelty" in text


def test_damage_is_listed_not_raised(tmp_path):
    directory = make_checkpoint(tmp_path / "demo", "v1.5")
    shards = sorted(directory.glob("*.safetensors"))
    shards[0].unlink()
    with shards[1].open("r+b") as file:
        file.truncate(1000)
    info = checkpoint_info(directory)
    assert any("no such file" in problem for problem in info.problems)
    assert any("missing, expected shape" in problem for problem in info.problems)
    assert "... and" in info.render()
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    bare = checkpoint_info(directory)
    assert "found neither" in bare.problems[0]
    assert bare.parameters_total == info.parameters_total


def test_no_config_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        checkpoint_info(tmp_path / "none")
    with pytest.raises(ConfigError, match="file not found"):
        checkpoint_info(tmp_path)
