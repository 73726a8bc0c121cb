"""Placing media features in the token sequence, and which router (text, image, audio) serves each token.

Both work on one prompt without pads. The three families differ on purpose: preview routes whole index ranges,
v1 and v1.5 refuse an audio that is shorter than its placeholder, flash leaves the surplus as plain words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ming_rt.config import ThinkerConfig
from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.runtime.transfer import send

TEXT, IMAGE, AUDIO = 0, 1, 2  # router numbers, in the order the routers are stored


@dataclass(frozen=True)
class MediaEmbeds:
    """Features that replace word embeddings: ``feats[i]`` ``[R, H]`` goes to token ``rows[i]``, ascending."""

    rows: np.ndarray
    feats: torch.Tensor


def scatter(
    config: ThinkerConfig,
    input_ids: np.ndarray,
    images: torch.Tensor | None = None,
    videos: torch.Tensor | None = None,
    audios: Sequence[torch.Tensor] = (),
    audio_spans: np.ndarray | None = None,
) -> MediaEmbeds | None:
    """Matches features to placeholders.

    Args:
        config: patch token ids; the generation decides what a short audio means.
        input_ids: i64 ``[S]``.
        images, videos: unit-norm rows ``[n, H]``, one per merged patch, all items in prompt order.
        audios: rows ``[L_j, H]`` of each audio; more rows than placeholders are cut.
        audio_spans: i64 ``[m, 2]`` (first placeholder, length); a length of 0 ends the list.

    Returns:
        The embeddings to place, or None for a prompt without media.

    Raises:
        InvalidRequestError: counts do not match.
        UnsupportedError: images and videos share one placeholder id in this generation and both are given.
    """
    ids = np.asarray(input_ids)
    if images is not None and videos is not None and config.image_patch_token == config.video_patch_token:
        raise UnsupportedError(
            f"Ming {config.generation} cannot take images and videos in one prompt; send one kind"
        )
    rows: list[np.ndarray] = []
    feats: list[torch.Tensor] = []
    visual = (("image", images, config.image_patch_token), ("video", videos, config.video_patch_token))
    for kind, features, patch in visual:
        if features is None:
            continue
        found = np.flatnonzero(ids == patch)
        if len(found) != len(features):
            raise InvalidRequestError(
                f"{kind} placeholders: found {len(found)} tokens in the prompt, expected {len(features)}, "
                "one per feature row"
            )
        rows.append(found)
        feats.append(features)
    spans = _spans(audio_spans, len(ids))
    if len(spans) > len(audios):
        raise InvalidRequestError(f"found {len(audios)} audios, expected {len(spans)}, one per placeholder")
    for index, (start, length) in enumerate(spans):
        taken = audios[index][:length]
        if len(taken) < length and config.generation != "flash":
            raise InvalidRequestError(
                f"audio {index + 1}: found {len(taken)} feature rows, expected {length}, one per placeholder"
            )
        rows.append(np.arange(start, start + len(taken)))
        feats.append(taken)
    if not rows:
        return None
    where = np.concatenate(rows)
    order = np.argsort(where, kind="stable")
    if len(np.unique(where)) != len(where):
        raise InvalidRequestError("an audio placeholder overlaps visual placeholders of the prompt")
    found = torch.cat(feats)
    (ascending,) = send([order], found.device)
    return MediaEmbeds(where[order], found[ascending])


def router_modality(
    config: ThinkerConfig,
    input_ids: np.ndarray,
    has_vision: bool = False,
    audio_spans: np.ndarray | None = None,
) -> np.ndarray:
    """Router of each token: u8 ``[S]`` with ``TEXT``, ``IMAGE`` or ``AUDIO``.

    The whole placeholder of an audio is routed as audio, also where features were cut or missing. Generated
    tokens always take the text router.

    Raises:
        InvalidRequestError: image and audio claim the same token (preview: also an audio between two images).
    """
    ids = np.asarray(input_ids)
    spans = _spans(audio_spans, len(ids))
    audio = np.zeros(len(ids), dtype=bool)
    for start, length in spans:
        audio[start : start + length] = True
    vision = np.zeros(len(ids), dtype=bool)
    if has_vision or (config.generation == "flash" and len(spans)):
        vision |= ids == config.image_patch_token
        vision |= ids == config.video_patch_token
    if config.generation == "preview" and vision.any():
        first, last = np.flatnonzero(vision)[[0, -1]]
        vision[first : last + 1] = True  # words between two images belong to the range
    if (vision & audio).any():
        raise InvalidRequestError(
            "visual and audio tokens overlap; expected every audio before or after all images"
            if config.generation == "preview"
            else "an audio placeholder overlaps visual placeholders of the prompt"
        )
    return np.where(audio, AUDIO, np.where(vision, IMAGE, TEXT)).astype(np.uint8)


def _spans(audio_spans: np.ndarray | None, tokens: int) -> list[tuple[int, int]]:
    """The spans before the first empty one, checked against the prompt length."""
    spans: list[tuple[int, int]] = []
    for start, length in [] if audio_spans is None else np.asarray(audio_spans).tolist():
        if length <= 0:
            break
        if start < 0 or start + length > tokens:
            raise InvalidRequestError(
                f"audio placeholder (start {start}, length {length}) lies outside the {tokens} prompt tokens"
            )
        spans.append((start, length))
    return spans
