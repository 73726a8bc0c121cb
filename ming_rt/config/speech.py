"""Speech output of the Lite generations: talker, flow-matching model and vocoder.

The talker's network is described by ``talker/config.json`` and ``talker_config`` of the main config.json, the
other two by a YAML file beside the talker's, which names the classes that upstream constructs. The classes
tell the variant: with a causal flow (v1.5) or without (preview, v1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_rt.config.keys import UNUSED
from ming_rt.config.thinker import Generation
from ming_rt.errors import ConfigError, UnsupportedError
from ming_rt.strict_json import Fields, load_json

MELS = 80
"""Mel bins of all parts; upstream's code has the number too."""

# Of training, or of code paths that inference does not take.
_UNUSED_KEYS = """
    attention_dropout_rate dropout dropout_rate positional_dropout_rate only_mask_loss tensorrt_model_path
    sigma_min training_cfg_rate reg_loss_type text_encoder_input_size llm_input_size llm_output_size
"""
_UNUSED = UNUSED | frozenset(_UNUSED_KEYS.split())
# v1's frame count has these two in the code.
_V1_RATE, _V1_HOP = 22050, 256


@dataclass(frozen=True)
class TalkerConfig:
    """The network that speaks: Qwen2 with q, k and v biases, untied embeddings (tensors ``talker.*``)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    vocab_size: int  # rows of both embeddings: text ids, then audio ids
    text_vocab_size: int
    audio_vocab_size: int
    thinker_hidden_size: int  # width of the language model's states it is given
    speaker_size: int
    ignored_keys: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, network: Mapping[str, Any], config: Mapping[str, Any]) -> TalkerConfig:
        """Reads talker/config.json and the whole main config.json, given as objects. Raises ConfigError."""
        net = Fields(network, "talker/config.json")
        top = Fields(config, "").section("talker_config") or Fields({}, "talker_config")
        net.choice("model_type", ("qwen2",), "qwen2")
        net.choice("hidden_act", ("silu",), "silu")
        net.choice("tie_word_embeddings", (False,), False)
        net.choice("use_sliding_window", (False,), False)
        net.absent("rope_scaling")
        net.absent("quantization_config")
        net.integer("vocab_size", None, hi=1 << 24)  # replaced by talker_config's
        hidden, heads = net.integer("hidden_size", hi=1 << 16), net.integer("num_attention_heads", hi=1024)
        kv_heads = net.integer("num_key_value_heads", heads, hi=heads)
        head_dim = net.integer("head_dim", hidden // heads or 1, lo=2, hi=1024)
        if heads % kv_heads:
            raise net.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        if hidden % heads or head_dim != hidden // heads or head_dim % 2:
            raise net.fail("num_attention_heads", f"a divisor of hidden_size ({hidden}) into even heads")
        for key in ("vp_kernel_size", "vp_stride"):
            top.choice(key, (1,), 1)
        text = top.integer("text_vocab_size", 151677, hi=1 << 24)
        audio = top.integer("audio_vocab_size", 32768, hi=1 << 20)
        if top.integer("vocab_size", text + audio, hi=1 << 25) != text + audio:
            raise top.fail("vocab_size", f"text_vocab_size + audio_vocab_size ({text + audio})")
        return cls(
            hidden_size=hidden,
            intermediate_size=net.integer("intermediate_size", hi=1 << 18),
            num_hidden_layers=net.integer("num_hidden_layers", hi=1024),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=net.number("rms_norm_eps", 1e-6, hi=0.1),
            rope_theta=net.number("rope_theta", 10000.0, hi=1e12),
            max_position_embeddings=net.integer("max_position_embeddings", 32768, hi=1 << 24),
            vocab_size=text + audio,
            text_vocab_size=text,
            audio_vocab_size=audio,
            thinker_hidden_size=top.integer("qa_model_hidden_size", 2048, hi=1 << 16),
            speaker_size=top.integer("vp_feature_size", 192, hi=1 << 16),
            ignored_keys=net.ignored(UNUSED) + top.ignored(UNUSED),
        )


@dataclass(frozen=True)
class FlowEncoderConfig:
    """The flow's encoder: conformer blocks without convolution; only v1.5 has what follows ``norm_eps``."""

    input_size: int
    output_size: int
    attention_heads: int
    linear_units: int
    num_blocks: int
    norm_eps: float  # inside the blocks
    num_up_blocks: int = 4
    up_stride: int = 1
    pre_lookahead_len: int = 3
    static_chunk_size: int = 50  # tokens


