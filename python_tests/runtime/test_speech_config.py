"""Configuration of the parts that speak: both YAML layouts at real sizes, refused values, hostile YAML."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from ming_rt.config import (
    FlowConfig,
    FlowEncoderConfig,
    FlowEstimatorConfig,
    SpeechConfig,
    TalkerConfig,
    VocoderConfig,
    read_detokenizer,
)
from ming_rt.errors import ConfigError, UnsupportedError
from ming_rt.strict_yaml import Tagged, load_yaml, parse_yaml

# The layout upstream ships; {} are the values that differ.
TEXT = """\
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:torch.manual_seed [1986]
sample_rate: {rate}
text_encoder_input_size: 512
spk_embed_dim: 192

flow: !new:.audio_detokenizer.flow.flow.{causal}MaskedDiffWithXvec
    input_size: 512
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 4096
    input_frame_rate: 50
    only_mask_loss: True
{flow}
    encoder: !new:.audio_detokenizer.transformer.{encoder}
        output_size: 512
        attention_heads: 8
        linear_units: 2048
        num_blocks: 6
        dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: 512
        use_cnn_module: False
        macaron_style: False
{chunk}
    decoder: !new:.audio_detokenizer.flow.flow_matching.{causal}ConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:.audio_detokenizer.flow.decoder.{causal}ConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: {channels}
            dropout: 0
            attention_head_dim: 64
            n_blocks: 4
            num_mid_blocks: 12
            num_heads: 8
            act_fn: 'gelu'
    {chunk}

