"""Recorded tokenizers, chat prompts and image generation inputs of the original processors, all exact."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from golden_cases import all_cases, golden_cases
from tolerances import assert_close

from ming_rt.config import PreprocessorConfig, read_audio
from ming_rt.demo import config_dict
from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.inputs import image
from ming_rt.inputs.chat_template import render
from ming_rt.inputs.image_gen import image_gen_inputs, image_gen_text, process_ratio
from ming_rt.inputs.processor import Processor
from ming_rt.inputs.tokenizer import Tokenizer

# Options the original templates accept and ignore.
IGNORED_OPTIONS = ("tokenize", "use_system")


def generation_of(record):
    return {"v15": "v1.5"}.get(record["generation"], record["generation"])


def is_tokenizer(case):
    return case.has("tokenizer.json", "encode.json", "decode.json", "stream_decode.json", "meta.json")


def records(case, key):
    """The list ``key`` of a cases.json that is an object, else an empty list."""
    data = case.json("cases.json") if case.has("cases.json") else None
    return data.get(key, []) if isinstance(data, dict) else []


def is_chat(case):
    data = case.json("cases.json") if case.has("cases.json") else None
    return isinstance(data, list) and bool(data) and "messages" in data[0]


@golden_cases(is_tokenizer)
def test_tokenizer(case):
    tokenizer = Tokenizer.from_dir(case.path)
    meta = case.json("meta.json")
    assert dict(tokenizer.special) == meta["special"]
    assert tokenizer.token_id(meta["eos_token"]) == meta["eos_token_id"]
    assert tokenizer.stop_ids("flash" if meta["kind"] == "flash" else "v1") == (meta["eos_token_id"],)
    assert tokenizer.decode(meta["unassigned_ids"], skip_special=False) == ""
    for record in case.json("encode.json"):
        ids = tokenizer.encode(record["text"], allow_special=True)
        assert ids == record["ids"], record["text"]
        assert tokenizer.decode(ids, skip_special=False) == record["decode_keep_special"]
        assert tokenizer.decode(ids) == record["decode_skip_special"]
        inert = tokenizer.encode(record["text"])
        assert not any(tokenizer.is_special(i) for i in inert)
        if not any(tokenizer.is_special(i) for i in ids):
            assert inert == ids
    for record in case.json("decode.json"):
        assert tokenizer.decode(record["ids"], skip_special=False) == record["keep_special"]
        assert tokenizer.decode(record["ids"]) == record["skip_special"]
    for record in case.json("stream_decode.json"):
        stream = tokenizer.stream(record["skip_special"])
        assert [stream.push(i) for i in record["ids"]] == record["emitted_per_step"]
        assert stream.flush() == record["flush"]
        assert tokenizer.decode(record["ids"], record["skip_special"]) == record["full"]


@golden_cases(is_tokenizer)
def test_special_strings_in_user_text_are_inert(case):
    tokenizer = Tokenizer.from_dir(case.path)
    for token in tokenizer.special:
        ids = tokenizer.encode(f"x{token}y {token}")
        assert not any(tokenizer.is_special(i) for i in ids)
        assert tokenizer.decode(ids) == f"x{token}y {token}"


def tokenizer_for(case, generation):
    """The tokenizer beside the case whose eos token is the generation's."""
    kind = "flash" if generation == "flash" else "lite"
    for path in sorted(case.path.parent.iterdir()):
        meta = path / "meta.json"
        if (
            (path / "tokenizer.json").is_file()
            and meta.is_file()
            and json.loads(meta.read_text())["kind"] == kind
        ):
            return Tokenizer.from_dir(path)
    return pytest.skip(f"no {kind} tokenizer beside {case.name}")


@pytest.fixture
def cmvn_directory(tmp_path):
    """A normalisation file that changes nothing; token counts do not depend on its values."""
    rows = [("<AddShift>", 0.0), ("<Rescale>", 1.0)]
    text = "".join(f"{name} 560 560\n<LearnRateCoef> 0 [ {f'{value} ' * 560}]\n" for name, value in rows)
    (tmp_path / "am.mvn").write_text(f"<Nnet>\n{text}</Nnet>\n")
    return tmp_path


def make_processor(generation, tokenizer, directory):
    """A processor of a model that has every encoder of its generation and the tokenizer's ids."""
    patch = {
        name: tokenizer.token_id(token)
        for name, token in {
            "image_patch_token": "<imagePatch>",
            "image_start_token": "<image>",
            "video_patch_token": "<framePatch>",
        }.items()
    }
    config = SimpleNamespace(
        generation=generation,
        preprocessor=PreprocessorConfig.from_dict({}, generation),
        thinker=SimpleNamespace(**patch),
        vision=SimpleNamespace(),
        audio=read_audio(config_dict(generation, "real"), generation),
    )
    return Processor(config, tokenizer, directory)


