"""Pictures: loading, the two size rules, and the patches of the vision tower."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ming_rt.config import PreprocessorConfig
from ming_rt.errors import InvalidMediaError
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.source import as_numpy, check_options, integer, number, resolve
from ming_rt.ops import image as ops

FACTOR = 28  # pixels of one language-model token along each axis
MIN_PIXELS = 3136  # of the first stage, unless the message element says otherwise
MAX_PIXELS = 802816
MAX_ASPECT = 200
OPTIONS = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def fetch_size(
    height: float, width: float, min_pixels: float = MIN_PIXELS, max_pixels: float = MAX_PIXELS
) -> tuple[int, int]:
    """Size rule of the first stage: multiples of 28 with a pixel count between the limits.

    Small sides grow to 28; a side may become 0 for a very elongated picture under a small ``max_pixels``.

    Raises:
        InvalidMediaError: an aspect ratio above 200.
    """
    _check_aspect(height, width)
    return _fit(
        height, width, max(FACTOR, _rounded(height)), max(FACTOR, _rounded(width)), min_pixels, max_pixels
    )


def processor_size(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Size rule of the image processor: as ``fetch_size``, but sides below 28 are an error.

    Raises:
        InvalidMediaError: a side below 28 pixels, or an aspect ratio above 200.
    """
    if min(height, width) < FACTOR:
        raise InvalidMediaError(f"image: found {width}x{height} pixels, expected sides of at least {FACTOR}")
    _check_aspect(height, width)
    return _fit(height, width, _rounded(height), _rounded(width), min_pixels, max_pixels)


def _rounded(side: float) -> int:
    return FACTOR * round(side / FACTOR)


def _check_aspect(height: float, width: float) -> None:
    if min(height, width) <= 0:
        raise InvalidMediaError(f"image: found {width}x{height} pixels, expected a picture that is not empty")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise InvalidMediaError(
            f"image: found {width}x{height} pixels, expected an aspect ratio of at most {MAX_ASPECT}"
        )


