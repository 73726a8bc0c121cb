"""Videos: decoding, the size of the frames, and the patches of the vision tower."""

from __future__ import annotations

import io
import math
import numbers
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ming_rt.config import Generation, PreprocessorConfig
from ming_rt.errors import InvalidMediaError, InvalidRequestError, shown
from ming_rt.inputs import image
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.source import as_numpy, check_options, integer, number, resolve
from ming_rt.inputs.video_sampling import (
    MAX_FRAMES,
    SAMPLES,
    Reader,
    frame_count,
    list_indices,
    pick_frames,
    sample_frames,
)
from ming_rt.ops import image as ops

MIN_PIXELS = 100352
MAX_PIXELS = 602112  # of one frame, lite generations
TOTAL_PIXELS = 7225344
TOTAL_PIXELS_FLASH = 9633792
OPTIONS = frozenset(
    {
        *("sample", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"),
        *("resized_height", "resized_width", "video_start", "video_end"),
    }
)
# What may be opened: no playlists, and nothing that names other files or addresses.
_CONTAINERS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,asf,mpeg,mpegts,flv,ogg",
    "protocol_whitelist": "file",
}
_MAX_FPS = 1000.0


@dataclass(frozen=True)
class Clip:
    """A video after the first stage."""

    frames: Tensor  # [n, h, w, 3] uint8, or float32 (0..255) for flash's frame lists
    indices: np.ndarray  # which frames of the source were taken
    sample_fps: float | None  # frames per second of the clip; None for a list of frames


def clip_size(
    generation: Generation, height: int, width: int, n: int, options: Mapping[str, Any], limits: Limits
) -> tuple[int, int]:
    """Size of ``n`` frames after the first stage.

    Raises InvalidMediaError for unusable sizes or a clip beyond the limits.
    """
    asked = integer(options, "resized_height"), integer(options, "resized_width")
    low, high = number(options, "min_pixels", MIN_PIXELS), number(options, "max_pixels")
    flash = generation == "flash"
    share = number(options, "total_pixels", TOTAL_PIXELS_FLASH if flash else TOTAL_PIXELS) / n * 2
    if None not in asked:
        size = image.fetch_size(*asked)
    else:
        most = max(share if flash else min(MAX_PIXELS, share), int(low * 1.05))
        if high is not None and not flash:  # flash ignores the element's max_pixels
            most = min(high, most)
        size = image.fetch_size(height, width, low, most)
    _check_clip(*size, n, limits)
    return size


