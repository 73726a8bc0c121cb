"""Recorded media front-ends through the public functions: pictures, videos, frame selection, recordings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from golden_cases import GoldenCase, golden_cases
from tolerances import FRAME_LEVELS, FRAME_SHARE, TABLE, assert_close

from ming_rt import ops
from ming_rt.config import PreprocessorConfig
from ming_rt.errors import InvalidMediaError
from ming_rt.inputs import audio, image, video
from ming_rt.ops.spectral import mel_filters

GENERATIONS = {"v15": "v1.5"}


def records(case: GoldenCase, *keys: str) -> bool:
    """Whether cases.json is a list of records with these keys."""
    if not case.has("cases.json"):
        return False
    found = case.json("cases.json")
    return isinstance(found, list) and bool(found) and all(key in found[0] for key in keys)


def generation(record: dict) -> str:
    return GENERATIONS.get(record["generation"], record["generation"])


def config(record: dict) -> PreprocessorConfig:
    return dataclasses.replace(PreprocessorConfig(), **record["processor_config"])


def expected_rows(outputs: dict, key: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The recorded rows (all or a sample of them) and ours at the same places."""
    actual = torch.from_numpy(rows)
    for name in ("pixel_values", "pixel_values_videos"):
        if f"{key}.{name}" in outputs:
            return actual, outputs[f"{key}.{name}"]
    return actual[outputs[f"{key}.pixel_row_index"]], outputs[f"{key}.pixel_rows"]


@golden_cases(lambda case: records(case, "file", "fetched_size_hw", "image_grid_thw"))
def test_pictures(case):
    for record in case.json("cases.json"):
        key = record["key"]
        rows, grid, fetched = image.preprocess_image(
            str(case.path / record["file"]), config(record), record["element_options"]
        )
        assert list(grid) == record["image_grid_thw"], key
        assert len(rows) == record["num_patches"], key
        assert torch.equal(torch.from_numpy(fetched), case.outputs[f"{key}.fetched_rgb"]), key
        if f"{key}.processor_rgb" in case.outputs:
            resized = ops.resize_u8(torch.from_numpy(fetched), *record["processor_size_hw"])
            assert torch.equal(resized, case.outputs[f"{key}.processor_rgb"]), key
        assert_close(*expected_rows(case.outputs, key, rows), "golden_pixels")


@golden_cases(lambda case: case.has("smart_resize.json"))
def test_size_rules(case):
    rules = {"fetch": image.fetch_size, "processor": image.processor_size}
    for record in case.json("smart_resize.json"):
        assert record["factor"] == image.FACTOR
        arguments = [record[name] for name in ("height", "width", "min_pixels", "max_pixels")]
        if record["error"]:
            with pytest.raises(InvalidMediaError):
                rules[record["rule"]](*arguments)
        else:
            assert list(rules[record["rule"]](*arguments)) == record["result_hw"], record


@golden_cases(lambda case: records(case, "decord", "torchvision", "total_frames"))
def test_frame_selection(case):
    for record in case.json("cases.json"):
        name = generation(record)
        total, fps, element = record["total_frames"], record["fps"], record["element"]
        for one in ("v1", "v1.5") if name == "v1.5" else (name,):
            for reader in ("decord", "torchvision"):
                check_selection(record[reader], one, total, fps, element, reader)
            fallback = record["torchvision" if "error" in record["decord"] else "decord"]
            check_selection(fallback, one, total, fps, element, None)


def check_selection(expected: dict, name: str, total: int, fps: float, element: dict, reader: str | None):
    if "error" in expected:
        with pytest.raises(InvalidMediaError):
            video.sample_frames(name, total, fps, element, reader)
        return
    indices, sample_fps = video.sample_frames(name, total, fps, element, reader)
    assert indices.tolist() == expected["indices"]
    assert sample_fps == pytest.approx(expected["sample_fps"], rel=1e-9)


def channels_last(frames: torch.Tensor) -> torch.Tensor:
    return frames if frames.shape[-1] == 3 else frames.permute(0, 2, 3, 1)


