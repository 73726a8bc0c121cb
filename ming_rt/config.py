"""Model configuration: frozen dataclasses read strictly from upstream config files.

Every key that changes the arithmetic is read with its type and range; a value this runtime cannot
reproduce is refused with a ``ConfigError`` naming the key, what was found and what is expected.
A key that is absent or null takes the default of the original configuration class. Keys that the
original code stores but never uses are listed in ``_UNUSED``; any other key is kept by name in
``ignored_keys`` (shown by ``ming-rt info``), because the original base class accepts arbitrary ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ming_rt.errors import ConfigError
from ming_rt.strict_json import REQUIRED, Fields, load_json

Generation = Literal["preview", "v1", "v1.5", "flash"]
RopeType = Literal["plain", "linear", "dynamic", "yarn", "3D", "video_rope"]
GENERATIONS: tuple[Generation, ...] = get_args(Generation)

# Stored by upstream, without effect on inference (or, for flash, fixed in code whatever the file says).
_UNUSED_KEYS = """
    _attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embedding_dropout
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_act id2label in_chans initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length max_window_layers min_length model_type
    moe_router_topk_scaling_factor multi_gate no_repeat_ngram_size norm_head norm_softmax norm_topk_prob
    num_beam_groups num_beams num_return_sequences output_attentions output_dropout output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_dtype
    router_type sep_token_id sliding_window spatial_patch_size suppress_tokens talker_config
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class tokens_per_second top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache use_expert_bias use_qk_norm use_sliding_window
"""
_UNUSED = frozenset(_UNUSED_KEYS.split())

# Labels and values the original processors store or overwrite; none reaches the arithmetic.
_PREPROCESSOR_KEYS = """
    image_token video_token audio_token image_processor_type audio_processor_type feature_extractor_type
    processor_class chunk_length dither feature_size frame_length frame_shift inverse_norm lfr_m lfr_n
    n_samples num_audio_tokens sampling_rate up_sample return_attention_mask padding_side padding_value
"""
_PREPROCESSOR_UNUSED = frozenset(_PREPROCESSOR_KEYS.split())


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the thinker.

    ``type`` "plain" (rope_scaling null) rotates by one position; "3D" and "video_rope" take (t, h, w)
    positions and split the ``rotary_dim / 2`` frequencies into ``sections``. ``factor`` is 1.0 where unused.
    """

    type: RopeType
    theta: float
    rotary_dim: int
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def sections(self) -> tuple[int, int, int] | None:
        """Frequencies per axis (t, h, w); None for the one-dimensional types."""
        if self.type not in ("3D", "video_rope"):
            return None
        return (16, 24, 24) if self.rotary_dim == 128 else (8, 12, 12)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, arch: str | None = None) -> RopeConfig:
        """Reads rope_scaling, rope_theta, head_dim and partial_rotary_factor of an LLM config.

        ``arch`` "moe" or "moe_v2" decides which types exist; by default partial_rotary_factor tells.
        """
        fields = Fields(data, "")
        head_dim = fields.integer("head_dim", lo=2, hi=1024)
        arch = arch or ("moe_v2" if "partial_rotary_factor" in data else "moe")
        return _read_rope(fields, head_dim, arch)


def _read_rope(llm: Fields, head_dim: int, arch: str) -> RopeConfig:
    theta = llm.number("rope_theta", 10000.0, hi=1e12)
    max_positions = llm.integer("max_position_embeddings", 2048, hi=1 << 30)
    v2 = arch == "moe_v2"
    partial = llm.number("partial_rotary_factor", 0.5, hi=1.0) if v2 else 1.0
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise llm.fail("head_dim", f"an even number of rotated dims, not {head_dim} x {partial:g}")
    # The original code has constant sections: 64 frequencies (v1.5) or 32 (flash).
    fixed = 64 if v2 else 128
    scaling = llm.section("rope_scaling")
    if scaling is None:
        return RopeConfig("plain", theta, rotary_dim, max_position_embeddings=max_positions)
    allowed = ("video_rope", "3D") if v2 else ("linear", "dynamic", "yarn", "3D")
    # The original code reads "type"; newer library versions write the same value as "rope_type".
    also = scaling.choice("rope_type", allowed, None)
    kind = scaling.choice("type", allowed, also if also is not None else REQUIRED)
    if kind in ("3D", "video_rope"):
        if rotary_dim != fixed:
            raise ConfigError(
                f"rope_scaling type {kind!r}: found {rotary_dim} rotated dims (head_dim {head_dim} x "
                f"partial_rotary_factor {partial:g}), expected {fixed}"
            )
        return RopeConfig(kind, theta, rotary_dim, max_position_embeddings=max_positions)
    return RopeConfig(
        kind,
        theta,
        rotary_dim,
        factor=scaling.number("factor", hi=1e6),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=scaling.integer(
            "original_max_position_embeddings", 4096, hi=1 << 30
        ),
        beta_fast=scaling.number("beta_fast", 32.0, hi=1e6),
        beta_slow=scaling.number("beta_slow", 1.0, hi=1e6),
        mscale=scaling.number("mscale", 1.0, zero=True, hi=1e6),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, zero=True, hi=1e6),
    )