def _fit(
    height: float, width: float, h: int, w: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Scales the unrounded size by one factor where the rounded one (h, w) leaves the limits."""
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        return FACTOR * math.floor(height / beta / FACTOR), FACTOR * math.floor(width / beta / FACTOR)
    if h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        return FACTOR * math.ceil(height * beta / FACTOR), FACTOR * math.ceil(width * beta / FACTOR)
    return h, w


def check_pixels(height: int, width: int, limits: Limits, frames: int = 1) -> None:
    """Raises InvalidMediaError for an empty size or more than ``limits.max_image_pixels`` pixels in all."""
    if height < 1 or width < 1:
        raise InvalidMediaError(f"image: found {width}x{height} pixels, expected a picture that is not empty")
    if frames * height * width > limits.max_image_pixels:
        size = f"{frames}x{width}x{height}" if frames > 1 else f"{width}x{height}"
        raise InvalidMediaError(f"image: found {size} pixels, expected at most {limits.max_image_pixels}")


def load_image(obj: object, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Decodes one picture to RGB.

    Alpha is dropped, palettes are looked up, gray is replicated, EXIF orientation is not applied; of an
    animation the first frame counts.

    Args:
        obj: path, ``file://`` URL, bytes, ``data:image/...;base64,`` URL, PIL image, or a uint8 array or
            tensor [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        limits: the pixel count is compared before anything is decoded.

    Returns:
        uint8 [H, W, 3].

    Raises:
        InvalidMediaError: malformed, truncated, empty or too large.
        UnsupportedError: an http(s) URL.
    """
    picture = _opened(obj, limits)
    if isinstance(picture, np.ndarray):
        picture = picture.reshape(*picture.shape[:2], -1)
        rgb = np.repeat(picture, 3, 2) if picture.shape[2] == 1 else picture[:, :, :3]
        return np.ascontiguousarray(rgb)
    try:
        return np.array(picture.convert("RGB"))
    except Exception as error:  # whatever a codec raises on hostile bytes
        raise InvalidMediaError(f"image: malformed or truncated file ({type(error).__name__})") from error


def image_size(obj: object, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Height and width of what ``load_image`` would return, from the header alone; raises as that does."""
    picture = _opened(obj, limits)
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)


def _opened(obj: object, limits: Limits) -> np.ndarray | Image.Image:
    """The picture behind ``obj``, checked against the limits, not yet decoded."""
    obj = as_numpy(obj, "image")
    if isinstance(obj, np.ndarray):
        channels = obj.shape[2] if obj.ndim == 3 else 1
        if obj.dtype != np.uint8 or obj.ndim not in (2, 3) or channels not in (1, 3, 4):
            raise InvalidMediaError(
                f"image: found {obj.dtype} {list(obj.shape)}, expected uint8 [H, W], [H, W, 3] or [H, W, 4]"
            )
        check_pixels(*obj.shape[:2], limits)
        return obj
    if not isinstance(obj, Image.Image):
        obj = _open_file(obj, limits)
    check_pixels(obj.height, obj.width, limits)
    return obj


def _open_file(obj: object, limits: Limits) -> Image.Image:
    source = resolve(obj, "image", limits)
    if source is None:
        raise InvalidMediaError(
            f"image: found {type(obj).__name__}, expected a path, bytes, data URL, PIL image or uint8 array"
        )
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise InvalidMediaError(f"image: not a readable {', '.join(_FORMATS)} file") from error
    except Image.DecompressionBombError as error:
        raise InvalidMediaError("image: found more pixels than Pillow opens") from error
    except Exception as error:  # whatever a codec raises on hostile bytes
        raise InvalidMediaError(f"image: malformed file ({type(error).__name__})") from error
    picture.info.pop("transparency", None)  # not used; Pillow would warn of some forms
    return picture


def fetch_target(height: int, width: int, options: Mapping[str, Any], limits: Limits) -> tuple[int, int]:
    """Size after the first stage of a picture of the given size; see ``fetch_image``."""
    asked = integer(options, "resized_height"), integer(options, "resized_width")
    low, high = number(options, "min_pixels", MIN_PIXELS), number(options, "max_pixels", MAX_PIXELS)
    if None not in asked:
        size = fetch_size(*asked)
    else:
        size = fetch_size(height, width, low, high)
    check_pixels(*size, limits)
    return size


def fetch_image(
    obj: object, options: Mapping[str, Any] | None = None, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """First stage: load, then resize to multiples of 28 (bicubic, uint8).

    Args:
        obj: see ``load_image``.
        options: ``min_pixels``, ``max_pixels``, or ``resized_height`` and ``resized_width`` together.

    Returns:
        uint8 [h, w, 3].

    Raises:
        InvalidRequestError: a malformed option.
        InvalidMediaError: a picture that cannot be used.
    """
    picture = load_image(obj, limits)
    height, width = fetch_target(*picture.shape[:2], options or {}, limits)
    return ops.resize_u8(torch.from_numpy(picture), height, width).numpy()


def preprocess_image(
    obj: object,
    config: PreprocessorConfig,
    options: Mapping[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, tuple[int, int, int], np.ndarray]:
    """Both stages: load and resize, then resize to the processor's limits, normalise and cut into patches.

    Args:
        obj, options: see ``fetch_image``.
        config: pixel limits and normalisation.

    Returns:
        Patch rows float32 [t*h*w, 1176], the grid (1, h, w) in patches, and the picture after the first
        stage, uint8 [H, W, 3].

    Raises:
        InvalidRequestError: a malformed or unknown option.
        InvalidMediaError: a picture that cannot be used.
    """
    options = options or {}
    check_options(options, OPTIONS, "image")
    fetched = fetch_image(obj, options, limits)
    size = processor_size(*fetched.shape[:2], config.min_pixels, config.max_pixels)
    check_pixels(*size, limits)
    picture = ops.resize_u8(torch.from_numpy(fetched), *size)
    rows, grid = ops.patchify(picture[None], config.image_mean, config.image_std)
    return rows.numpy(), grid, fetched
