"""preprocessor_config.json: the picture, video and audio front ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ming_rt.config.thinker import Generation
from ming_rt.strict_json import Fields

# Labels and values the original processors store or overwrite; none reaches the arithmetic.
_UNUSED_KEYS = """
    image_token video_token audio_token image_processor_type audio_processor_type feature_extractor_type
    processor_class chunk_length dither feature_size frame_length frame_shift inverse_norm lfr_m lfr_n
    n_samples num_audio_tokens sampling_rate up_sample return_attention_mask padding_side padding_value
"""
_UNUSED = frozenset(_UNUSED_KEYS.split())


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
            ignored_keys=top.ignored(_UNUSED) + wav.ignored() + mel.ignored(),
        )
