"""The whole model: built from the config alone, prompts through plan, encode and thinker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from thinker_harness import Prompt as Sequence
from thinker_harness import Runner

from ming_rt.config import GENERATIONS, OmniConfig
from ming_rt.demo import config_dict, preprocessor_dict
from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.inputs.processor import Prompt
from ming_rt.models.fusion import AUDIO, IMAGE
from ming_rt.models.omni import Omni
from ming_rt.runtime.weights import PlanSource, RandomSource

generations = pytest.mark.parametrize("generation", GENERATIONS)

# Parameters of the shipped thinkers in millions.
PUBLISHED = {"preview": 16_809, "v1": 16_809, "v1.5": 16_809, "flash": 102_955}
WIDTH = {"sanm": 560, "whisper": 128}


def omni_config(generation: str, size: str = "tiny") -> OmniConfig:
    return OmniConfig.from_dict(config_dict(generation, size), preprocessor_dict(generation))


def media_prompt(config: OmniConfig, encoder: str, seed: int = 0) -> Prompt:
    """Words, a picture of 4 x 6 patches, words, a recording, words."""
    rng = np.random.default_rng(seed)
    thinker = config.thinker
    frames, tokens = (9 if encoder == "sanm" else 33), 9  # mel frames are halved twice
    start = thinker.image_start_token or 1
    before = [5, start, *[thinker.image_patch_token] * 6, 6, 7]
    ids = np.array([*before, *[8] * tokens, 9, 10])
    return Prompt(
        input_ids=ids,
        text="",
        pixel_values=rng.standard_normal((24, 1176), dtype=np.float32),
        image_grid_thw=np.array([[1, 4, 6]]),
        audio_feats=(rng.standard_normal((frames, WIDTH[encoder]), dtype=np.float32),),
        audio_encoder=encoder,
        audio_spans=np.array([[len(before), tokens]]),
    )


@generations
def test_every_part_answers_a_prompt(generation):
    """Encoded rows land on their placeholders, are routed as what they are, and change the answer."""
    config = omni_config(generation)
    model = Omni(config, RandomSource(0, torch.float32))
    assert model.vision is not None
    assert sorted(model.audio) == {"preview": ["sanm"], "v1": ["sanm", "whisper"]}.get(
        generation, ["whisper"]
    )
    for encoder in model.audio:
        prompt = media_prompt(config, encoder)
        plan, media = model.plan(prompt), model.encode(prompt)
        assert np.flatnonzero(plan.modality == IMAGE).tolist() == list(range(2, 8))
        assert np.flatnonzero(plan.modality == AUDIO).tolist() == list(range(10, 19))
        assert media.rows.tolist() == [*range(2, 8), *range(10, 19)]
        assert plan.positions.shape == (3, len(prompt.input_ids))
        assert plan.positions.dtype == np.int32

        def logits(media, prompt=prompt, plan=plan):
            sequence = Sequence(prompt.input_ids, plan.positions, plan.delta, plan.modality, media)
            return Runner(model.thinker, [sequence]).prefill().logits

        assert torch.isfinite(logits(media)).all()
        other = model.encode(media_prompt(config, encoder, seed=1))
        assert not torch.equal(logits(media), logits(other))


def test_media_the_checkpoint_cannot_take():
    config = omni_config("v1.5")
    model = Omni(replace(config, vision=None, audio={}), RandomSource(0, torch.float32))
    prompt = media_prompt(config, "whisper")
    with pytest.raises(UnsupportedError, match="no vision tower"):
        model.encode(prompt)
    with pytest.raises(UnsupportedError, match="no whisper audio encoder, found none"):
        model.encode(replace(prompt, pixel_values=None, image_grid_thw=None))
    text = Prompt(np.arange(5), "")
    assert model.encode(text) is None
    assert model.plan(text).modality.tolist() == [0] * 5


def test_prompt_that_contradicts_its_media():
    config = omni_config("v1.5")
    model = Omni(config, RandomSource(0, torch.float32))
    prompt = media_prompt(config, "whisper")
    short = replace(prompt, input_ids=np.delete(prompt.input_ids, 3), audio_feats=(), audio_spans=None)
    with pytest.raises(InvalidRequestError, match="found 5 tokens in the prompt, expected 6"):
        model.encode(short)
    with pytest.raises(InvalidRequestError, match="needs 6 placeholder tokens"):
        model.plan(replace(short, input_ids=prompt.input_ids[:5]))


def test_memo_sees_each_picture_and_all_recordings():
    config = omni_config("v1.5")
    model = Omni(config, RandomSource(0, torch.float32))
    one = media_prompt(config, "whisper")
    before = one.input_ids[:10]
    prompt = replace(
        one,
        input_ids=np.concatenate([before, one.input_ids]),
        pixel_values=np.concatenate([one.pixel_values, one.pixel_values]),
        image_grid_thw=np.repeat(one.image_grid_thw, 2, axis=0),
        audio_spans=one.audio_spans + np.array([len(before), 0]),
    )
    contents = []

    def memo(items, encode):
        contents.append([item[0] for item in items])
        return encode([0]) * len(items)  # the two pictures are the same

    remembered, computed = model.encode(prompt, memo), model.encode(prompt)
    assert contents == [["vision", "vision"], ["whisper"]]
    assert torch.equal(remembered.feats, computed.feats)


@generations
def test_planned_size_is_the_published_one(generation):
    """At the shipped dimensions, from the config alone, without memory."""
    plan = PlanSource()
    Omni(omni_config(generation, "real"), plan)
    totals: dict[str, int] = {}
    for name, shape in plan.shapes.items():
        part = name.split(".")[0]
        totals[part] = totals.get(part, 0) + int(np.prod(shape))
    assert round(totals["model"] / 1e6) == PUBLISHED[generation]
    assert round(totals["vision"] / 1e6, 1) == 704.6
    assert round(totals["linear_proj"] / 1e6, 1) == (50.3 if generation == "flash" else 21.0)
    if generation != "flash":
        assert sum(name.startswith("model.") for name in plan.shapes) == 5659


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_hold_whole_encoders_and_shares_of_the_thinker(world):
    config = omni_config("v1.5", "real")
    whole, part = PlanSource(), PlanSource(rank=1, world=world)
    Omni(config, whole)
    model = Omni(config, part)
    assert part.shapes == whole.shapes
    assert model.vision.tower.blocks[0].qkv.weight.n == 3 * config.vision.hidden_size
    assert model.thinker.head.n == config.thinker.vocab_size // world
    assert model.thinker.layers[0].attention.qkv.kv_heads == config.thinker.num_key_value_heads // world
