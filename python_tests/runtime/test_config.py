"""Reading of upstream config files: the four generations, defaults, partial configs, refused values."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ming_rt.config import (
    GENERATIONS,
    OmniConfig,
    PreprocessorConfig,
    RopeConfig,
    SanmConfig,
    ThinkerConfig,
    VisionConfig,
    WhisperConfig,
    read_audio,
)
from ming_rt.demo import config_dict, preprocessor_dict, special_tokens
from ming_rt.errors import ConfigError
from ming_rt.strict_json import parse_json

DELETE = object()


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key set or deleted."""
    result = copy.deepcopy(config)
    *parents, leaf = path.split(".")
    target = result
    for key in parents:
        target = target[key]
    if value is DELETE:
        del target[leaf]
    else:
        target[leaf] = value
    return result


@pytest.mark.parametrize("size", ["tiny", "real"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_reads_every_generation(generation, size):
    config = OmniConfig.from_dict(config_dict(generation, size), preprocessor_dict(generation))
    thinker = config.thinker
    assert config.generation == thinker.generation == generation
    assert config.ignored_keys == ()
    assert thinker.head_dim == 128
    assert thinker.multi_gate
    assert thinker.norm_weight_in_fp32 == (generation == "v1.5")
    assert thinker.norm_head == (generation == "preview")
    assert thinker.use_qk_norm == (generation == "flash")
    assert config.vision.norm_weight_in_fp32 == (generation == "flash")
    expected = {"preview": ["sanm"], "v1": ["sanm", "whisper"], "v1.5": ["whisper"], "flash": ["whisper"]}
    assert sorted(config.audio) == expected[generation]
    rope = {"v1.5": ("3D", 128, (16, 24, 24)), "flash": ("video_rope", 64, (8, 12, 12))}
    assert (thinker.rope.type, thinker.rope.rotary_dim, thinker.rope.sections) == rope.get(
        generation, ("plain", 128, None)
    )


def test_shipped_dimensions():
    flash = OmniConfig.from_dict(config_dict("flash", "real"), preprocessor_dict("flash"))
    thinker = flash.thinker
    assert (thinker.num_hidden_layers, thinker.hidden_size, thinker.num_dense_layers) == (32, 4096, 1)
    assert (thinker.num_experts, thinker.num_experts_per_tok, thinker.n_group, thinker.topk_group) == (
        256,
        8,
        8,
        4,
    )
    assert thinker.routed_scaling_factor == 2.5  # class default: the shipped key has a name nobody reads
    assert (thinker.image_patch_token, thinker.video_patch_token) == (157157, 157175)
    assert (thinker.image_start_token, thinker.video_start_token) == (
        157158,
        157159,
    )  # the latter is </image>
    assert (thinker.eos_token_id, thinker.pad_token_id) == (156895, 156892)
    assert flash.preprocessor.max_pixels == 2007040
    lite = OmniConfig.from_dict(config_dict("v1.5", "real"), preprocessor_dict("v1.5")).thinker
    assert (lite.image_patch_token, lite.image_start_token, lite.video_start_token) == (
        126346,
        126347,
        126349,
    )
    assert lite.video_patch_token == lite.image_patch_token
    assert lite.eos_token_id == 126081
    assert lite.rms_norm_eps == 1e-5
    preview = OmniConfig.from_dict(config_dict("preview", "real"), preprocessor_dict("preview"))
    assert "head_dim" not in config_dict("preview", "real")["llm_config"]
    assert preview.audio["sanm"].num_blocks == 50


def test_special_tokens_have_the_shipped_ids():
    lite = {token: 126080 + i for i, token in enumerate(special_tokens("v1"))}
    flash = {token: 156891 + i for i, token in enumerate(special_tokens("flash"))}
    for token, lite_id, flash_id in [
        ("<|startoftext|>", 126080, 156891),
        ("[gMASK]", 126083, 156894),
        ("<role>", 126340, 157151),
        ("<|arithmetic_start|>", 126342, 157155),
        ("<|number_end|>", 126345, 157154),
        ("<imagePatch>", 126346, 157157),
        ("</video>", 126350, 157161),
        ("<gen_imagePatch>", 126351, 157162),
        ("<imageHere>", 126354, 157165),
        ("<audioPatch>", 126357, 157168),
        ("<audioHere>", 126363, 157174),
        ("<framePatch>", 126364, 157175),
        ("<tts>", 126367, 157178),
    ]:
        assert (lite[token], flash[token]) == (lite_id, flash_id), token
    assert flash["<|role_end|>"] == 156895
    assert flash["</tool_response>"] == 156899
    assert (lite["<|reserved_token_0|>"], flash["<|reserved_token_5|>"]) == (126084, 156900)


def test_class_defaults_where_keys_are_absent():
    llm = config_dict("v1")["llm_config"]
    for key in ("use_bias", "use_qkv_bias", "rms_norm_eps", "rope_theta", "rope_scaling", "multi_gate"):
        llm.pop(key)
    llm.pop("norm_topk_prob")
    llm.pop("num_shared_experts")
    thinker = ThinkerConfig.from_dict(llm)
    assert thinker.use_bias
    assert not thinker.use_qkv_bias
    assert not thinker.multi_gate
    assert thinker.norm_topk_prob
    assert thinker.num_shared_experts == 0
    assert (thinker.rms_norm_eps, thinker.rope.theta) == (1e-5, 10000.0)
    flash = changed(config_dict("flash"), "llm_config.router_type", DELETE)
    assert not ThinkerConfig.from_dict(flash).multi_gate
    assert ThinkerConfig.from_dict(changed(flash, "llm_config.head_dim", None)).head_dim == 128


def test_partial_configs():
    config = config_dict("v1")
    assert OmniConfig.from_dict({"llm_config": config["llm_config"]}).vision is None
    assert ThinkerConfig.from_dict(config["llm_config"]) == ThinkerConfig.from_dict(config)
    assert VisionConfig.from_dict(config["vision_config"]) == VisionConfig.from_dict(config)
    only_audio = {key: config[key] for key in ("audio_config", "whisper_config")} | {
        "llm_config": {"hidden_size": 64}
    }
    assert sorted(read_audio(only_audio)) == ["sanm", "whisper"]
    assert SanmConfig.from_dict(only_audio).prefix == "audio"
    whisper = WhisperConfig.from_dict(only_audio)
    assert (whisper.prefix, whisper.proj_prefix) == ("whisper_encoder", "linear_proj_whisper")
    assert whisper.norm_query_embeds


def test_audio_layouts():
    """v1.5 with v1's layout means Whisper under the prefix audio; a missing norm_query_embeds is true."""
    config = config_dict("v1.5")
    config["audio_config"] = config_dict("v1")["audio_config"]
    config["whisper_config"] = config_dict("v1")["whisper_config"]
    found = OmniConfig.from_dict(config).audio
    assert sorted(found) == ["whisper"]
    assert (found["whisper"].prefix, found["whisper"].ds_stride) == ("audio", 2)
    without = changed(config_dict("flash"), "audio_config.norm_query_embeds", DELETE)
    assert OmniConfig.from_dict(without).audio["whisper"].norm_query_embeds
    assert OmniConfig.from_dict(changed(config_dict("v1"), "audio_config", None)).audio == {}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {"type": "plain"}),
        ({"type": "linear", "factor": 4}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale_all_dim": 0.5},
            {
                "type": "yarn",
                "original_max_position_embeddings": 1024,
                "mscale_all_dim": 0.5,
                "beta_fast": 32.0,
            },
        ),
        ({"type": "3D", "factor": None}, {"type": "3D", "sections": (16, 24, 24)}),
    ],
)
def test_rope_types(scaling, expected):
    rope = RopeConfig.from_dict({"rope_scaling": scaling, "rope_theta": 600000, "head_dim": 128})
    assert {key: getattr(rope, key) for key in expected} == expected


