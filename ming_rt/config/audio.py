"""audio_config and whisper_config: the audio encoders and their projectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ming_rt.config.keys import UNUSED
from ming_rt.config.thinker import Generation
from ming_rt.errors import ConfigError
from ming_rt.strict_json import Fields


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
        ignored_keys=outer.ignored(UNUSED) + inner.ignored(UNUSED),
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
        ignored_keys=audio.ignored(UNUSED) + encoder.ignored(UNUSED),
    )
