"""Recorded conversions of BPE audio tokens and of the archives that weights come in, all exact, and the
configuration that belongs to recorded weights."""

from __future__ import annotations

import torch
from golden_cases import golden_cases
from safetensors import safe_open

from ming_rt import ops
from ming_rt.config import TalkerConfig, read_detokenizer
from ming_rt.ops import AudioBpe
from ming_rt.runtime.convert import convert


@golden_cases(lambda case: case.has("char_mapping.txt", "tokenizer.json", "cases.json"))
def test_audio_bpe(case, backend):
    host = AudioBpe.from_dir(case.path)
    bpe = host.to(torch.empty(0).device)
    recorded = case.json("cases.json")
    for record in recorded["encode"]:
        ids = host.encode(record["codes"])
        assert ids.tolist() == record["bpe_ids"], record["name"]
        assert bpe.decode(ids).tolist() == record["roundtrip_codes"], record["name"]
    for record in recorded["decode"]:
        assert bpe.decode(record["bpe_ids"]).tolist() == record["codes"], record["name"]
        assert [code for i in record["bpe_ids"] for code in bpe.codes_of(i)] == record["codes"]
    rows = [record["bpe_ids"] for record in recorded["decode"]]
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    codes, cu_codes = ops.audio_bpe_decode(torch.tensor([i for row in rows for i in row]), ends, bpe)
    assert codes[: int(cu_codes[-1])].tolist() == [
        c for record in recorded["decode"] for c in record["codes"]
    ]
    assert cu_codes.diff().tolist() == [len(record["codes"]) for record in recorded["decode"]]


@golden_cases(lambda case: case.has("hift_v2.pt", "outputs.safetensors"))
def test_archives(case, tmp_path):
    """Recorded are some tensors of each archive, the vocoder's under names without its prefix."""
    convert(case.path, tmp_path)
    archives = {"flow": "flow_other", "hift": "hift_v2", "spk": "luna_v2", "dtypes": "dtypes"}
    parts = {part: safe_open(tmp_path / f"{name}.safetensors", "pt") for part, name in archives.items()}
    single = safe_open(tmp_path / "luna_preview.safetensors", "pt")
    for name, expected in case.outputs.items():
        part, _, key = name.partition(".")
        found = parts[part].get_tensor(key) if key else single.get_tensor("vp_emb")
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    assert parts["spk"].metadata() == {"prompt_text": case.config["spk_prompt_text"]}
    assert len(parts["hift"].keys()) == case.config["hift_key_count"]
    assert not any("generator" in name for name in parts["hift"].keys())  # noqa: SIM118


def is_detokenizer(case):
    return "config_file" in case.config and case.has(case.config["config_file"], "weights.safetensors")


@golden_cases(is_detokenizer)
def test_detokenizer_config(case):
    """The sizes are those of the weights, which are of the flow or of the vocoder."""
    flow, vocoder = read_detokenizer(case.path / case.config["config_file"])
    assert flow.ignored_keys == vocoder.ignored_keys == ()
    assert flow.steps == case.config.get("n_timesteps", flow.steps)
    shapes = {name: tuple(weight.shape) for name, weight in case.weights.items()}
    blocks = vocoder.upsample_rates, vocoder.resblock_kernel_sizes
    expected = {
        "input_embedding.weight": (flow.vocab_size, flow.input_size),
        "spk_embed_affine_layer.weight": (flow.output_size, flow.spk_embed_dim),
        f"encoder.encoders.{flow.encoder.num_blocks - 1}.feed_forward.w_1.weight": (
            flow.encoder.linear_units,
            flow.encoder.output_size,
        ),
        "decoder.estimator.time_mlp.linear_1.weight": (
            flow.estimator.time_width,
            flow.estimator.in_channels,
        ),
        f"decoder.estimator.mid_blocks.{flow.estimator.num_mid_blocks - 1}.1.0.attn1.to_q.weight": (
            flow.estimator.num_heads * flow.estimator.attention_head_dim,
            flow.estimator.channels[-1],
        ),
        "conv_pre.bias": (vocoder.base_channels,),
        "conv_post.bias": (vocoder.n_fft + 2,),
        "m_source.l_linear.weight": (1, vocoder.nb_harmonics + 1),
        f"resblocks.{len(blocks[0]) * len(blocks[1]) - 1}.activations1.0.alpha": (
            vocoder.base_channels >> len(blocks[0]),
        ),
        "f0_predictor.classifier.weight": (1, vocoder.f0_channels),
    }
    found = expected.keys() & shapes.keys()
    assert len(found) == 5
    assert {name: shapes[name] for name in found} == {name: expected[name] for name in found}


@golden_cases(lambda case: case.has("talker/config.json", "weights.safetensors"))
def test_talker_config(case):
    config = TalkerConfig.from_dict(case.json("talker/config.json"), case.config)
    assert config.ignored_keys == ()
    shapes = {name: tuple(weight.shape) for name, weight in case.weights.items()}
    width, last = config.hidden_size, f"talker.model.model.layers.{config.num_hidden_layers - 1}"
    kv = config.num_key_value_heads * config.head_dim
    assert shapes["talker.model.lm_head.weight"] == (config.vocab_size, width)
    assert shapes["talker.thinker_to_talker_proj.weight"] == (width, config.thinker_hidden_size)
    assert shapes["talker.vp_head.weight"] == (width, config.speaker_size, 1)
    assert shapes[f"{last}.mlp.up_proj.weight"] == (config.intermediate_size, width)
    assert shapes[f"{last}.self_attn.k_proj.weight"] == (kv, width)