@dataclass(frozen=True)
class ThinkerConfig:
    """The language model: BailingMoe ("moe": preview, v1, v1.5) or BailingMoeV2 ("moe_v2": flash)."""

    arch: Literal["moe", "moe_v2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int | None  # dense MLP width, used by layers below first_k_dense_replace
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    use_qkv_bias: bool
    use_bias: bool
    use_qk_norm: bool
    rms_norm_eps: float
    norm_weight_in_fp32: bool  # True: round once after the weight (v1.5); False: round, then multiply
    rope: RopeConfig
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int
    norm_topk_prob: bool
    first_k_dense_replace: int
    multi_gate: bool  # three routers (text, image, audio) instead of one
    router: Literal["softmax", "grouped_sigmoid"]
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_head: bool
    image_patch_token: int
    video_patch_token: int
    image_start_token: int | None
    video_start_token: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    ignored_keys: tuple[str, ...] = ()

    @property
    def generation(self) -> Generation:
        """Which of the four generations has these settings."""
        if self.arch == "moe_v2":
            return "flash"
        if self.rope.type == "3D":
            return "v1.5"
        return "preview" if self.norm_head else "v1"

    @property
    def num_dense_layers(self) -> int:
        """First layers without experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ThinkerConfig:
        """Reads a whole config.json or its ``llm_config`` part. Raises ConfigError."""
        top = Fields(data, "")
        llm = top.required_section("llm_config") if "llm_config" in data else top
        v2 = _read_arch(llm) == "moe_v2"
        hidden = llm.integer("hidden_size")
        heads = llm.integer("num_attention_heads", hi=4096)
        kv_heads = llm.integer("num_key_value_heads", hi=4096)
        if heads % kv_heads:
            raise llm.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        head_dim = llm.integer("head_dim", None, lo=2, hi=1024)
        if head_dim is None:
            if hidden % heads:
                raise llm.fail("head_dim", f"a value (hidden_size {hidden} is no multiple of {heads} heads)")
            head_dim = hidden // heads
        llm.choice("hidden_act", ("silu",), "silu")
        llm.choice("tie_word_embeddings", (False,), False)
        llm.absent("quantization_config")
        vocab = llm.integer("vocab_size", hi=1 << 24)
        layers = llm.integer("num_hidden_layers", hi=1024)
        dense = llm.integer("first_k_dense_replace", 0, lo=0, hi=layers)
        experts = llm.integer("num_experts", lo=2, hi=4096)
        top_k = llm.integer("num_experts_per_tok", hi=min(experts, 64))
        groups = llm.integer("n_group", 8, hi=experts) if v2 else 1
        top_groups = llm.integer("topk_group", min(4, groups), hi=groups) if v2 else 1
        if v2 and (experts % groups or experts // groups < 2):
            raise llm.fail("n_group", f"a divisor of num_experts ({experts}), two experts or more a group")
        if v2 and top_k > experts // groups * top_groups:
            raise llm.fail(
                "num_experts_per_tok", f"at most {experts // groups * top_groups} (topk_group groups)"
            )
        if v2:
            multi_gate = llm.choice("router_type", ("MultiRouter", "topN"), "topN") == "MultiRouter"
        else:
            multi_gate = llm.flag("multi_gate", False)

        def token(key: str, default: Any = None) -> Any:
            return llm.integer(key, default, lo=0, hi=vocab - 1)

        rope = _read_rope(llm, head_dim, "moe_v2" if v2 else "moe")
        start = REQUIRED if rope.sections else None  # the three-axis positions look for these tokens
        image_patch = token("image_patch_token", REQUIRED if v2 or vocab <= 126346 else 126346)
        return cls(
            arch="moe_v2" if v2 else "moe",
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=llm.integer("intermediate_size", REQUIRED if dense else None),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            use_qkv_bias=llm.flag("use_qkv_bias", False),
            use_bias=llm.flag("use_bias", True),
            use_qk_norm=v2,
            rms_norm_eps=llm.number("rms_norm_eps", 1e-5, hi=0.1),
            norm_weight_in_fp32=not v2 and rope.type == "3D",
            rope=rope,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=llm.integer("moe_intermediate_size"),
            num_shared_experts=llm.integer("num_shared_experts", 0, lo=0, hi=64),
            norm_topk_prob=v2 or llm.flag("norm_topk_prob", True),
            first_k_dense_replace=dense,
            multi_gate=multi_gate,
            router="grouped_sigmoid" if v2 else "softmax",
            n_group=groups,
            topk_group=top_groups,
            routed_scaling_factor=llm.number("routed_scaling_factor", 2.5, hi=1e4) if v2 else 1.0,
            norm_head=not v2 and llm.flag("norm_head", False),
            image_patch_token=image_patch,
            video_patch_token=token("video_patch_token", REQUIRED) if v2 else image_patch,
            image_start_token=token("image_start_token", start),
            video_start_token=token("video_start_token", start),
            eos_token_id=token("eos_token_id"),
            pad_token_id=token("pad_token_id"),
            ignored_keys=llm.ignored(_UNUSED),
        )


def _read_arch(llm: Fields) -> Literal["moe", "moe_v2"]:
    kind = llm.choice("model_type", ("bailing_moe", "bailing_moe_v2"), None)
    if kind is None:
        names = llm.data.get("architectures")
        kind = "bailing_moe_v2" if names == ["BailingMoeV2ForCausalLM"] else None
        if kind is None and names != ["BailingMoeForCausalLM"]:
            raise llm.fail("model_type", "'bailing_moe' or 'bailing_moe_v2'")
    return "moe_v2" if kind == "bailing_moe_v2" else "moe"


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2.5-type vision tower (tensors ``vision.*``); RMSNorm eps is 1e-6 throughout."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    rms_norm_eps: float = 1e-6
    norm_weight_in_fp32: bool = False  # flash rounds once after the weight
    ignored_keys: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values per patch row: channels x time x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Reads a whole config.json or its ``vision_config`` part. Raises ConfigError."""
        top = Fields(data, "")
        flash = _is_flash(data)
        vision = top.required_section("vision_config") if "vision_config" in data else top
        hidden, heads = vision.integer("hidden_size"), vision.integer("num_heads", hi=1024)
        if hidden % (4 * heads):
            raise vision.fail("num_heads", f"hidden_size {hidden} / num_heads to be a multiple of 4")
        vision.choice("hidden_act", ("silu",), "silu")
        depth = vision.integer("depth", hi=1024)
        full = vision.get("fullatt_block_indexes", REQUIRED, "a list of block indices")
        if not isinstance(full, (list, tuple)) or not all(type(i) is int and 0 <= i < depth for i in full):
            raise vision.fail("fullatt_block_indexes", f"a list of block indices below depth ({depth})")
        # The patch geometry is shared with the image front end and the size rules, which are fixed in code.
        patch, merge = vision.choice("patch_size", (14,)), vision.choice("spatial_merge_size", (2,))
        window = vision.integer("window_size", hi=1 << 14)
        if window % (patch * merge):
            raise vision.fail("window_size", f"a multiple of {patch * merge} (patch x merge size)")
        return cls(
            depth=depth,
            hidden_size=hidden,
            num_heads=heads,
            intermediate_size=vision.integer("intermediate_size"),
            in_channels=vision.choice("in_channels", (3,), 3),
            patch_size=patch,
            temporal_patch_size=vision.choice("temporal_patch_size", (2,)),
            spatial_merge_size=merge,
            window_size=window,
            fullatt_block_indexes=tuple(sorted(set(full))),
            out_hidden_size=vision.integer("out_hidden_size"),
            norm_weight_in_fp32=flash,
            ignored_keys=vision.ignored(_UNUSED),
        )


@dataclass(frozen=True)
class WhisperConfig:
    """A Whisper encoder and its projector; ``prefix`` and ``proj_prefix`` name their tensors."""

    prefix: str
    proj_prefix: str
    n_mels: int
    n_ctx: int
    n_state: int
    n_head: int
    n_layer: int
    ds_kernel_size: int
    ds_stride: int
    norm_query_embeds: bool
    ignored_keys: tuple[str, ...] = ()

    @property
    def output_size(self) -> int:
        """Width of the encoder's output."""
        return self.n_state

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WhisperConfig:
        """Reads the Whisper encoder of a whole config.json. Raises ConfigError where there is none."""
        found = read_audio(data).get("whisper")
        if not isinstance(found, cls):
            raise ConfigError("audio_config: found no Whisper encoder, expected whisper_encoder_config")
        return found


@dataclass(frozen=True)
class SanmConfig:
    """A SANM encoder (tensors ``audio.*``) and its projector (``linear_proj_audio.*``)."""

    prefix: str
    proj_prefix: str
    input_size: int
    output_size: int
    attention_heads: int
    linear_units: int
    num_blocks: int
    kernel_size: int
    ds_kernel_size: int
    ds_stride: int
    norm_query_embeds: bool
    layer_norm_eps: float = 1e-12
    ignored_keys: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SanmConfig:
        """Reads the SANM encoder of a whole config.json. Raises ConfigError where there is none."""
        found = read_audio(data).get("sanm")
        if not isinstance(found, cls):
            raise ConfigError("audio_config: found no SANM encoder, expected audio_encoder_config_sanm")
        return found


AudioConfig = WhisperConfig | SanmConfig


def read_audio(data: Mapping[str, Any], generation: Generation | None = None) -> dict[str, AudioConfig]:
    """The audio encoders ("sanm", "whisper") of a whole config.json, as the generation uses them.

    preview has SANM, v1 both, v1.5 and flash Whisper under the prefix ``audio.``. The published v1.5
    config still has v1's layout, SANM keys in audio_config next to whisper_config: there Whisper is meant.
    """
    top = Fields(data, "")
    audio = top.section("audio_config")
    if audio is None:
        return {}
    norm = audio.flag("norm_query_embeds", True)
    inner = audio.section("whisper_encoder_config")
    if inner is not None:
        return {"whisper": _read_whisper(audio, inner, "audio", "linear_proj_audio", norm)}
    whisper = top.section("whisper_config")
    if generation in ("v1.5", "flash"):
        whisper = whisper or top.required_section("whisper_config")
        inner = whisper.required_section("whisper_encoder_config")
        return {"whisper": _read_whisper(whisper, inner, "audio", "linear_proj_audio", norm)}
    found: dict[str, AudioConfig] = {"sanm": _read_sanm(audio, norm)}
    if whisper is not None and generation != "preview":
        norm = whisper.flag("norm_query_embeds", norm)
        inner = whisper.required_section("whisper_encoder_config")
        found["whisper"] = _read_whisper(whisper, inner, "whisper_encoder", "linear_proj_whisper", norm)
    return found


def _read_projector(fields: Fields) -> dict[str, int]:
    fields.choice("ds_conv_type", ("conv",), "conv")
    kernel = fields.integer("ds_kernel_size", hi=31)
    if kernel % 2 == 0:
        raise fields.fail("ds_kernel_size", "an odd integer")
    return {"ds_kernel_size": kernel, "ds_stride": fields.integer("ds_stride", hi=64)}


def _read_whisper(outer: Fields, inner: Fields, prefix: str, proj: str, norm: bool) -> WhisperConfig:
    state, heads = inner.integer("n_state", hi=1 << 16), inner.integer("n_head", hi=1024)
    if state % (2 * heads):
        raise inner.fail("n_head", f"a divisor of n_state ({state}) with an even quotient")
    projector = _read_projector(outer)
    return WhisperConfig(
        prefix=prefix,
        proj_prefix=proj,
        n_mels=inner.choice("n_mels", (80, 128)),
        n_ctx=inner.integer("n_ctx", hi=1 << 20),
        n_state=state,
        n_head=heads,
        n_layer=inner.integer("n_layer", hi=1024),
        norm_query_embeds=norm,
        ignored_keys=outer.ignored(_UNUSED) + inner.ignored(_UNUSED),
        **projector,
    )


def _read_sanm(audio: Fields, norm: bool) -> SanmConfig:
    encoder = audio.required_section("audio_encoder_config_sanm")
    size, heads = encoder.integer("output_size", hi=1 << 16), encoder.integer("attention_heads", hi=1024)
    if size % heads:
        raise encoder.fail("attention_heads", f"a divisor of output_size ({size})")
    encoder.choice("input_layer", ("pe",), "pe")
    encoder.choice("selfattention_layer_type", ("sanm",), "sanm")
    encoder.choice("pos_enc_class", ("SinusoidalPositionEncoder",), "SinusoidalPositionEncoder")
    encoder.choice("normalize_before", (True,), True)
    encoder.choice("sanm_shfit", (0,), 0)  # upstream's spelling
    for key in ("attention_dropout_rate", "dropout_rate", "positional_dropout_rate"):
        encoder.number(key, 0.0, zero=True, hi=1.0)
    kernel = encoder.integer("kernel_size", hi=255)
    if kernel % 2 == 0:
        raise encoder.fail("kernel_size", "an odd integer")
    if audio.integer("audio_encoder_output_size", size) != size:
        raise audio.fail("audio_encoder_output_size", f"the encoder's output_size ({size})")
    audio.section("audio_wav_frontend_config_sanm")  # the front end follows preprocessor_config.json
    input_size = encoder.integer("input_size", hi=1 << 16)
    if input_size % 2:
        raise encoder.fail("input_size", "an even integer")
    return SanmConfig(
        prefix="audio",
        proj_prefix="linear_proj_audio",
        input_size=input_size,
        output_size=size,
        attention_heads=heads,
        linear_units=encoder.integer("linear_units", hi=1 << 18),
        num_blocks=encoder.integer("num_blocks", hi=1024),
        kernel_size=kernel,
        norm_query_embeds=norm,
        **_read_projector(audio),
        ignored_keys=audio.ignored(_UNUSED) + encoder.ignored(_UNUSED),
    )


@dataclass(frozen=True)
class PreprocessorConfig:
    """preprocessor_config.json: pixel limits and normalisation, audio front-end parameters."""

    min_pixels: int = 78400
    max_pixels: int = 802816
    min_pixels_video: int = 100352
    max_pixels_video: int = 602112
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    cmvn_file: str = "am.mvn"
    fbank_mels: int = 80
    lfr_m: int = 7
    lfr_n: int = 6
    whisper_mels: int = 128
    ignored_keys: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], generation: Generation = "v1.5") -> PreprocessorConfig:
        """Reads the file's object; absent keys take the shipped values. Raises ConfigError."""
        top = Fields(data, "")
        low = top.integer("min_pixels", cls.min_pixels, lo=784, hi=1 << 28)
        high = top.integer("max_pixels", 2007040 if generation == "flash" else cls.max_pixels, hi=1 << 28)
        video_low = top.integer("min_pixels_video", cls.min_pixels_video, lo=784, hi=1 << 28)
        video_high = top.integer("max_pixels_video", cls.max_pixels_video, hi=1 << 28)
        for key, lower, upper in (("max_pixels", low, high), ("max_pixels_video", video_low, video_high)):
            if upper < lower:
                raise top.fail(key, f"at least the minimum ({lower})")
        std = top.numbers("image_std", 3, cls.image_std, lo=1e-6, hi=1e3)
        wav = top.section("wav_frontend_args") or Fields({}, "wav_frontend_args")
        cmvn = wav.get("cmvn_file", cls.cmvn_file, "a file name")
        if (
            not isinstance(cmvn, str)
            or not 0 < len(cmvn) <= 255
            or PurePosixPath(cmvn).name != cmvn
            or cmvn == ".."
        ):
            raise wav.fail("cmvn_file", "the name of a file in the checkpoint directory")
        # The fbank front end is fixed to the one parameter set all checkpoints ship.
        for key, value in (("fs", 16000), ("window", "hamming"), ("frame_length", 25), ("frame_shift", 10)):
            wav.choice(key, (value,), value)
        mel = top.section("whisper_frontend_args") or Fields({}, "whisper_frontend_args")
        return cls(
            min_pixels=low,
            max_pixels=high,
            min_pixels_video=video_low,
            max_pixels_video=video_high,
            patch_size=top.choice("patch_size", (14,), 14),
            temporal_patch_size=top.choice("temporal_patch_size", (2,), 2),
            merge_size=top.choice("merge_size", (2,), 2),
            image_mean=top.numbers("image_mean", 3, cls.image_mean, lo=-1e3, hi=1e3),
            image_std=std,
            cmvn_file=cmvn,
            fbank_mels=wav.choice("n_mels", (80,), 80),
            lfr_m=wav.choice("lfr_m", (7,), 7),
            lfr_n=wav.choice("lfr_n", (6,), 6),
            whisper_mels=mel.choice("n_mels", (80, 128), 128),
            ignored_keys=top.ignored(_PREPROCESSOR_UNUSED) + wav.ignored() + mel.ignored(),
        )