hift: !new:.audio_detokenizer.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 512
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: {rates}
    upsample_kernel_sizes: {kernels}
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: {source}
    source_resblock_dilation_sizes: {dilations}
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:.audio_detokenizer.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: 512
"""
V1 = TEXT.format(
    rate=22050,
    causal="",
    flow="    length_regulator: !new:.audio_detokenizer.flow.length_regulator.InterpolateRegulator\n"
    "        channels: 80\n        sampling_ratios: [1, 1, 1, 1]",
    encoder="encoder.ConformerEncoder",
    chunk="",
    channels=[256, 256],
    rates=[8, 8],
    kernels=[16, 16],
    source=[7, 11],
    dilations=[[1, 3, 5]] * 2,
)
V15 = TEXT.format(
    rate=24000,
    causal="Causal",
    flow="    token_mel_ratio: 1\n    pre_lookahead_len: 3",
    encoder="upsample_encoder_new_mel.UpsampleConformerEncoder",
    chunk="        static_chunk_size: 50",
    channels=[256],
    rates=[8, 5, 3],
    kernels=[16, 11, 7],
    source=[7, 7, 11],
    dilations=[[1, 3, 5]] * 3,
)

FLOWS = {
    V1: FlowConfig(
        causal=False,
        vocab_size=4096,
        input_size=512,
        output_size=80,
        spk_embed_dim=192,
        input_frame_rate=50,
        sample_rate=22050,
        steps=8,
        guidance=0.7,
        encoder=FlowEncoderConfig(512, 512, 8, 2048, 6, 1e-5),
        estimator=FlowEstimatorConfig(320, 80, (256, 256), 64, 4, 12, 8),
        hop=256,
    ),
    V15: FlowConfig(
        causal=True,
        vocab_size=4096,
        input_size=512,
        output_size=80,
        spk_embed_dim=192,
        input_frame_rate=50,
        sample_rate=24000,
        steps=10,
        guidance=0.7,
        encoder=FlowEncoderConfig(512, 512, 8, 2048, 6, 1e-12),
        estimator=FlowEstimatorConfig(320, 80, (256,), 64, 4, 12, 8, causal=True),
        hop=480,
    ),
}


def read(tmp_path, text):
    path = tmp_path / "audio_detokenizer.yaml"
    path.write_text(text, encoding="utf-8")
    return read_detokenizer(path)


@pytest.mark.parametrize("text", [V1, V15], ids=["v1", "v1.5"])
def test_the_real_sizes(tmp_path, text):
    flow, vocoder = read(tmp_path, text)
    seeds = ("audio_detokenizer.yaml.__set_seed1", "audio_detokenizer.yaml.__set_seed2")
    assert flow.ignored_keys == seeds
    assert {**vars(flow), "ignored_keys": ()} == vars(FLOWS[text])
    assert flow.estimator.time_width == 1024
    assert flow.token_mel_ratio == 1
    causal = text == V15
    assert vocoder == VocoderConfig(
        in_channels=80,
        base_channels=512,
        nb_harmonics=8,
        sampling_rate=24000 if causal else 22050,
        nsf_alpha=0.1,
        nsf_sigma=0.003,
        nsf_voiced_threshold=10.0,
        upsample_rates=(8, 5, 3) if causal else (8, 8),
        upsample_kernel_sizes=(16, 11, 7) if causal else (16, 16),
        n_fft=16,
        hop_len=4,
        resblock_kernel_sizes=(3, 7, 11),
        resblock_dilation_sizes=((1, 3, 5),) * 3,
        source_resblock_kernel_sizes=(7, 7, 11) if causal else (7, 11),
        source_resblock_dilation_sizes=((1, 3, 5),) * (3 if causal else 2),
        lrelu_slope=0.1,
        audio_limit=0.99,
        f0_channels=512,
    )
    assert vocoder.hop == flow.hop
    assert vocoder.frame_phase == causal


def test_the_sibling_with_half_the_tokens(tmp_path):
    text = V15.replace("upsample_encoder_new_mel.", "upsample_encoder.").replace(
        "input_frame_rate: 50", "input_frame_rate: 25"
    )
    flow, _ = read(tmp_path, text.replace("token_mel_ratio: 1", "token_mel_ratio: 2"))
    assert (flow.encoder.up_stride, flow.token_mel_ratio) == (2, 2)
    with pytest.raises(ConfigError, match=r"flow.token_mel_ratio: found 1, expected 2"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample_rate: 24000", "sample_rate: '24000'", "sample_rate: found '24000', expected an integer"),
        ("sample_rate: 24000", "sample_rate: 22050", "flow.input_frame_rate: found 50, expected 22050 /"),
        ("sample_rate: 24000", "other: 24000", "sample_rate: found no such key"),
        ("!ref <sample_rate>", "!ref <missing>", "hift.sampling_rate: found Tagged.*, expected 24000"),
        ("!ref <sample_rate>", "!ref <sample_rate> * 2", "hift.sampling_rate: found Tagged"),
        ("!ref <sample_rate>", "16000", "hift.sampling_rate: found 16000, expected 24000"),
        ("!ref <spk_embed_dim>", "!ref <flow>", "flow.spk_embed_dim: found Tagged"),
        ("flow.CausalMasked", "flow.AnyMasked", "flow: found Tagged.*, expected !new:MaskedDiffWithXvec or"),
        ("flow: !new:", "flow: !name:", "flow: found Tagged.*, expected !new:"),
        (" !new:.audio_detokenizer.flow.flow.CausalMaskedDiffWithXvec", "", "flow: found {'input_size"),
        ("upsample_encoder_new_mel.", "encoder.", "flow.encoder: found Tagged"),
        ("hifigan.generator.HiFT", "hifigan.generator.BigV", "hift: found Tagged"),
        ("flow_matching.Causal", "flow_matching.", "flow.decoder: found Tagged"),
        ("use_cnn_module: False", "use_cnn_module: True", "use_cnn_module: found True, expected False"),
        ("macaron_style: False", "", "encoder.macaron_style: found no such key"),
        ("'rel_pos_espnet'", "'rel_pos'", "encoder.pos_enc_layer_type: found 'rel_pos'"),
        ("normalize_before: True", "normalize_before: 1", "encoder.normalize_before: found 1, expected True"),
        ("attention_heads: 8", "attention_heads: 7", "output_size: found 512, expected an even multiple"),
        ("num_blocks: 6", "num_blocks: 1000000", "encoder.num_blocks: found 1000000"),
        ("linear_units: 2048", "linear_units: 1e3", "encoder.linear_units: found 1000.0"),
        ("output_size: 80", "output_size: 100", "flow.output_size: found 100, expected 80"),
        ("'cosine'", "'linear'", "cfm_params.content.t_scheduler: found 'linear', expected 'cosine'"),
        ("'euler'", "'midpoint'", "content.solver: found 'midpoint'"),
        ("inference_cfg_rate: 0.7", "inference_cfg_rate: .nan", "content.inference_cfg_rate: found nan"),
        ("content:", "contents:", "cfm_params.content: expected a JSON object"),
        ("channels: [256]", "channels: []", "channels: found .*, expected a list of 1 integers"),
        ("channels: [256]", "channels: [256, 256]", "channels: found .*, expected a list of 1 integers"),
        ("channels: [256]", "channels: [true]", "estimator.channels: found"),
        ("'gelu'", "'snakebeta'", "estimator.act_fn: found 'snakebeta'"),
        ("in_channels: 320", "in_channels: 240", "estimator.in_channels: found 240, expected 320"),
        ("[8, 5, 3]", "[8, 5]", "upsample_kernel_sizes: found .*, expected a list of 2 integers"),
        ("[16, 11, 7]", "[16, 11, 8]", "upsample_kernel_sizes: found .*, expected sizes that differ"),
        ("[16, 11, 7]", "[16, 11, 1]", "upsample_kernel_sizes: found .*, expected sizes that differ"),
        ("base_channels: 512", "base_channels: 500", "base_channels: found 500, expected a multiple of 8"),
        ("[7, 7, 11]", "[7, 7]", "source_resblock_kernel_sizes: found .*, expected a list of 3 odd integers"),
        ("[7, 7, 11]", "[7, 7, 8]", "source_resblock_kernel_sizes: found .* 3 odd integers"),
        ("n_fft: 16", "n_fft: 15", "istft_params.n_fft: found 15, expected an even integer"),
        ("hop_len: 4", "hop_len: 17", "istft_params.hop_len: found 17"),
        ("hop_len: 4", "hop_len: 2", "input_frame_rate: found 50"),
        (
            "    source_resblock_dilation_sizes: [[1, 3, 5]",
            "    source_resblock_dilation_sizes: [[1, 3, 0]",
            "source_resblock_dilation_sizes.0: found",
        ),
        ("num_class: 1", "num_class: 2", "f0_predictor.num_class: found 2, expected 1"),
    ],
)  # fmt: skip
def test_values_that_are_refused(tmp_path, old, new, message):
    assert old in V15
    with pytest.raises(ConfigError, match=rf"audio_detokenizer.yaml\..*{message}"):
        read(tmp_path, V15.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample_rate: 22050", "sample_rate: 24000", "sample_rate: found 24000, expected 22050 with 256"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 4]", "sample_rate: found 22050, .*there are 128"),
        ("[1, 1, 1, 1]", "[1, 2, 1, 1]", "length_regulator.sampling_ratios: found"),
        ("channels: [256, 256]", "channels: [256, 255]", "estimator.channels: found .* multiples of 8"),
        ("num_blocks: 6", "num_blocks: 6\n        static_chunk_size: 25", "static_chunk_size: found 25"),
        ("length_regulator:", "regulator:", "length_regulator: found no such key"),
    ],
)  # fmt: skip
def test_values_of_v1_that_are_refused(tmp_path, old, new, message):
    assert old in V1
    with pytest.raises(ConfigError, match=rf"audio_detokenizer.yaml\..*{message}"):
        read(tmp_path, V1.replace(old, new))


def test_other_keys_are_named(tmp_path):
    flow, vocoder = read(
        tmp_path,
        V15.replace("    nb_harmonics: 8", "    colour: blue").replace(
            "num_heads: 8", "num_heads: 8\n            new: 1"
        ),
    )
    assert vocoder.nb_harmonics == 8
    assert vocoder.ignored_keys == ("audio_detokenizer.yaml.hift.colour",)
    assert "audio_detokenizer.yaml.flow.decoder.estimator.new" in flow.ignored_keys


# The talker.

NETWORK: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TALKER = {
    "qa_model_hidden_size": 2048,
    "vocab_size": 184445,
    "text_vocab_size": 151677,
    "audio_vocab_size": 32768,
    "vp_feature_size": 192,
    "vp_kernel_size": 1,
    "vp_stride": 1,
}


def test_the_talker():
    """A config without a talker_config (preview's) has the same values by default."""
    expected = TalkerConfig(896, 4864, 24, 14, 2, 64, 1e-6, 1e6, 32768, 184445, 151677, 32768, 2048, 192)
    assert TalkerConfig.from_dict(NETWORK, {"talker_config": TALKER}) == expected
    assert TalkerConfig.from_dict(NETWORK, {}) == expected


@pytest.mark.parametrize(
    ("network", "talker", "message"),
    [
        ({"hidden_act": "gelu"}, {}, "talker/config.json.hidden_act: found 'gelu'"),
        ({"model_type": "llama"}, {}, "model_type: found 'llama'"),
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings: found True"),
        ({"use_sliding_window": True}, {}, "use_sliding_window: found True"),
        ({"rope_scaling": {"type": "yarn"}}, {}, "rope_scaling: found"),
        ({"num_attention_heads": 12}, {}, "num_attention_heads: found 12, expected a divisor"),
        ({"num_attention_heads": 1024}, {}, "num_attention_heads: found 1024|num_key_value_heads"),
        ({"num_attention_heads": 128, "num_key_value_heads": 128}, {}, "num_attention_heads: found 128"),
        ({"num_key_value_heads": 4}, {}, "num_key_value_heads: found 4, expected a divisor"),
        ({"head_dim": 128}, {}, "num_attention_heads: found 14"),
        ({"hidden_size": None}, {}, "hidden_size: found None"),
        ({"rope_theta": 0}, {}, "rope_theta: found 0"),
        ({}, {"vocab_size": 184446}, "talker_config.vocab_size: found 184446, expected .*184445"),
        ({}, {"vp_kernel_size": 3}, "talker_config.vp_kernel_size: found 3"),
        ({}, {"audio_vocab_size": -1}, "talker_config.audio_vocab_size: found -1"),
    ],
)
def test_talkers_that_are_refused(network, talker, message):
    with pytest.raises(ConfigError, match=message):
        TalkerConfig.from_dict({**NETWORK, **network}, {"talker_config": {**TALKER, **talker}})


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "talker").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"talker_config": TALKER}))
    (tmp_path / "talker" / "config.json").write_text(json.dumps(NETWORK))
    (tmp_path / "talker" / "audio_detokenizer.yaml").write_text(V1)
    (tmp_path / "talker" / "audio_detokenizer_stream.yaml").write_text(V15)
    return tmp_path