@golden_cases(lambda case: records(case, "element_options", "video_grid_thw"))
def test_videos(case):
    for record in case.json("cases.json"):
        key, name, outputs = record["key"], generation(record), case.outputs
        if "frames_dir" in record:
            source = str(case.path / record["frames_dir"])
        else:
            source = (case.inputs[f"{key}.frames"], record["fps"])
        options, reader = record["element_options"], record.get("reader")
        clip = video.fetch_video(source, name, options, reader=reader)
        rows, grid = video.preprocess_video(source, name, config(record), options, reader=reader)
        assert list(grid) == record["video_grid_thw"], key
        if "sample_fps" in record:
            assert clip.indices.tolist() == record["frame_indices"], key
            assert clip.sample_fps == pytest.approx(record["sample_fps"], rel=1e-9)

        frames = clip.frames
        if f"{key}.resized_frames" in outputs:
            expected = channels_last(outputs[f"{key}.resized_frames"])
        else:
            frames, expected = frames[:1], channels_last(outputs[f"{key}.resized_frame0"][None])
        if expected.is_floating_point():
            assert_close(frames, expected, "golden_frames")
        else:
            difference = (frames.int() - expected.int()).abs()
            assert difference.max() <= FRAME_LEVELS, key
            assert (difference > 0).float().mean() <= FRAME_SHARE, key

        actual, expected = expected_rows(outputs, key, rows)
        atol = TABLE["golden_pixels", torch.float32].atol
        difference = (actual - expected).abs()
        assert difference.max() <= FRAME_LEVELS / 255 / min(config(record).image_std) + atol, key
        assert (difference > atol).float().mean() <= FRAME_SHARE, key


def recording(case: GoldenCase, record: dict):
    if "file" in record:
        return str(case.path / record["file"])
    return case.inputs[f"{record['key']}.waveform"], record["sample_rate"]


@golden_cases(lambda case: records(case, "sample_rate", "mel_frames"))
def test_recordings(case):
    for record in case.json("cases.json"):
        key, outputs = record["key"], case.outputs
        wave = audio.load_audio(recording(case, record))
        assert len(wave) == record["samples_16k"], key
        if f"{key}.wave16k" in outputs:
            assert_close(torch.from_numpy(wave), outputs[f"{key}.wave16k"], "golden_wave16k")
        mel = audio.log_mel_features(wave)
        assert_close(torch.from_numpy(mel), outputs[f"{key}.mel"], "golden_mel")
        assert len(mel) == record["mel_frames"], key
        assert audio.whisper_tokens(len(mel)) == record["whisper_tokens"], key
        if f"{key}.fbank" not in outputs:
            with pytest.raises(InvalidMediaError, match="at least 400"):
                audio.fbank_features(wave, case.inputs["cmvn"].numpy())
            continue
        assert_close(ops.fbank(torch.from_numpy(wave)), outputs[f"{key}.fbank"], "golden_fbank")
        features = audio.fbank_features(wave, case.inputs["cmvn"].numpy())
        assert_close(torch.from_numpy(features), outputs[f"{key}.lfr_cmvn"], "golden_lfr_cmvn")
        assert audio.fbank_frames(len(wave)) == record["fbank_frames"], key
        assert audio.lfr_frames(record["fbank_frames"]) == len(features) == record["lfr_frames"], key
        assert audio.projector_tokens(len(features), 1, 1) == record["sanm_tokens"], key


@golden_cases(lambda case: records(case, "sample_rate", "mel_frames") and "mel_filters_128" in case.inputs)
def test_mel_filters(case):
    assert_close(mel_filters(128), case.inputs["mel_filters_128"], "golden_mel_filters")


@golden_cases(lambda case: records(case, "sample_rate", "mel_frames") and "cmvn" in case.inputs)
def test_normalisation_file(case):
    if not case.has("am.mvn"):
        pytest.skip("am.mvn is an original upstream file and is not part of this repository")
    assert np.array_equal(audio.load_cmvn(case.path / "am.mvn"), case.inputs["cmvn"].numpy())


@golden_cases(lambda case: case.has("lengths.json"))
def test_lengths(case):
    for record in case.json("lengths.json"):
        samples = record["samples_16k"]
        assert audio.mel_frames(samples) == record["mel_frames"]
        assert audio.whisper_tokens(record["mel_frames"]) == record["whisper_tokens"]
        assert audio.fbank_frames(samples) == record["fbank_frames"]
        assert audio.lfr_frames(record["fbank_frames"]) == record["lfr_frames"]
