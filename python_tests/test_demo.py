"""The demo checkpoint of each generation, and the demo media."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors import safe_open
from thinker_harness import Prompt, Runner
from tokenizers import Tokenizer
from tolerances import TABLE

from ming_rt.config import GENERATIONS, OmniConfig
from ming_rt.demo import config_dict, default_checkpoint, demo_media, make_checkpoint
from ming_rt.models.omni import Omni
from ming_rt.runtime.weights import Checkpoint, load


@pytest.fixture(scope="module", params=GENERATIONS)
def made(request, tmp_path_factory) -> tuple[str, Path]:
    """Generation and directory of a demo checkpoint."""
    return request.param, make_checkpoint(tmp_path_factory.mktemp("demo") / request.param, request.param)


def test_layout_is_upstreams(made):
    generation, directory = made
    names = {path.name for path in directory.iterdir()}
    expected = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"special_tokens_map.json", "model.safetensors.index.json"}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == expected | ({"am.mvn"} if generation in ("preview", "v1") else set())
    assert shards == {f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)}
    assert len(shards) > 1
    assert sum(path.stat().st_size for path in directory.iterdir()) < 40e6
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        with safe_open(directory / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored[name] = (shard, file.get_tensor(name))
    assert {name: shard for name, (shard, _) in stored.items()} == index["weight_map"]
    assert sum(tensor.nbytes for _, tensor in stored.values()) == index["metadata"]["total_size"]
    weights = {t.dtype for name, (_, t) in stored.items() if not name.endswith("expert_bias")}
    assert weights == {torch.float32 if generation == "v1" else torch.bfloat16}
    assert all(tensor.isfinite().all() for _, tensor in stored.values())


def test_config_and_tokenizer_agree(made):
    generation, directory = made
    config = OmniConfig.from_dir(directory)
    thinker, tokenizer = config.thinker, Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert config.generation == generation
    assert config.ignored_keys == ()
    ids = {
        "image_patch_token": "<imagePatch>",
        "eos_token_id": "<|role_end|>" if generation == "flash" else "<|endoftext|>",
        "pad_token_id": "<|endoftext|>",
    }
    if generation in ("v1.5", "flash"):
        # flash ships the id of </image> as video_start_token
        ids |= {"image_start_token": "<image>"}
        ids |= {"video_start_token": "</image>" if generation == "flash" else "<video>"}
    if generation == "flash":
        ids |= {"video_patch_token": "<framePatch>"}
    assert {key: tokenizer.id_to_token(getattr(thinker, key)) for key in ids} == ids
    assert tokenizer.get_vocab_size() <= thinker.vocab_size
    assert tokenizer.token_to_id("<image>") == thinker.image_patch_token + 1
    text = "What do you hear?<audio><audioPatch></audio>\n图片 2025 ½ é"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text.replace("e\u0301", "é")
    assert tokenizer.encode("2025").tokens == list("2025")
    saved = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer.token_to_id(saved["eos_token"]) == thinker.eos_token_id
    for token, content in saved["added_tokens_decoder"].items():
        assert tokenizer.id_to_token(int(token)) == content["content"]


def test_same_bytes_again(made, tmp_path):
    generation, directory = made
    again = make_checkpoint(tmp_path / "again", generation)
    for path in directory.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    if generation == "flash":
        other = make_checkpoint(tmp_path / "other", generation, seed=1)
        shard = "model-00001-of-00004.safetensors"
        assert (other / shard).read_bytes() != (again / shard).read_bytes()


def test_runs_alike_in_both_dtypes(made):
    """Activations of order one, and the bfloat16 run near the float32 run."""
    _, directory = made
    config, checkpoint = OmniConfig.from_dir(directory), Checkpoint(directory)
    ids = np.random.default_rng(0).integers(0, 768, 96)
    positions = np.tile(np.arange(96), (3, 1))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(lambda src: Omni(config, src), checkpoint, dtype)
        runner = Runner(model.thinker, [Prompt(ids, positions)], dtype=dtype)
        logits[dtype] = runner.prefill(all_logits=True).logits
        assert 0.1 < runner.taps["hidden.1"].float().std() < 10.0
    exact, rounded = logits[torch.float32], logits[torch.bfloat16]
    assert (exact - rounded).norm() / exact.norm() < TABLE["model_relative", torch.bfloat16].rtol
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.9


def test_cmvn_is_a_kaldi_network(tmp_path):
    lines = (make_checkpoint(tmp_path / "v1", "v1") / "am.mvn").read_text().splitlines()
    for tag in ("<AddShift>", "<Rescale>"):
        row = lines[next(i for i, line in enumerate(lines) if line.startswith(tag)) + 1].split()
        assert row[:3] == ["<LearnRateCoef>", "0", "["]
        values = np.array(row[3:-1], dtype=float)
        assert values.shape == (560,)
        assert np.array_equal(values[:80], values[80:160])


def test_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "v1.5"
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: make_checkpoint(target), range(3))) == {target}
    assert [path.name for path in tmp_path.iterdir()] == ["v1.5"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        make_checkpoint(taken)
    assert [path.name for path in taken.iterdir()] == ["note.txt"]
    with pytest.raises(ValueError, match="expected"):
        make_checkpoint(tmp_path / "v3", "v3")  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "v1.5"]


def test_default_checkpoint_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = default_checkpoint("v1.5")
    assert first.is_relative_to(tmp_path / "ming_rt")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert default_checkpoint("v1.5") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp


def test_config_dict_limits_layers():
    assert config_dict("v1.5", "real", num_layers=4)["llm_config"]["num_hidden_layers"] == 4
    assert config_dict("v1.5", "real")["llm_config"]["num_hidden_layers"] == 28
    with pytest.raises(ValueError, match="expected"):
        config_dict("v1.5", "huge")  # type: ignore[arg-type]


def test_media(tmp_path):
    media = demo_media(tmp_path)
    with Image.open(media.image) as image:
        assert image.size == (448, 336)
    wave, rate = soundfile.read(media.audio)
    assert (wave.shape, rate) == ((48000,), 16000)
    assert 0.02 < np.sqrt((wave**2).mean()) < 0.5
    with av.open(str(media.video)) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert len(frames) == 12
    assert frames[0].shape == (240, 320, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1.0
    stamp = os.stat(media.video).st_mtime_ns
    assert demo_media(tmp_path) == media
    assert os.stat(media.video).st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "picture.png", "sound.wav"]


def test_asking_for_a_config_imports_no_media_library():
    code = "import sys; from ming_rt.demo import config_dict; config_dict('v1'); print('av' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"
