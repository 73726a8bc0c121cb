"""Vision tower, audio encoders and projectors against recorded runs of the original implementation."""

from __future__ import annotations

import re

import torch
from golden_cases import GoldenCase, golden_cases
from thinker_harness import load_case
from tolerances import RELATIVE_BF16, assert_close, row_errors

from ming_rt import ops
from ming_rt.config import VisionConfig, read_audio
from ming_rt.models.omni import AudioEncoder, VisionEncoder
from ming_rt.models.vision import layout


def has_vision(case: GoldenCase) -> bool:
    return case.has("weights.safetensors") and any(key.endswith(".vision_out") for key in case.outputs)


def has_audio(case: GoldenCase) -> bool:
    return case.has("weights.safetensors") and any(key.endswith(".audio_embeds") for key in case.outputs)


class Taps(dict):
    """Collects intermediates by name."""

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        self[name] = tensor.cpu().clone()


def group(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without deeper groups."""
    names = {key: key[len(prefix) :] for key in tensors if key.startswith(prefix)}
    return {name: tensors[key] for key, name in names.items() if "." not in name}


def vision_sets(case: GoldenCase):
    """(prefix, pixels, grid) of the recorded forward calls."""
    for prefix, pixels, grid in (
        ("image.", "pixel_values", "image_grid_thw"),
        ("video.", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in case.inputs:
            yield prefix, case.inputs[pixels], case.inputs[grid].numpy()


def load_vision(case: GoldenCase, directory, dtype=torch.float32, device=None) -> VisionEncoder:
    config, hidden = VisionConfig.from_dict(case.config), case.config["llm_config"]["hidden_size"]
    depth = case.config["mlp_depth"]
    return load_case(
        case, directory, lambda src: VisionEncoder(config, src, hidden, depth), dtype, device=device
    )


@golden_cases(has_vision)
def test_vision(case: GoldenCase, tmp_path, device):
    """Window layout exactly; every block, merger, projector and the unit rows within tolerance."""
    vision = load_vision(case, tmp_path, device=device)
    for prefix, pixels, grid in vision_sets(case):
        pixels = pixels.to(device.torch)
        expected = group(case.outputs, prefix)
        where = layout(vision.tower.config, grid)
        assert torch.equal(where.units, expected["window_index"])
        assert torch.equal(where.windows, expected["cu_window_seqlens"])
        assert torch.equal(where.slices, expected["cu_seqlens"])
        actual = Taps()
        actual["image_embeds"] = vision(pixels, grid, actual)
        out = actual["vision_out"].to(device.torch)
        actual["proj_hidden_pre_gelu"] = vision.projector.layers[0](out)
        actual["proj_out"] = vision.projector(out)
        assert {"patch_embed", "vision_out", "image_embeds"} <= expected.keys()
        for name in actual.keys() & expected.keys():
            stage = "_block" if name.startswith("block") else ""
            row = "golden_unit_rows" if name == "image_embeds" else f"golden_vision{stage}"
            assert_close(actual[name], expected[name], row)
        arrival = ops.rope_table(where.positions, vision.tower.inv_freq, vision.tower.axis)
        for name, tables in (("rotary", arrival), ("rotary_window_order", vision.tower.rope_tables(where))):
            if name in expected:
                assert_close(tables[0], expected[name].cos(), "golden_vision")
                assert_close(tables[1], expected[name].sin(), "golden_vision")


@golden_cases(has_vision)
def test_vision_bf16(case: GoldenCase, tmp_path, device):
    """A bf16 run points nearly the same way."""
    vision = load_vision(case, tmp_path, torch.bfloat16, device)
    for prefix, pixels, grid in vision_sets(case):
        rows = vision(pixels.to(device.torch), grid).cpu()
        error = row_errors(rows.flatten(), case.outputs[f"{prefix}image_embeds"].flatten())
        assert error <= RELATIVE_BF16["vision"]


@golden_cases(lambda case: has_vision(case) and any(".bf16_angles." in key for key in case.outputs))
def test_vision_bf16_angles(case: GoldenCase, tmp_path, monkeypatch):
    """A model cast to bf16 as a whole rounds positions and angles too; fed such tables the tower agrees."""
    vision = load_vision(case, tmp_path)
    tower = vision.tower
    for prefix, pixels, grid in vision_sets(case):
        expected = group(case.outputs, f"{prefix}bf16_angles.")
        if not expected:
            continue
        where = layout(tower.config, grid)
        rounded = where.positions[tower.axis.long()].t().bfloat16() * tower.inv_freq.bfloat16()
        assert_close(rounded.float(), expected["rotary"], "golden_copy")
        windowed = rounded.unflatten(0, (len(where.units), -1))[where.units].flatten(0, 1)
        tables = (windowed.cos().float(), windowed.sin().float())
        monkeypatch.setattr(tower, "rope_tables", lambda _, tables=tables: tables)
        actual = Taps()
        assert_close(vision(pixels, grid, actual), expected["image_embeds"], "golden_unit_rows")
        assert_close(actual["vision_out"], expected["vision_out"], "golden_vision")


def audio_groups(case: GoldenCase):
    """(group, encoder name, segments) of the recorded calls: all segments, one of them, or the first."""
    for name in sorted({key.split(".")[0] for key in case.outputs if key.endswith(".audio_embeds")}):
        kind, feature = ("sanm", "lfr_feats") if "sanm" in name else ("whisper", "mel")
        count = sum(key.startswith(feature) for key in case.inputs)
        segments = [case.inputs[f"{feature}{index}"] for index in range(count)]
        if not ("batch" in name or "packed" in name):
            which = int((re.search(r"\d+$", name) or ["0"])[0])
            segments = segments[which : which + 1]
        yield name, kind, segments


def load_audio(case: GoldenCase, directory, dtype=torch.float32, device=None) -> dict[str, AudioEncoder]:
    hidden, depth = case.config["llm_config"]["hidden_size"], case.config["mlp_depth"]
    configs = read_audio(case.config)
    return load_case(
        case,
        directory,
        lambda src: {name: AudioEncoder(part, src, hidden, depth) for name, part in configs.items()},
        dtype,
        device=device,
    )


@golden_cases(has_audio)
def test_audio_bf16(case: GoldenCase, tmp_path, device):
    """A bf16 run points nearly the same way."""
    encoders = load_audio(case, tmp_path, torch.bfloat16, device)
    for name, kind, segments in audio_groups(case):
        rows = torch.cat(encoders[kind]([segment.to(device.torch) for segment in segments])).cpu()
        expected = recorded_rows(group(case.outputs, f"{name}."), "audio_embeds")
        assert row_errors(rows.flatten(), expected.flatten()) <= RELATIVE_BF16["audio"], name


@golden_cases(has_audio)
def test_audio(case: GoldenCase, tmp_path, device):
    """Encoder stages, projector, lengths and unit rows, for segments alone and together."""
    encoders = load_audio(case, tmp_path, device=device)
    for name, kind, segments in audio_groups(case):
        segments = [segment.to(device.torch) for segment in segments]
        audio, expected = encoders[kind], group(case.outputs, f"{name}.")
        taps = Taps()
        rows = audio(segments, taps)
        assert_close(torch.cat(rows), recorded_rows(expected, "audio_embeds"), "golden_audio_rows")
        if "lengths" in expected:
            assert [len(item) for item in rows] == expected["lengths"].flatten().tolist()
        if "proj_out" in expected:
            projected = audio.projector(audio.encoder(segments))
            cut = torch.cat([item[: len(row)] for item, row in zip(projected, rows, strict=True)])
            assert_close(cut, recorded_rows(expected, "proj_out"), f"golden_{kind}")
        if "proj_conv_out" in expected:
            taps["proj_conv_out"] = audio.projector.conv(taps["encoder_out"].to(device.torch)).mT
        if "conv2_pre_gelu" in expected:
            mel = segments[0][None]
            taps["conv1_pre_gelu"] = audio.encoder.conv1(mel).mT
            taps["conv2_pre_gelu"] = audio.encoder.conv2(audio.encoder.conv1(mel, act="gelu")).mT
        for stage in taps.keys() & expected.keys():
            row = "golden_sanm_input" if stage == "after_pe" else f"golden_{kind}"
            assert_close(taps[stage].reshape(expected[stage].shape), expected[stage], row)
        missing = expected.keys() - taps.keys() - {"audio_embeds", "proj_out", "lengths"}
        assert not missing


def recorded_rows(expected: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Valid rows of a recorded ``[segments, T, H]``, ``[1, sum, H]`` or ``[T, H]``; the others are zero."""
    tensor = expected[name]
    if "lengths" not in expected or len(expected["lengths"]) != len(tensor) or len(tensor) == 1:
        return tensor.flatten(0, -2)
    lengths = expected["lengths"].flatten().tolist()
    if name == "audio_embeds":
        assert all(not item[length:].any() for item, length in zip(tensor, lengths, strict=True))
    return torch.cat([item[:length] for item, length in zip(tensor, lengths, strict=True)])