def test_a_checkpoint(checkpoint):
    for generation in ("preview", "v1", "v1.5"):
        config = SpeechConfig.from_dir(checkpoint, generation)
        assert config.flow.causal == (generation == "v1.5")
        assert config.sample_rate == config.flow.sample_rate == (24000 if config.flow.causal else 22050)
        assert config.talker.hidden_size == 896
    with pytest.raises(UnsupportedError, match="flash"):
        SpeechConfig.from_dir(checkpoint, "flash")


def test_checkpoints_that_are_refused(checkpoint):
    talker = checkpoint / "talker"
    (talker / "audio_detokenizer_stream.yaml").write_text(V1)
    with pytest.raises(ConfigError, match=r"class of another generation, expected that of v1.5"):
        SpeechConfig.from_dir(checkpoint, "v1.5")
    (talker / "audio_detokenizer_stream.yaml").write_text(
        V15.replace("spk_embed_dim: 192", "spk_embed_dim: 80")
    )
    with pytest.raises(ConfigError, match="spk_embed_dim: found 80, expected the talker's 192"):
        SpeechConfig.from_dir(checkpoint, "v1.5")
    (talker / "audio_detokenizer_stream.yaml").unlink()
    with pytest.raises(ConfigError, match=r"audio_detokenizer_stream.yaml: file not found"):
        SpeechConfig.from_dir(checkpoint, "v1.5")


