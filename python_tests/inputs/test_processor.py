"""Processor: media of all kinds against the ids that announce them, unsupported combinations, caps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tokenizer import write_tokenizer as write_byte_level

from ming_rt.config import GENERATIONS, OmniConfig
from ming_rt.demo.configs import config_dict, preprocessor_dict
from ming_rt.demo.tokenizer import write_tokenizer
from ming_rt.errors import (
    ConfigError,
    InvalidMediaError,
    InvalidRequestError,
    TokenizerError,
    UnsupportedError,
)
from ming_rt.inputs.limits import Limits
from ming_rt.inputs.processor import Processor
from ming_rt.inputs.tokenizer import Tokenizer
from ming_rt.models.omni import Omni
from ming_rt.runtime.weights import RandomSource


def write_cmvn(directory):
    rows = [f"{name} 560 560\n<LearnRateCoef> 0 [ {'0.5 ' * 560}]\n" for name in ("<AddShift>", "<Rescale>")]
    (directory / "am.mvn").write_text(f"<Nnet>\n{''.join(rows)}</Nnet>\n")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Processors of the demo models; keyword arguments go to Processor."""
    made = {}

    def make(generation, **options) -> Processor:
        if generation not in made:
            directory = tmp_path_factory.mktemp("checkpoint")
            write_tokenizer(directory, generation)
            write_cmvn(directory)
            config = OmniConfig.from_dict(config_dict(generation), preprocessor_dict(generation))
            made[generation] = config, Tokenizer.from_dir(directory, config.thinker.vocab_size), directory
        return Processor(*made[generation], **options)

    return make


def picture(height=60, width=90):
    return {"type": "image", "image": np.full((height, width, 3), 77, np.uint8)}


def recording(seconds=0.5, sample_rate=16000):
    wave = np.sin(np.arange(int(seconds * sample_rate)) * 0.1).astype(np.float32)
    return {"type": "audio", "audio": (wave, sample_rate)}


def clip(frames=4):
    return {
        "type": "video",
        "video": [np.full((64, 64, 3), 9 * i, np.uint8) for i in range(frames)],
        **SAMPLE,
    }


SAMPLE = {"sample": "uniform", "max_frames": 4}


def ask(*content):
    items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    return [{"role": "user", "content": items}]


def ids_of(processor, prompt, token):
    return np.flatnonzero(prompt.input_ids == processor.tokenizer.token_id(token))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_text_only(make, generation):
    processor = make(generation)
    prompt = processor([{"role": "user", "content": "hello"}])
    assert prompt.input_ids.dtype == np.int64
    assert processor.tokenizer.decode(prompt.input_ids, skip_special=False) == prompt.text
    assert prompt.pixel_values is prompt.pixel_values_videos is prompt.audio_spans is None
    assert prompt.audio_encoder is None
    assert prompt.audio_feats == ()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_images(make, generation):
    processor = make(generation)
    prompt = processor(ask(picture(), "and", picture(100, 300), "?"))
    grids = prompt.image_grid_thw
    assert grids.shape == (2, 3)
    assert grids.dtype == np.int64
    assert prompt.pixel_values.shape == (grids.prod(1).sum(), 1176)
    assert prompt.pixel_values.dtype == np.float32
    assert len(ids_of(processor, prompt, "<imagePatch>")) == grids.prod(1).sum() // 4
    alone = [processor(ask(item)).pixel_values for item in (picture(), picture(100, 300))]
    assert np.array_equal(prompt.pixel_values, np.concatenate(alone))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_video(make, generation, tmp_path):
    processor = make(generation)
    item = clip()
    if generation != "preview":  # a frame list is a directory of pictures for the others
        item = {**item, "video": frame_directory(tmp_path, item["video"])}
    prompt = processor(ask(item, "?"))
    (grid,) = prompt.video_grid_thw
    assert prompt.pixel_values_videos.shape == (grid.prod(), 1176)
    token = "<framePatch>" if generation == "flash" else "<imagePatch>"
    assert len(ids_of(processor, prompt, token)) == grid.prod() // 4
    assert prompt.pixel_values is None


def frame_directory(directory, frames):
    from PIL import Image

    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(directory / f"{number}.png")
    return str(directory)