@dataclass(frozen=True)
class FlowEstimatorConfig:
    """The flow's estimator, a U-net over frames with one level per entry of ``channels``."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    attention_head_dim: int
    n_blocks: int
    num_mid_blocks: int
    num_heads: int
    causal: bool = False
    static_chunk_size: int = 50  # frames, of the causal one

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]


@dataclass(frozen=True)
class FlowConfig:
    """Codec tokens to mel: of preview and v1, or causal, of v1.5."""

    causal: bool
    vocab_size: int
    input_size: int
    output_size: int
    spk_embed_dim: int
    input_frame_rate: int  # tokens per second
    sample_rate: int
    steps: int
    guidance: float
    encoder: FlowEncoderConfig
    estimator: FlowEstimatorConfig
    pre_lookahead_len: int = 3
    hop: int = 256  # samples per mel frame
    ignored_keys: tuple[str, ...] = ()

    @property
    def token_mel_ratio(self) -> int:
        """Mel frames per token of the causal one."""
        return self.encoder.up_stride


@dataclass(frozen=True)
class VocoderConfig:
    """Mel to samples. Lists have an entry per upsampling stage, or per residual block of a stage."""

    in_channels: int
    base_channels: int
    nb_harmonics: int
    sampling_rate: int
    nsf_alpha: float
    nsf_sigma: float
    nsf_voiced_threshold: float  # Hz
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    n_fft: int
    hop_len: int
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    source_resblock_kernel_sizes: tuple[int, ...]
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    lrelu_slope: float
    audio_limit: float
    f0_channels: int
    ignored_keys: tuple[str, ...] = ()

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates) * self.hop_len

    @property
    def frame_phase(self) -> bool:
        """Whether the source's phase adds up per frame (v1.5) or per sample: upstream goes by the rate."""
        return self.sampling_rate != _V1_RATE


@dataclass(frozen=True)
class SpeechConfig:
    """All parts of a checkpoint that speak."""

    talker: TalkerConfig
    flow: FlowConfig
    vocoder: VocoderConfig

    @property
    def sample_rate(self) -> int:
        """Samples per second of the speech."""
        return self.vocoder.sampling_rate

    @classmethod
    def from_dir(cls, directory: str | Path, generation: Generation) -> SpeechConfig:
        """Reads a checkpoint directory's config.json and talker folder.

        Raises ConfigError, and UnsupportedError for flash, whose speech works in another way.
        """
        if generation == "flash":
            raise UnsupportedError("flash: expected a Lite generation, whose talker makes codec tokens")
        directory = Path(directory)
        causal = generation == "v1.5"
        flow, vocoder = read_detokenizer(
            directory / "talker" / ("audio_detokenizer_stream.yaml" if causal else "audio_detokenizer.yaml")
        )
        if flow.causal != causal:
            raise ConfigError(f"flow: found the class of another generation, expected that of {generation}")
        talker = TalkerConfig.from_dict(
            load_json(directory / "talker" / "config.json"), load_json(directory / "config.json")
        )
        if talker.speaker_size != flow.spk_embed_dim:
            raise ConfigError(
                f"spk_embed_dim: found {flow.spk_embed_dim}, expected the talker's {talker.speaker_size}"
            )
        return cls(talker, flow, vocoder)


def read_detokenizer(path: str | Path) -> tuple[FlowConfig, VocoderConfig]:
    """Reads an audio_detokenizer.yaml; nothing it names is constructed. Raises ConfigError."""
    from ming_rt.strict_yaml import load_yaml  # here: most imports of this package need no YAML

    path = Path(path)
    top = Fields(load_yaml(path), path.name)
    rate = top.integer("sample_rate", lo=8000, hi=96000)
    vocoder = _read_vocoder(top, rate)
    return _read_flow(top, rate, vocoder.hop), vocoder


def _object(fields: Fields, key: str, *classes: str) -> tuple[str, Fields]:
    """The class under ``key``, one of ``classes`` (the last parts of its path), and its arguments."""
    from ming_rt.strict_yaml import Tagged

    expected = " or ".join(f"!new:{name}" for name in classes)
    value = fields.get(key, None, expected)
    for name in classes:
        if isinstance(value, Tagged) and value.kind == "new" and f".{value.path}".endswith(f".{name}"):
            return name, Fields(value.value, fields.name(key))
    raise fields.fail(key, expected)


def _integers(
    fields: Fields, key: str, count: int | None = None, *, hi: int, odd: bool = False
) -> tuple[int, ...]:
    """A list of ``count`` (None: 1 to 8) integers from 1 to ``hi``."""
    value = fields.get(key, None, "a list")
    good = isinstance(value, list) and all(type(v) is int and 1 <= v <= hi and v % 2 >= odd for v in value)
    if not good or (len(value) != count if count is not None else not 1 <= len(value) <= 8):
        many = "1 to 8" if count is None else count
        raise fields.fail(key, f"a list of {many} {'odd ' if odd else ''}integers from 1 to {hi}")
    return tuple(value)