def test_flash_rope_3d_has_the_short_sections():
    config = changed(config_dict("flash"), "llm_config.rope_scaling.type", "3D")
    assert ThinkerConfig.from_dict(config).rope.sections == (8, 12, 12)
    plain = ThinkerConfig.from_dict(changed(config_dict("flash"), "llm_config.rope_scaling", None))
    assert (plain.rope.type, plain.rope.rotary_dim, plain.generation) == ("plain", 64, "flash")


REFUSED = [
    ("v1", "llm_config", DELETE, "llm_config"),
    ("v1", "llm_config", [1], "llm_config"),
    ("v1", "model_type", "qwen2", "model_type"),
    ("v1", "model_type", "bailingmm_moe_v2_lite", "model_type"),
    ("v1", "llm_config.model_type", "llama", "llm_config.model_type"),
    ("v1", "llm_config.hidden_size", DELETE, "llm_config.hidden_size: found no such key"),
    ("v1", "llm_config.hidden_size", "256", "hidden_size: found '256', expected an integer"),
    ("v1", "llm_config.hidden_size", 256.0, "hidden_size"),
    ("v1", "llm_config.hidden_size", True, "hidden_size"),
    ("v1", "llm_config.hidden_size", -1, "hidden_size"),
    ("v1", "llm_config.hidden_size", 0, "hidden_size"),
    ("v1", "llm_config.hidden_size", 10**30, "hidden_size"),
    ("v1", "llm_config.num_hidden_layers", None, "num_hidden_layers"),
    ("v1", "llm_config.num_key_value_heads", 3, "a divisor of num_attention_heads"),
    ("v1", "llm_config.head_dim", 127, "head_dim"),
    ("v1", "llm_config.rms_norm_eps", 0, "rms_norm_eps"),
    ("v1", "llm_config.rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("v1", "llm_config.rms_norm_eps", float("inf"), "rms_norm_eps"),
    ("v1", "llm_config.rope_theta", -1.0, "rope_theta"),
    ("v1", "llm_config.hidden_act", "gelu", "hidden_act: found 'gelu', expected 'silu'"),
    ("v1", "llm_config.tie_word_embeddings", True, "tie_word_embeddings"),
    ("v1", "llm_config.use_bias", 1, "use_bias: found 1, expected true or false"),
    ("v1", "llm_config.quantization_config", {"bits": 4}, "quantization_config"),
    ("v1", "quantization_config", {"bits": 4}, "quantization_config"),
    ("v1", "llm_config.num_experts_per_tok", 9, "num_experts_per_tok"),
    ("v1", "llm_config.image_patch_token", 10**6, "image_patch_token"),
    ("v1", "llm_config.first_k_dense_replace", 4, "first_k_dense_replace"),
    ("v1", "llm_config.rope_scaling", {"type": "video_rope"}, "rope_scaling.type"),
    ("v1", "llm_config.rope_scaling", {"type": "linear", "factor": 0}, "rope_scaling.factor"),
    ("v1", "llm_config.rope_scaling", {"factor": 2.0}, "rope_scaling.type"),
    ("v1", "llm_config.rope_scaling", "3D", "rope_scaling: expected a JSON object"),
    ("v1.5", "llm_config.head_dim", 64, "expected 128"),
    ("v1.5", "llm_config.image_start_token", DELETE, "image_start_token"),
    ("flash", "llm_config.partial_rotary_factor", 1.0, "expected 64"),
    ("flash", "llm_config.partial_rotary_factor", 1.5, "partial_rotary_factor"),
    ("flash", "llm_config.rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling.type"),
    ("flash", "llm_config.router_type", "Other", "router_type"),
    ("flash", "llm_config.n_group", 5, "n_group"),
    ("flash", "llm_config.topk_group", 5, "topk_group"),
    ("flash", "llm_config.num_experts_per_tok", 9, "num_experts_per_tok"),
    ("flash", "llm_config.routed_scaling_factor", 0.0, "routed_scaling_factor"),
    ("flash", "llm_config.video_patch_token", DELETE, "video_patch_token"),
    ("flash", "llm_config.intermediate_size", None, "intermediate_size"),
    ("v1", "mlp_depth", DELETE, "mlp_depth"),
    ("v1", "mlp_depth", 0, "mlp_depth"),
    ("v1", "vision_config.num_heads", 3, "vision_config.num_heads"),
    ("v1", "vision_config.patch_size", 16, "vision_config.patch_size: found 16, expected 14"),
    ("v1", "vision_config.window_size", 100, "vision_config.window_size"),
    ("v1", "vision_config.fullatt_block_indexes", [99], "vision_config.fullatt_block_indexes"),
    ("v1", "vision_config.fullatt_block_indexes", "1,3", "vision_config.fullatt_block_indexes"),
    ("v1", "vision_config.hidden_act", "relu", "vision_config.hidden_act"),
    ("v1", "audio_config.audio_encoder_config_sanm", DELETE, "audio_encoder_config_sanm"),
    ("v1", "audio_config.audio_encoder_config_sanm.kernel_size", 10, "kernel_size"),
    ("v1", "audio_config.audio_encoder_config_sanm.normalize_before", False, "normalize_before"),
    ("v1", "audio_config.audio_encoder_config_sanm.sanm_shfit", 2, "sanm_shfit"),
    ("v1", "audio_config.audio_encoder_config_sanm.input_size", 400, "input_size"),
    ("v1", "audio_config.audio_encoder_output_size", 99, "audio_encoder_output_size"),
    ("v1", "audio_config.ds_kernel_size", 2, "ds_kernel_size"),
    ("v1.5", "audio_config.whisper_encoder_config.n_head", 3, "n_head"),
    ("v1.5", "audio_config.whisper_encoder_config.n_mels", 100, "n_mels"),
    (
        "v1.5",
        "audio_config.whisper_encoder_config.n_mels",
        80,
        "n_mels: found 80, expected the front end's 128",
    ),
    ("v1.5", "audio_config.whisper_encoder_config.n_ctx", 0, "n_ctx"),
]


@pytest.mark.parametrize(("generation", "path", "value", "message"), REFUSED)
def test_refuses(generation, path, value, message):
    with pytest.raises(ConfigError) as error:
        OmniConfig.from_dict(changed(config_dict(generation), path, value), preprocessor_dict(generation))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("min_pixels", 0, "min_pixels"),
        ("max_pixels", 100, "max_pixels"),
        ("max_pixels", 10**12, "max_pixels"),
        ("patch_size", 16, "patch_size"),
        ("image_mean", [0.5, 0.5], "image_mean"),
        ("image_std", [0.5, 0.0, 0.5], "image_std"),
        ("image_std", [0.5, float("nan"), 0.5], "image_std"),
        ("wav_frontend_args.window", "hann", "wav_frontend_args.window"),
        ("wav_frontend_args.lfr_m", 5, "wav_frontend_args.lfr_m"),
        ("wav_frontend_args.cmvn_file", "../am.mvn", "wav_frontend_args.cmvn_file"),
        ("wav_frontend_args.cmvn_file", "/etc/passwd", "wav_frontend_args.cmvn_file"),
        ("wav_frontend_args.cmvn_file", "..", "wav_frontend_args.cmvn_file"),
        ("whisper_frontend_args.n_mels", 64, "whisper_frontend_args.n_mels"),
    ],
)
def test_preprocessor_refuses(path, value, message):
    with pytest.raises(ConfigError, match=message):
        PreprocessorConfig.from_dict(changed(preprocessor_dict("v1"), path, value), "v1")