def _is_flash(data: Mapping[str, Any]) -> bool:
    """Whether a whole config.json is flash's; False for a part of one."""
    llm = data.get("llm_config")
    return data.get("model_type") == "bailingmm_moe_v2_lite" or (
        isinstance(llm, Mapping) and llm.get("model_type") == "bailing_moe_v2"
    )


@dataclass(frozen=True)
class OmniConfig:
    """One checkpoint's whole configuration; parts the checkpoint does not have are None or absent."""

    generation: Generation
    thinker: ThinkerConfig
    vision: VisionConfig | None
    audio: dict[str, AudioConfig]
    mlp_depth: int  # linear layers of each projector
    preprocessor: PreprocessorConfig
    ignored_keys: tuple[str, ...] = ()

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> OmniConfig:
        """Reads config.json (and preprocessor_config.json) given as objects. Raises ConfigError."""
        top = Fields(config, "")
        kind = top.choice("model_type", ("bailingmm", "bailingmm_moe_v2_lite"), None)
        top.required_section("llm_config")
        top.absent("quantization_config")
        thinker = ThinkerConfig.from_dict(config)
        generation = thinker.generation
        if kind is not None and (kind == "bailingmm_moe_v2_lite") != (generation == "flash"):
            raise top.fail("model_type", f"the type that goes with arch {thinker.arch!r}")
        vision = VisionConfig.from_dict(config) if top.section("vision_config") is not None else None
        audio = read_audio(config, generation)
        for key in ("audio_config", "whisper_config"):  # already read
            top.section(key)
        pre = PreprocessorConfig.from_dict(preprocessor or {}, generation)
        whisper, sanm = audio.get("whisper"), audio.get("sanm")
        if isinstance(whisper, WhisperConfig) and whisper.n_mels != pre.whisper_mels:
            raise ConfigError(
                f"whisper_encoder_config.n_mels: found {whisper.n_mels}, "
                f"expected the front end's {pre.whisper_mels}"
            )
        if isinstance(sanm, SanmConfig) and sanm.input_size != pre.fbank_mels * pre.lfr_m:
            raise ConfigError(
                f"audio_encoder_config_sanm.input_size: found {sanm.input_size}, expected the front end's "
                f"{pre.fbank_mels} mels x {pre.lfr_m} frames"
            )
        parts = (thinker, pre, *([vision] if vision else []), *audio.values())
        return cls(
            generation=generation,
            thinker=thinker,
            vision=vision,
            audio=audio,
            mlp_depth=top.integer("mlp_depth", REQUIRED if vision or audio else 1, hi=8),
            preprocessor=pre,
            ignored_keys=top.ignored(_UNUSED) + tuple(key for part in parts for key in part.ignored_keys),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> OmniConfig:
        """Reads a checkpoint directory's config.json and, where present, preprocessor_config.json."""
        directory = Path(directory)
        if not directory.is_dir():
            raise ConfigError(f"{directory}: not a directory, expected a checkpoint")
        config = load_json(directory / "config.json")
        if not isinstance(config, dict) or "llm_config" not in config:
            raise ConfigError(
                f"{directory}/config.json: no llm_config, expected a Ming omni-modal checkpoint"
            )
        preprocessor = directory / "preprocessor_config.json"
        return cls.from_dict(config, load_json(preprocessor) if preprocessor.exists() else None)