def _dilations(fields: Fields, key: str, count: int) -> tuple[tuple[int, ...], ...]:
    """A list of ``count`` lists of dilations."""
    value = fields.get(key, None, "a list")
    if not isinstance(value, list) or len(value) != count:
        raise fields.fail(key, f"{count} lists of dilations")
    inner = Fields({str(i): entry for i, entry in enumerate(value)}, fields.name(key))
    return tuple(_integers(inner, str(i), hi=64) for i in range(count))


def _read_flow(top: Fields, rate: int, hop: int) -> FlowConfig:
    kind, flow = _object(top, "flow", "MaskedDiffWithXvec", "CausalMaskedDiffWithXvec")
    causal = kind.startswith("Causal")
    if not causal and (rate, hop) != (_V1_RATE, _V1_HOP):
        raise top.fail(
            "sample_rate", f"{_V1_RATE} with {_V1_HOP} samples per frame (there are {hop}) for {kind}"
        )
    flow.choice("output_type", ("mel",), "mel")
    width, mels = flow.integer("input_size", hi=1 << 14), flow.choice("output_size", (MELS,))
    ahead = flow.integer("pre_lookahead_len", 3, hi=64) if causal else 3
    encoder, encoder_ignored = _read_encoder(flow, causal, width, ahead)
    tokens = flow.integer("input_frame_rate", 50, hi=1000)
    if causal:
        flow.choice("token_mel_ratio", (encoder.up_stride,), encoder.up_stride)
        if tokens * encoder.up_stride * hop != rate:
            raise flow.fail("input_frame_rate", f"{rate} / ({encoder.up_stride} * {hop}) tokens per second")
    else:
        _, regulator = _object(flow, "length_regulator", "InterpolateRegulator")
        regulator.choice("channels", (MELS,))
        regulator.choice("sampling_ratios", ([1, 1, 1, 1],))
        encoder_ignored += regulator.ignored(_UNUSED)
    _, decoder = _object(flow, "decoder", "CausalConditionalCFM" if causal else "ConditionalCFM")
    decoder.choice("in_channels", (3 * MELS,), 3 * MELS)
    decoder.choice("n_spks", (1,), 1)
    decoder.choice("spk_emb_dim", (MELS,))
    _, parameters = _object(decoder, "cfm_params", "omegaconf.DictConfig")
    solver = parameters.required_section("content")
    solver.choice("solver", ("euler",), "euler")
    solver.choice("t_scheduler", ("cosine",))
    estimator, estimator_ignored = _read_estimator(decoder, causal)
    return FlowConfig(
        causal=causal,
        vocab_size=flow.integer("vocab_size", hi=1 << 20),
        input_size=width,
        output_size=mels,
        spk_embed_dim=flow.integer("spk_embed_dim", hi=1 << 14),
        input_frame_rate=tokens,
        sample_rate=rate,
        steps=10 if causal else 8,
        guidance=solver.number("inference_cfg_rate", hi=100.0, zero=True),
        encoder=encoder,
        estimator=estimator,
        pre_lookahead_len=ahead,
        hop=hop,
        ignored_keys=top.ignored(_UNUSED | {"spk_embed_dim"})
        + tuple(key for fields in (flow, decoder, solver) for key in fields.ignored(_UNUSED))
        + encoder_ignored
        + estimator_ignored,
    )


def _read_encoder(
    flow: Fields, causal: bool, width: int, ahead: int
) -> tuple[FlowEncoderConfig, tuple[str, ...]]:
    # The module tells how many frames a token becomes.
    strides = {
        "upsample_encoder_new_mel.UpsampleConformerEncoder": 1,
        "upsample_encoder.UpsampleConformerEncoder": 2,
    }
    kind, encoder = _object(flow, "encoder", *(strides if causal else ("encoder.ConformerEncoder",)))
    encoder.choice("input_size", (width,))
    size, heads = encoder.integer("output_size", hi=1 << 14), encoder.integer("attention_heads", hi=256)
    if size % heads or size % 2:
        raise encoder.fail("output_size", f"an even multiple of attention_heads ({heads})")
    for key, value in (
        ("normalize_before", True),
        ("input_layer", "linear"),
        ("pos_enc_layer_type", "rel_pos_espnet"),
        ("selfattention_layer_type", "rel_selfattn"),
        ("use_cnn_module", False),
        ("macaron_style", False),
    ):
        encoder.choice(key, (value,))
    encoder.choice("key_bias", (True,), True)
    if not causal:
        encoder.choice("static_chunk_size", (0,), 0)
    return FlowEncoderConfig(
        input_size=width,
        output_size=size,
        attention_heads=heads,
        linear_units=encoder.integer("linear_units", hi=1 << 16),
        num_blocks=encoder.integer("num_blocks", hi=256),
        norm_eps=1e-12 if causal else 1e-5,
        up_stride=strides.get(kind, 1),
        pre_lookahead_len=ahead,
        static_chunk_size=encoder.integer("static_chunk_size", hi=1 << 16) if causal else 50,
    ), encoder.ignored(_UNUSED)