def test_unknown_keys_are_kept_by_name():
    config = config_dict("v1")
    config["flux_config"] = {"a": 1}
    config["llm_config"]["rope_interleave"] = True
    config["vision_config"]["deepstack"] = [1]
    found = OmniConfig.from_dict(config, preprocessor_dict("v1") | {"max_crops": 3})
    assert set(found.ignored_keys) == {
        "flux_config",
        "llm_config.rope_interleave",
        "vision_config.deepstack",
        "max_crops",
    }


def test_from_dir(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        OmniConfig.from_dir(tmp_path / "none")
    with pytest.raises(ConfigError, match="file not found"):
        OmniConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="no llm_config"):
        OmniConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_dict("flash")))
    assert OmniConfig.from_dir(tmp_path).preprocessor.max_pixels == 2007040
    (tmp_path / "preprocessor_config.json").write_text('{"max_pixels": 500000}')
    assert OmniConfig.from_dir(tmp_path).preprocessor.max_pixels == 500000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "more than once"),
        (b'{"a": NaN}', "not a number"),
        (b'{"a": -Infinity}', "not a number"),
        (b"[" * 100 + b"]" * 100, "deeper than 32"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
        (b" " * (8 << 20) + b"{}", "expected at most"),
    ],
)
def test_json_limits(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_json(data, "config.json")


def test_json_strings_may_hold_brackets():
    text = "[{" * 100 + '\\"'
    assert parse_json(json.dumps({"a": text}).encode(), "x") == {"a": text}