# YAML.


def test_tags_stay_words(tmp_path):
    """Nothing that a file names is imported, called or built."""
    marker = tmp_path / "marker"
    text = f"""\
a: !new:os.system ["touch {marker}"]
b: !apply:builtins.open [{marker}, w]
c: !name:this_module_is_never_imported.f
    x: !new:other.G
d: !ref <e>
e: 7
f: !ref <a>
g: !custom 3
h: [!ref <e>, {{i: !ref <e>}}]
j: 1e-06
k: -2E+3
l: 1e5x
"""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    value = load_yaml(path)
    assert not marker.exists()
    assert "this_module_is_never_imported" not in sys.modules
    assert value["a"] == Tagged("new", "os.system", [f"touch {marker}"])
    assert value["c"] == Tagged(
        "name", "this_module_is_never_imported.f", {"x": Tagged("new", "other.G", "")}
    )
    assert (value["d"], value["h"]) == (7, [7, {"i": 7}])
    assert value["f"] == Tagged("ref", "", "<a>")
    assert value["g"] == Tagged("custom", "", "3")
    assert (value["j"], value["k"], value["l"]) == (1e-6, -2000.0, "1e5x")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopq", "bcdefghijklmnopqr", strict=True)
)
NESTED = "a: " + "[" * 30 + "]" * 30
MERGES = "a: &a {x: 1}\n" + "".join(
    f"k{i}: &k{i} {{<<: [{', '.join(['*a' if i == 0 else f'*k{i - 1}'] * 9)}]}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10000 values"),
        (MERGES, "more than 10000 values"),
        ("a: &a [*a]", "nested deeper than 24 levels"),
        ("a: &a {b: *a}", "nested deeper than 24 levels"),
        (NESTED, "nested deeper than 24 levels"),
        ("a: " + "[" * 60_000, "nested deeper"),
        ("a: " + "{b: " * 12_000, "nested deeper"),
        ("- " * 20_000, "nested deeper"),
        ("a: [" + "x, " * 15_000 + "]", "more than 10000 values"),
        ("a: 1\na: 2", "line 2: key 'a' appears more than once"),
        ("a: {b: 1, b: 2}", "line 1: key 'b' appears more than once"),
        ("1: 2", "line 1: found the key 1, expected text"),
        ("? [a]\n: 2", r"line 1: found the key \['a'\], expected text"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML .could not determine a constructor"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("!new:os.system [ls]", "expected a mapping, found Tagged"),
        ("[a]", "expected a mapping, found list"),
        ("", "expected a mapping, found NoneType"),
        ("a: 1\n---\nb: 2", "not valid YAML .expected a single document"),
        ("a: *b", "not valid YAML .found undefined alias"),
        ("a: [", "not valid YAML"),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("a: 2020-99-99", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
        ("a" * 70_000, "70000 bytes of YAML, expected at most 65536"),
    ],
)
def test_yaml_that_is_refused(text, message):
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ConfigError, match=f"x.yaml: ({message})"):
        parse_yaml(data, "x.yaml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'x.yaml'}: file not found")):
        load_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"#" * 100_000)
    with pytest.raises(ConfigError, match="bytes of YAML"):
        load_yaml(tmp_path / "x.yaml")
