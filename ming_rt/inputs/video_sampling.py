"""Which frames of a video are taken: the generations' rules for counts, rates and kinds of sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ming_rt.config import Generation
from ming_rt.errors import InvalidMediaError, InvalidRequestError, UnsupportedError, shown
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.source import number

Reader = Literal["decord", "torchvision"]  # the original's two decoders, which count frames differently

MIN_FRAMES = 4
MAX_FRAMES = 128
FPS = 2.0  # frames per second that a long video is thinned to
ADAPTIVE_FRAMES = 64  # beyond these, "adaptive" needs a model of its own
SAMPLES = ("sequence", "uniform", "random", "adaptive")


def frame_count(total: int, options: Mapping[str, Any]) -> int:
    """How many frames are taken from ``total``: an even number.

    Raises InvalidMediaError unless it lies in 2..total.
    """
    asked = number(options, "nframes")
    if asked is not None:
        n = 2 * round(asked / 2)
    else:
        low = 2 * math.ceil(number(options, "min_frames", MIN_FRAMES) / 2)
        high = 2 * math.floor(number(options, "max_frames", min(MAX_FRAMES, total)) / 2)
        n = max(min(total, high), low) // 2 * 2
    if not 2 <= n <= total:
        raise InvalidMediaError(f"video: {n} frames asked for, expected 2 to {total}, the usable frames")
    return n


def _usable_frames(
    generation: Generation, reader: Reader, total: int, fps: float, options: Mapping[str, Any]
) -> int:
    """The number of frames that the count is taken of: long videos are thinned to 2 per second."""
    if generation == "flash":
        rate = number(options, "max_video_fps", FPS)
        thin = fps > rate and total / fps > 4.0
    else:
        rate = FPS
        thin = reader == "decord" and (generation == "preview" or (fps > FPS and total / fps > 5.0))
    return int(total / fps * rate) if thin else total


def _uniform_edges(total: int, n: int) -> np.ndarray:
    return np.linspace(0, total, n + 1).astype(np.int64)


def _uniform(total: int, n: int) -> np.ndarray:
    edges = _uniform_edges(total, n)
    return (edges[:-1] + edges[1:] - 1) // 2


def pick_frames(kind: str, total: int, n: int, rng: random.Random | None = None) -> np.ndarray:
    """Indices int64 [n] of ``n`` out of ``total`` frames.

    Args:
        kind: "sequence" (ends included), "uniform" (middles of n intervals), "random" (one of each interval)
            or "adaptive" (as "uniform", up to 64 frames).
        rng: source of "random".

    Raises:
        InvalidRequestError: an unknown kind.
        InvalidMediaError: "random" with an empty interval.
        UnsupportedError: "adaptive" with more than 64 frames.
    """
    if kind == "sequence":
        return np.linspace(0, total - 1, n).astype(np.int64)
    if kind == "uniform":
        return _uniform(total, n)
    if kind == "adaptive":
        if n > ADAPTIVE_FRAMES:
            raise UnsupportedError(
                f"sample: adaptive takes at most {ADAPTIVE_FRAMES} frames, found {n}; use uniform"
            )
        return _uniform(total, n)
    if kind != "random":
        raise InvalidRequestError(f"sample: found {shown(kind)}, expected one of {', '.join(SAMPLES)}")
    edges = _uniform_edges(total, n)
    if (edges[1:] <= edges[:-1]).any():
        raise InvalidMediaError(f"video: found {total} frames, expected at least {n} to choose from")
    rng = rng or random.Random()
    return np.array([rng.randrange(a, b) for a, b in pairwise(edges.tolist())], np.int64)


def sample_frames(
    generation: Generation,
    total: int,
    fps: float,
    options: Mapping[str, Any],
    reader: Reader | None = None,
    rng: random.Random | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, float]:
    """Which frames of a video file are taken.

    Args:
        generation: the rules differ.
        total, fps: frames in the file and its frame rate.
        options: of the message element.
        reader: whose rule counts the frames; by default decord's, then torchvision's where that one fails.
        rng: source of ``sample="random"``.

    Returns:
        Indices int64 [n] into the file's frames (negative ones count from the end) and the frames per second
        that the clip then has.

    Raises:
        InvalidMediaError: too few or too many frames.
        InvalidRequestError: a malformed option.
        UnsupportedError: ``sample="adaptive"`` beyond 64 frames.
    """
    if reader is None:
        try:
            return sample_frames(generation, total, fps, options, "decord", rng, limits)
        except InvalidMediaError:
            return sample_frames(generation, total, fps, options, "torchvision", rng, limits)
    n = frame_count(_usable_frames(generation, reader, total, fps, options), options)
    if n > limits.max_video_frames:
        raise InvalidMediaError(f"video: {n} frames asked for, expected at most {limits.max_video_frames}")
    default = "uniform" if generation == "preview" and reader == "decord" else "sequence"
    kind = options.get("sample", default)
    if kind == "adaptive" and generation not in ("v1", "v1.5"):
        raise UnsupportedError(f"sample: {generation} has no adaptive sampling")
    return pick_frames(kind, total, n, rng), n / total * fps


def list_indices(total: int, generation: Generation, most: int) -> list[int]:
    """Frames of a list that the lite generations take; the last one is repeated to an even number."""
    indices = list(range(total))
    if generation == "preview":
        if total > most:
            indices = indices[:: total // most][:most]
        return indices + indices[-1:] * (len(indices) % 2)
    indices += indices[-1:] * (total % 2)
    if len(indices) > most:
        indices = [indices[i] for i in _uniform(len(indices), most)]
    return indices