def _read_estimator(decoder: Fields, causal: bool) -> tuple[FlowEstimatorConfig, tuple[str, ...]]:
    kind = "CausalConditionalDecoder" if causal else "ConditionalDecoder"
    _, estimator = _object(decoder, "estimator", kind)
    # The causal one has convolutions of stride 1 alone: one level.
    channels = _integers(estimator, "channels", 1 if causal else None, hi=1 << 14)
    if not causal and any(width % 8 for width in channels):
        raise estimator.fail("channels", "multiples of 8, the groups of a norm")
    estimator.choice("act_fn", ("gelu",))
    if causal:
        estimator.choice("num_decoding_left_chunks", (-1,), -1)
    return FlowEstimatorConfig(
        in_channels=estimator.choice("in_channels", (4 * MELS,)),
        out_channels=estimator.choice("out_channels", (MELS,)),
        channels=channels,
        attention_head_dim=estimator.integer("attention_head_dim", hi=1024),
        n_blocks=estimator.integer("n_blocks", hi=64),
        num_mid_blocks=estimator.integer("num_mid_blocks", hi=256),
        num_heads=estimator.integer("num_heads", hi=256),
        causal=causal,
        static_chunk_size=estimator.integer("static_chunk_size", hi=1 << 16) if causal else 50,
    ), estimator.ignored(_UNUSED)


def _read_vocoder(top: Fields, rate: int) -> VocoderConfig:
    _, hift = _object(top, "hift", "HiFTGenerator")
    _, f0 = _object(hift, "f0_predictor", "ConvRNNF0Predictor")
    f0.choice("num_class", (1,), 1)
    f0.choice("in_channels", (MELS,), MELS)
    istft = hift.required_section("istft_params")
    rates = _integers(hift, "upsample_rates", hi=64)
    stages = len(rates)
    kernels = _integers(hift, "upsample_kernel_sizes", stages, hi=256)
    if any(kernel < rate or (kernel - rate) % 2 for kernel, rate in zip(kernels, rates, strict=True)):
        raise hift.fail(
            "upsample_kernel_sizes", f"sizes that differ from upsample_rates {rates} by even numbers"
        )
    base = hift.integer("base_channels", hi=1 << 14)
    if base % 2**stages:
        raise hift.fail("base_channels", f"a multiple of {2**stages}: each of {stages} stages halves it")
    n_fft = istft.integer("n_fft", lo=2, hi=4096)
    if n_fft % 2:
        raise istft.fail("n_fft", "an even integer")
    blocks = _integers(hift, "resblock_kernel_sizes", hi=255, odd=True)
    return VocoderConfig(
        in_channels=hift.choice("in_channels", (MELS,)),
        base_channels=base,
        nb_harmonics=hift.integer("nb_harmonics", 8, lo=0, hi=64),
        sampling_rate=hift.choice("sampling_rate", (rate,)),
        nsf_alpha=hift.number("nsf_alpha", 0.1, zero=True, hi=10.0),
        nsf_sigma=hift.number("nsf_sigma", 0.003, zero=True, hi=10.0),
        nsf_voiced_threshold=hift.number("nsf_voiced_threshold", 10.0, zero=True, hi=1e5),
        upsample_rates=rates,
        upsample_kernel_sizes=kernels,
        n_fft=n_fft,
        hop_len=istft.integer("hop_len", hi=n_fft),
        resblock_kernel_sizes=blocks,
        resblock_dilation_sizes=_dilations(hift, "resblock_dilation_sizes", len(blocks)),
        source_resblock_kernel_sizes=_integers(
            hift, "source_resblock_kernel_sizes", stages, hi=255, odd=True
        ),
        source_resblock_dilation_sizes=_dilations(hift, "source_resblock_dilation_sizes", stages),
        lrelu_slope=hift.number("lrelu_slope", 0.1, zero=True, hi=1.0),
        audio_limit=hift.number("audio_limit", 0.99, hi=1e4),
        f0_channels=f0.integer("cond_channels", hi=1 << 14),
        ignored_keys=hift.ignored(_UNUSED) + istft.ignored(_UNUSED) + f0.ignored(_UNUSED),
    )