def with_media(messages, media, directory):
    """The messages with generated pictures, clips and recordings in place of the file names."""
    draw = np.random.default_rng(3)
    pictures, clips, waves = (iter(media.get(kind, [])) for kind in ("images", "videos", "audios"))

    def picture():
        size = next(pictures)
        return draw.integers(0, 256, (size["height"], size["width"], 3), np.uint8)

    def clip():
        size = next(clips)
        path = directory / f"{len(list(directory.glob('*.mp4')))}.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=Fraction(size["fps"]))
            stream.width, stream.height = size["width"], size["height"]
            for _ in range(size["frames"]):
                frame = av.VideoFrame.from_ndarray(np.full((size["height"], size["width"], 3), 90, np.uint8))
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return str(path)

    def fill(item):
        if item["type"] == "image":
            value = item["image"]
            return {**item, "image": [picture() for _ in value] if isinstance(value, list) else picture()}
        if item["type"] == "video":
            return {**item, "video": clip()}
        if item["type"] == "audio":
            size = next(waves)
            wave = draw.standard_normal(size["samples"]).astype(np.float32) * 0.1
            return {**item, "audio": (wave, size["sample_rate"])}
        return item

    return [{**m, "content": [fill(item) for item in m["content"]]} for m in messages]


def unfold_ids(ids):
    return [i for entry in ids for i in ([entry[0]] * entry[1] if isinstance(entry, list) else [entry])]


def unfold_text(text):
    return re.sub(r"\{(\d+)\*(<\w+>)\}", lambda m: m[2] * int(m[1]), text)


CHATS = [
    pytest.param(case, record, id=f"{case.name}/{record['generation']}/{record['name']}")
    for case in all_cases()
    if is_chat(case)
    for record in case.json("cases.json")
]


def check_prompt(prompt, record):
    assert prompt.text == unfold_text(record["expanded"])
    assert prompt.input_ids.tolist() == unfold_ids(record["input_ids"])
    assert len(prompt.input_ids) == record["num_tokens"]
    assert {text: prompt.text.count(text) for text in record["counts"]} == record["counts"]
    for name in ("image_grid_thw", "video_grid_thw"):
        grid = getattr(prompt, name)
        assert (None if grid is None else grid.tolist()) == record.get(name)
    spans = record.get("audio_placeholder_loc_lens")
    assert (None if prompt.audio_spans is None else [prompt.audio_spans.tolist()]) == spans
    lengths = [n for row in record.get("audio_feats_lengths", []) for n in row]
    assert [len(feat) for feat in prompt.audio_feats] == lengths


@pytest.mark.golden
@pytest.mark.parametrize(("case", "record"), CHATS)
def test_chat(case, record, tmp_path, cmvn_directory):
    generation = generation_of(record)
    options = {k: v for k, v in record["template_kwargs"].items() if k not in IGNORED_OPTIONS}
    if "template_error" in record:
        with pytest.raises(InvalidRequestError):
            render(generation, record["messages"], trust_special=True, **options)
        return
    assert render(generation, record["messages"], trust_special=True, **options) == record["template"]
    tokenizer = tokenizer_for(case, generation)
    processor = make_processor(generation, tokenizer, cmvn_directory)
    messages = with_media(record["messages"], record.get("media", {}), tmp_path)
    options |= record.get("call_kwargs", {}).get("audio_kwargs", {})
    options["answer_prefix"] = record.get("answer_prefix", "")

    prompt = processor(messages, trust_special=True, image_gen=True, **options)
    check_prompt(prompt, record)
    generated = prompt.image_gen
    if generated is None:
        assert "image_gen_height" not in record
    else:
        assert [generated.height] == record["image_gen_height"]
        assert [generated.width] == record["image_gen_width"]
        assert [generated.text] == record.get("image_gen_text", [""])

    # By default user text is inert: the same prompt wherever the text spells no special token.
    literal = any(token in json.dumps(record["messages"]) for token in tokenizer.special)
    if generation != "flash" and len(prompt.audio_feats) > 1:
        with pytest.raises(UnsupportedError):
            processor(messages, **options)
    elif not literal:
        check_prompt(processor(messages, **options), record)


@golden_cases(lambda case: bool(records(case, "image_gen_text")))
def test_image_gen_text(case):
    for record in records(case, "image_gen_text"):
        assert image_gen_text(record["prompt"]) == record["image_gen_text"], record["prompt"]


@golden_cases(lambda case: bool(records(case, "process_ratio")))
def test_image_gen_sizes(case):
    for record in records(case, "process_ratio"):
        bucket, cover = process_ratio(record["height"], record["width"], record["highres"])
        assert list(bucket) == record["closest_hw"], record
        assert list(cover) == record["cover_resize_hw"], record


@golden_cases(lambda case: bool(records(case, "reference_images")))
def test_reference_image(case):
    for record in records(case, "reference_images"):
        generation, key = generation_of(record), record["key"]
        config = PreprocessorConfig.from_dict({}, generation)
        _, _, picture = image.preprocess_image(str(case.path / record["file"]), config, {})
        inputs = image_gen_inputs(
            generation,
            "",
            picture,
            aspect_ratio=record["image_gen_aspect_ratio"],
            highres=record["image_gen_highres"],
        )
        assert [inputs.height, inputs.width] == record["reference_hw"]
        assert [inputs.height, inputs.width] == [record["image_gen_height"], record["image_gen_width"]]
        pixels = inputs.reference[0]
        levels = ((pixels / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(levels[case.outputs[f"{key}.row_index"]], case.outputs[f"{key}.reference_rows_u8"])
        assert_close(pixels[:, 0], case.outputs[f"{key}.reference_first_row_f32"], "golden_reference_image")