@pytest.mark.parametrize(
    ("generation", "option", "encoder", "width"),
    [
        ("preview", None, "sanm", 560),
        ("v1", None, "sanm", 560),
        ("v1", False, "sanm", 560),
        ("v1", True, "whisper", 128),
        ("v1.5", None, "whisper", 128),
        ("v1.5", True, "whisper", 128),
        ("flash", None, "whisper", 128),
    ],
)
def test_audio(make, generation, option, encoder, width):
    processor = make(generation)
    prompt = processor(ask("hear", recording(1.3)), use_whisper_encoder=option)
    (feats,) = prompt.audio_feats
    assert prompt.audio_encoder == encoder
    assert feats.shape[1] == width
    assert feats.dtype == np.float32
    ((start, length),) = prompt.audio_spans
    assert np.array_equal(ids_of(processor, prompt, "<audioPatch>"), np.arange(start, start + length))
    assert prompt.input_ids[start - 1] == processor.tokenizer.token_id("<audio>")
    assert prompt.input_ids[start + length] == processor.tokenizer.token_id("</audio>")


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_placeholders_follow_the_configured_projector(make, generation, kernel, stride):
    config = config_dict(generation)
    config["audio_config"] |= {"ds_kernel_size": kernel, "ds_stride": stride}
    processor = make(generation)
    processor.config = OmniConfig.from_dict(config, preprocessor_dict(generation))
    prompt = processor([{"role": "user", "content": [recording(2.05)]}])
    model = Omni(processor.config, RandomSource(dtype=torch.float32))
    assert len(model.encode(prompt).feats) == prompt.audio_spans[0, 1]


def test_flash_takes_everything_at_once(make, tmp_path):
    processor = make("flash")
    video = {**clip(), "video": frame_directory(tmp_path, clip()["video"])}
    turns = ask(recording(0.4), picture(), video, "a <audio> b")
    turns += [{"role": "assistant", "content": "c"}, *ask(picture(80, 80), recording(0.9, 8000))]
    prompt = processor(turns)
    assert len(prompt.image_grid_thw) == 2
    assert len(prompt.video_grid_thw) == 1
    assert [len(feat) for feat in prompt.audio_feats] == [40, 90]
    assert prompt.audio_spans[:, 1].tolist() == [10, 23]
    patches = np.concatenate([np.arange(s, s + n) for s, n in prompt.audio_spans])
    assert np.array_equal(ids_of(processor, prompt, "<audioPatch>"), patches)


def test_answer_prefix(make):
    processor = make("flash")
    plain, forced = (processor(ask("x"), answer_prefix=prefix) for prefix in ("", "Chinese\t<role>"))
    tail = forced.input_ids[len(plain.input_ids) :]
    assert np.array_equal(forced.input_ids[: len(plain.input_ids)], plain.input_ids)
    assert processor.tokenizer.decode(tail) == "Chinese\t<role>"
    assert processor.tokenizer.token_id("<role>") not in tail
    assert forced.text == plain.text


@pytest.mark.parametrize("generation", GENERATIONS)
def test_image_generation_inputs(make, generation):
    processor = make(generation)
    assert processor(ask(picture())).image_gen is None
    made = processor(ask(picture(60, 90), 'write "hi"'), image_gen=True).image_gen
    if generation in ("preview", "v1"):
        assert made is None
        return
    assert made.reference.shape == (1, 3, made.height, made.width)
    assert (made.height, made.width) == (416, 608)
    assert made.text == ('Text "hi". ' if generation == "flash" else "")
    if generation == "flash":
        wide = processor(ask("x"), image_gen=True, aspect_ratio=1.5).image_gen
        assert (wide.height, wide.width, wide.reference) == (512, 768, None)
        with pytest.raises(InvalidRequestError, match="aspect_ratio"):
            processor(ask("x"), image_gen=True, aspect_ratio=0.0)
    else:
        with pytest.raises(UnsupportedError, match="aspect_ratio"):
            processor(ask("x"), image_gen=True, aspect_ratio=1.5)


@pytest.mark.parametrize("generation", ["preview", "v1", "v1.5"])
def test_combinations_lite_cannot_serve(make, generation):
    processor = make(generation)
    with pytest.raises(UnsupportedError, match="not both"):
        processor(ask(picture(), clip()))
    with pytest.raises(UnsupportedError, match="one recording"):
        processor(ask(recording(), "x", recording()))
    with pytest.raises(UnsupportedError, match="one recording"):
        processor([*ask(recording()), {"role": "assistant", "content": "x"}, *ask(recording())])