def _check_clip(height: int, width: int, n: int, limits: Limits) -> None:
    """Two frames make one row of patches, so a clip may have twice as many pixels as a picture."""
    image.check_pixels(height, width, limits, frames=-(-n // 2))


def fetch_video(
    obj: object,
    generation: Generation,
    options: Mapping[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    reader: Reader | None = None,
    rng: random.Random | None = None,
) -> Clip:
    """First stage: take frames and resize them to multiples of 28; see ``preprocess_video``.

    Args:
        reader, rng: see ``sample_frames``.
    """
    options = options or {}
    check_options(options, OPTIONS | {"max_video_fps"} if generation == "flash" else OPTIONS, "video")
    _check_values(options)
    obj = as_numpy(obj, "video")
    if isinstance(obj, tuple) and len(obj) == 2 and isinstance(obj[1], numbers.Real):
        frames, fps = as_numpy(obj[0], "video"), obj[1]
        return _fetch_decoded(frames, fps, generation, options, limits, reader, rng)
    if isinstance(obj, (list, tuple, np.ndarray)):
        return _fetch_list(obj, generation, options, limits, rng)
    source = resolve(obj, "video", limits)
    if source is None:
        raise InvalidMediaError(
            f"video: found {type(obj).__name__}, expected a path, bytes, data URL, list of frames or array"
        )
    if isinstance(source, Path) and source.is_dir():
        names = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
        return _fetch_list(names, generation, options, limits, rng)
    return _fetch_file(source, generation, options, limits, reader, rng)


def _check_values(options: Mapping[str, Any]) -> None:
    """Every option is checked, also those that the kind of input does not use."""
    for key, value in options.items():
        if key == "sample":
            if not isinstance(value, str) or value not in SAMPLES:
                raise InvalidRequestError(
                    f"sample: found {shown(value)}, expected one of {', '.join(SAMPLES)}"
                )
        elif key != "video_start" or not (isinstance(value, (int, float)) and value == 0):
            number(options, key)


def preprocess_video(
    obj: object,
    generation: Generation,
    config: PreprocessorConfig,
    options: Mapping[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    reader: Reader | None = None,
    rng: random.Random | None = None,
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Both stages: take frames and resize them, then fit the processor's limits, normalise, cut into patches.

    Args:
        obj: a video file (path, ``file://`` URL, bytes, ``data:video/...;base64,`` URL), a pair (frames, fps)
            of decoded frames uint8 [T, H, W, 3], or a list of frames: a directory of pictures in the order of
            their names, a sequence of anything ``load_image`` takes, or uint8 [T, H, W, 3].
        generation: rules for frames and sizes.
        config: pixel limits and normalisation.
        options: ``sample``, ``nframes``, ``min_frames``, ``max_frames``, ``min_pixels``, ``max_pixels``,
            ``total_pixels``, ``resized_height`` with ``resized_width``; ``video_start`` and ``video_end`` in
            seconds (files only; frames are then counted as the torchvision reader does); flash:
            ``max_video_fps``.
        limits: length and size are compared before anything is decoded.
        reader, rng: see ``sample_frames``.

    Returns:
        Patch rows float32 [t*h*w, 1176] and the grid (t, h, w) in patches.

    Raises:
        InvalidRequestError: a malformed or unknown option.
        InvalidMediaError: a video that cannot be used.
        UnsupportedError: an http(s) URL, or ``sample="adaptive"`` beyond 64 frames.
    """
    frames = fetch_video(obj, generation, options, limits, reader=reader, rng=rng).frames
    if len(frames) > 1 and len(frames) % 2:
        raise InvalidMediaError(f"video: found {len(frames)} frames, expected an even number")
    if generation != "flash":
        height, width = frames.shape[1:3]
        size = image.processor_size(height, width, config.min_pixels_video, config.max_pixels_video)
        _check_clip(*size, len(frames), limits)
        if size != (height, width):
            frames = torch.stack([ops.resize_u8(frame, *size) for frame in frames])
    rows, grid = ops.patchify(frames, config.image_mean, config.image_std)
    return rows.numpy(), grid


def _resize(frames: Tensor, generation: Generation, size: tuple[int, int]) -> Tensor:
    """Decoded frames to the clip's size, rounded to uint8."""
    kind = "bilinear" if generation == "flash" else "bicubic"
    return ops.resize_frames(frames, *size, kind, to_uint8=True)


def _window(times: Sequence[float], options: Mapping[str, Any]) -> np.ndarray | None:
    """Frames between video_start and video_end, and the one shown at the start; None without them."""
    if not {"video_start", "video_end"} & options.keys():
        return None
    # 0 is a valid start, so it is shifted past the check for positive numbers.
    start = 0.0 if options.get("video_start") == 0 else number(options, "video_start", 0.0)
    end = number(options, "video_end", math.inf)
    stamps = np.array(times)
    kept = np.flatnonzero((stamps >= start) & (stamps <= end))
    before = np.flatnonzero(stamps < start)
    if len(before) and not (stamps == start).any():
        kept = np.concatenate([before[-1:], kept])
    if not len(kept):
        raise InvalidMediaError(f"video: no frames between {start:g} and {end:g} s")
    return kept


def _choose(
    times: Sequence[float],
    fps: float,
    generation: Generation,
    options: Mapping[str, Any],
    limits: Limits,
    reader: Reader | None,
    rng: random.Random | None,
) -> tuple[np.ndarray, float]:
    """Indices of the frames to take, all from 0 on, and their rate."""
    kept = _window(times, options)
    if kept is not None:
        reader = "torchvision"  # the only one of the two that knows the window
    total = len(times) if kept is None else len(kept)
    indices, sample_fps = sample_frames(generation, total, fps, options, reader, rng, limits)
    indices = indices % total
    return (indices if kept is None else kept[indices]), sample_fps


def _check_rate(fps: float, total: int, limits: Limits) -> None:
    if not 0 < fps <= _MAX_FPS:
        raise InvalidMediaError(
            f"video: found {shown(fps)} frames per second, expected more than 0, at most {_MAX_FPS:g}"
        )
    if total == 0:
        raise InvalidMediaError("video: found no frames")
    if total / fps > limits.max_video_seconds:
        raise InvalidMediaError(
            f"video: found {total / fps:.6g} s, expected at most {limits.max_video_seconds:g} s"
        )


def _fetch_decoded(
    frames: np.ndarray,
    fps: float,
    generation: Generation,
    options: Mapping[str, Any],
    limits: Limits,
    reader: Reader | None,
    rng: random.Random | None,
) -> Clip:
    _check_frames_array(frames)
    image.check_pixels(*frames.shape[1:3], limits)
    _check_rate(fps, len(frames), limits)
    fps = float(fps)
    times = np.arange(len(frames)) / fps
    indices, sample_fps = _choose(times, fps, generation, options, limits, reader, rng)
    size = clip_size(generation, *frames.shape[1:3], len(indices), options, limits)
    taken = torch.from_numpy(np.ascontiguousarray(frames[indices]))
    return Clip(_resize(taken, generation, size), indices, sample_fps)


def _check_frames_array(frames: object) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
        found = (
            f"{frames.dtype} {list(frames.shape)}"
            if isinstance(frames, np.ndarray)
            else type(frames).__name__
        )
        raise InvalidMediaError(f"video: found {found}, expected uint8 frames [T, H, W, 3]")


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every failure inside becomes an InvalidMediaError."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source.resolve())
        with av.open(file, options=dict(_CONTAINERS), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InvalidMediaError("video: the file has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InvalidMediaError("video: the video stream is damaged or of an unknown codec")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise InvalidMediaError("video: malformed or truncated file, or of an unsupported format") from error


def _declared_seconds(container: Any, stream: Any, found: int) -> float:
    """Length of the video that the header promises; 0 where it makes no promise about this stream."""
    if stream.frames > found and stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.format.name == "matroska,webm"
    return container.duration / av.time_base if alone and container.duration else 0.0


def _frame_times(source: Path | bytes, limits: Limits) -> tuple[list[float], float]:
    """Presentation times in seconds of all frames, ascending, and the frame rate; nothing is decoded."""
    with _opened(source) as (container, stream):
        image.check_pixels(stream.codec_context.height, stream.codec_context.width, limits)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        _check_rate(fps, max(stream.frames, 1), limits)
        most = limits.max_video_seconds * fps
        unit = stream.time_base
        stamps, end = [], 0.0
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise InvalidMediaError("video: truncated file")
            stamp = packet.pts if packet.pts is not None else packet.dts
            stamps.append(len(stamps) / fps if stamp is None else float(stamp * unit))
            end = max(end, stamps[-1] + float((packet.duration or 0) * unit))
            if len(stamps) > most:
                break
        _check_rate(fps, len(stamps), limits)
        missing = _declared_seconds(container, stream, len(stamps)) - (end - min(stamps))
        if missing > 2.5 / fps:
            raise InvalidMediaError(f"video: truncated file, the last {missing:.2f} s are missing")
    return sorted(stamps), fps


def _fetch_file(
    source: Path | bytes,
    generation: Generation,
    options: Mapping[str, Any],
    limits: Limits,
    reader: Reader | None,
    rng: random.Random | None,
) -> Clip:
    """Decodes once from the start, keeps the frames that were chosen, and stops after the last of them."""
    times, fps = _frame_times(source, limits)
    indices, sample_fps = _choose(times, fps, generation, options, limits, reader, rng)
    wanted, last = set(indices.tolist()), int(indices.max())
    taken: dict[int, Tensor] = {}
    size = shape = None
    with _opened(source) as (container, stream):
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                if size is None:
                    shape = frame.height, frame.width
                    image.check_pixels(*shape, limits)
                    size = clip_size(generation, *shape, len(indices), options, limits)
                if (frame.height, frame.width) != shape:
                    raise InvalidMediaError("video: the frame size changes inside the file")
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                taken[i] = _resize(pixels[None], generation, size)[0]
            if i >= last:
                break
    if len(taken) < len(wanted):
        raise InvalidMediaError(
            f"video: truncated file, frame {last} of {len(times)} expected, fewer decoded"
        )
    return Clip(torch.stack([taken[i] for i in indices.tolist()]), indices, sample_fps)


def _fetch_list(
    frames: Sequence[object] | np.ndarray,
    generation: Generation,
    options: Mapping[str, Any],
    limits: Limits,
    rng: random.Random | None,
) -> Clip:
    if isinstance(frames, np.ndarray):
        _check_frames_array(frames)
    if {"video_start", "video_end"} & options.keys():
        raise InvalidRequestError("video_start, video_end: a list of frames has no times")
    if len(frames) < 1:
        raise InvalidMediaError("video: found no frames")
    if generation == "flash":
        return _fetch_list_flash(frames, options, limits, rng)
    indices = list_indices(len(frames), generation, integer(options, "max_frames", MAX_FRAMES))
    if len(indices) > limits.max_video_frames:
        raise InvalidMediaError(
            f"video: found {len(indices)} frames, expected at most {limits.max_video_frames}"
        )
    one = {key: options[key] for key in image.OPTIONS & options.keys()}
    size = image.fetch_target(*image.image_size(frames[indices[0]], limits), one, limits)
    _check_clip(*size, len(indices), limits)
    # As in the original, the first frame decides the size of all.
    pictures = {
        i: ops.resize_u8(torch.from_numpy(image.fetch_image(frames[i], one, limits)), *size)
        for i in dict.fromkeys(indices)
    }
    return Clip(torch.stack([pictures[i] for i in indices]), np.array(indices, np.int64), None)


def _fetch_list_flash(
    frames: Sequence[object] | np.ndarray,
    options: Mapping[str, Any],
    limits: Limits,
    rng: random.Random | None,
) -> Clip:
    """As in the original, all frames are used; the number to sample only sets the size of each.

    Frames of another shape than most of the sampled ones are resized to that one first.
    """
    total = len(frames)
    if total % 2:
        raise InvalidMediaError(f"video: found {total} frames, expected an even number of at least 2")
    if total > limits.max_video_frames:
        raise InvalidMediaError(f"video: found {total} frames, expected at most {limits.max_video_frames}")
    n = frame_count(total, options)
    sampled = pick_frames(options.get("sample", "sequence"), total, n, rng)
    sizes = [image.image_size(frame, limits) for frame in frames]
    size = clip_size("flash", *sizes[1], n, options, limits)
    _check_clip(*size, total, limits)
    common = Counter(sizes[i] for i in sampled).most_common(1)[0][0]
    resized = []
    for frame in frames:
        picture = ops.resize_u8(torch.from_numpy(image.load_image(frame, limits)), *common)
        resized.append(ops.resize_frames(picture[None], *size, "bilinear"))
    return Clip(torch.cat(resized), np.arange(total), None)
