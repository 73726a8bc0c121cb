"""Caps on what one request may bring, checked before anything expensive is done with it."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields

from ming_rt.errors import InvalidRequestError, shown


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one request; every value is a positive number (``InvalidRequestError`` names others).

    The defaults admit everything the models can use and stop decompression bombs: an image, audio or video
    file is measured from its header before its pixels or samples are decoded.
    """

    max_image_pixels: int = 64 << 20  # width x height of one picture, before decoding
    max_audio_seconds: float = 300.0  # decoded length of one recording (the Whisper encoder ends at 300 s)
    max_video_frames: int = 768  # frames kept of one video
    max_video_seconds: float = 3600.0  # length of one video file
    max_base64_bytes: int = 64 << 20  # characters of one base64 data URL
    max_messages: int = 512  # messages of one conversation
    max_text_chars: int = 1_000_000  # characters of all texts of one conversation together
    max_media: int = 64  # pictures, recordings and videos of one conversation together

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            good = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not good or not 0 < value < math.inf:
                raise InvalidRequestError(f"{field.name}: expected a positive number, got {shown(value)}")


DEFAULT_LIMITS = Limits()
