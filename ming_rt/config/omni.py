"""A checkpoint's whole configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_rt.config.audio import AudioConfig, SanmConfig, WhisperConfig, read_audio
from ming_rt.config.keys import UNUSED
from ming_rt.config.preprocessor import PreprocessorConfig
from ming_rt.config.thinker import Generation, ThinkerConfig
from ming_rt.config.vision import VisionConfig
from ming_rt.errors import ConfigError
from ming_rt.strict_json import REQUIRED, Fields, load_json


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
            ignored_keys=top.ignored(UNUSED) + tuple(key for part in parts for key in part.ignored_keys),
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