@pytest.mark.parametrize(("generation", "option"), [("preview", True), ("v1.5", False), ("flash", False)])
def test_fixed_audio_encoder(make, generation, option):
    with pytest.raises(UnsupportedError, match="use_whisper_encoder"):
        make(generation)(ask(recording()), use_whisper_encoder=option)


def test_checkpoint_without_an_encoder(make):
    processor = make("v1.5")
    config = dataclasses.replace(processor.config, vision=None, audio={})
    blind = Processor(config, processor.tokenizer)
    assert len(blind(ask("x")).input_ids)
    for item in (picture(), clip()):
        with pytest.raises(UnsupportedError, match="vision"):
            blind(ask(item))
    with pytest.raises(UnsupportedError, match="whisper"):
        blind(ask(recording()))


CAPS = [
    ({"max_messages": 2}, [{"role": "user", "content": "x"}] * 3, {}, "messages"),
    ({"max_text_chars": 10}, ask("123456", "78901"), {}, "11 characters"),
    ({"max_text_chars": 10}, ask("123456"), {"answer_prefix": "12345"}, "11 characters"),
    ({"max_text_chars": 10}, ask("123456"), {"system_template": "12345"}, "11 characters"),
    (
        {"max_media": 2},
        ask(picture(), {"type": "image", "image": [picture()["image"]] * 2}),
        {},
        "3 media items",
    ),
    ({"max_image_pixels": 99}, ask(picture(10, 10)), {}, "pixels"),
    ({"max_audio_seconds": 0.4}, ask(recording(0.5)), {}, "0.4"),
]


@pytest.mark.parametrize(("caps", "messages", "options", "match"), CAPS)
def test_caps(make, caps, messages, options, match):
    make("v1.5")(messages, **{k: v[:4] for k, v in options.items()})
    with pytest.raises(InvalidRequestError, match=match):
        make("v1.5", limits=Limits(**caps))(messages, **options)


def test_recording_longer_than_the_encoder(make):
    seconds = make("v1.5").config.audio["whisper"].n_ctx / 50
    limits = Limits(max_audio_seconds=2 * seconds)
    with pytest.raises(InvalidMediaError, match=f"{seconds:.1f} s"):
        make("v1.5", limits=limits)(ask(recording(seconds + 1)))


@pytest.mark.parametrize("value", [0, -1, True, "8", None, float("nan")])
def test_limits_are_positive_numbers(value):
    with pytest.raises(ValueError, match="max_media"):
        Limits(max_media=value)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": b"no picture"},
        {"type": "image", "image": 7},
        {"type": "image", "image": "/nowhere/x.png"},
        {"type": "audio", "audio": b"no sound"},
        {"type": "audio", "audio": 7},
        {"type": "video", "video": "/nowhere/x.mp4", "sample": "uniform"},
    ],
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_unusable_media(make, generation, item):
    with pytest.raises(InvalidRequestError):
        make(generation)(ask(item))


def test_tokenizer_has_to_fit(make, tmp_path):
    config = make("v1.5").config
    with pytest.raises(TokenizerError, match="imagePatch"):
        Processor(config, Tokenizer.from_dir(write_byte_level(tmp_path)))
    write_byte_level(tmp_path, added_tokens=[])
    text_only = SimpleNamespace(generation="v1.5", vision=None, audio={}, thinker=config.thinker)
    with pytest.raises(TokenizerError, match="<audio>"):
        Processor(text_only, Tokenizer.from_dir(tmp_path))


def test_wrong_options(make):
    processor = make("flash")
    for options, match in (
        ({"answer_prefix": None}, "answer_prefix"),
        ({"aspect_ratio": 1.0}, "image_gen"),
        ({"highres": True}, "image_gen"),
        ({"sys_prompt_exp": 3}, "sys_prompt_exp"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            processor(ask("x"), **options)


def test_missing_normalisation_file(make, tmp_path):
    processor = make("preview")
    with pytest.raises(ConfigError, match=r"am\.mvn"):
        Processor(processor.config, processor.tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"am\.mvn"):
        Processor(processor.config, processor.tokenizer)
