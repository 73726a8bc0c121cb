"""Model configuration: frozen dataclasses read strictly from upstream config files.

Every key that changes the arithmetic is read with its type and range; a value this runtime cannot
reproduce is refused with a ``ConfigError`` naming the key, what was found and what is expected.
A key that is absent or null takes the default of the original configuration class. Keys that the
original code stores but never uses are listed in ``keys.UNUSED``; any other key is kept by name in
``ignored_keys`` (shown by ``ming-rt info``), because the original base class accepts arbitrary ones.
"""

from __future__ import annotations

from ming_rt.config.audio import AudioConfig, SanmConfig, WhisperConfig, read_audio
from ming_rt.config.omni import OmniConfig
from ming_rt.config.preprocessor import PreprocessorConfig
from ming_rt.config.rope import RopeConfig, RopeType
from ming_rt.config.speech import (
    FlowConfig,
    FlowEncoderConfig,
    FlowEstimatorConfig,
    SpeechConfig,
    TalkerConfig,
    VocoderConfig,
    read_detokenizer,
)
from ming_rt.config.thinker import GENERATIONS, Generation, ThinkerConfig
from ming_rt.config.vision import VisionConfig

__all__ = [
    "GENERATIONS",
    "AudioConfig",
    "FlowConfig",
    "FlowEncoderConfig",
    "FlowEstimatorConfig",
    "Generation",
    "OmniConfig",
    "PreprocessorConfig",
    "RopeConfig",
    "RopeType",
    "SanmConfig",
    "SpeechConfig",
    "TalkerConfig",
    "ThinkerConfig",
    "VisionConfig",
    "VocoderConfig",
    "WhisperConfig",
    "read_audio",
    "read_detokenizer",
]
