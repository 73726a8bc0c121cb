"""What image generation and editing need beside the prompt: text to draw, output size, reference image."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from ming_rt.config import Generation
from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.ops import image as image_ops

# Output sizes by aspect ratio height / width: (ratio as rounded in the original table, (height, width)).
_BUCKETS_512 = (
    (0.25, (256, 1024)),
    (0.26, (256, 992)),
    (0.27, (256, 960)),
    (0.28, (256, 928)),
    (0.32, (288, 896)),
    (0.33, (288, 864)),
    (0.35, (288, 832)),
    (0.4, (320, 800)),
    (0.42, (320, 768)),
    (0.48, (352, 736)),
    (0.5, (352, 704)),
    (0.52, (352, 672)),
    (0.57, (384, 672)),
    (0.6, (384, 640)),
    (0.68, (416, 608)),
    (0.72, (416, 576)),
    (0.78, (448, 576)),
    (0.82, (448, 544)),
    (0.88, (480, 544)),
    (0.94, (480, 512)),
    (1.0, (512, 512)),
    (1.07, (512, 480)),
    (1.13, (544, 480)),
    (1.21, (544, 448)),
    (1.29, (576, 448)),
    (1.38, (576, 416)),
    (1.46, (608, 416)),
    (1.67, (640, 384)),
    (1.75, (672, 384)),
    (2.0, (704, 352)),
    (2.09, (736, 352)),
    (2.4, (768, 320)),
    (2.5, (800, 320)),
    (2.89, (832, 288)),
    (3.0, (864, 288)),
    (3.11, (896, 288)),
    (3.62, (928, 256)),
    (3.75, (960, 256)),
    (3.88, (992, 256)),
    (4.0, (1024, 256)),
)
_BUCKETS_672 = (
    (0.28, (352, 1280)),
    (0.32, (384, 1184)),
    (0.38, (416, 1088)),
    (0.44, (448, 1024)),
    (0.52, (480, 928)),
    (0.57, (512, 896)),
    (0.65, (544, 832)),
    (0.75, (576, 768)),
    (0.83, (608, 736)),
    (0.91, (640, 704)),
    (1.00, (672, 672)),
    (1.10, (704, 640)),
    (1.21, (736, 608)),
    (1.33, (768, 576)),
    (1.39, (800, 576)),
    (1.53, (832, 544)),
    (1.69, (864, 512)),
    (1.75, (896, 512)),
    (1.93, (928, 480)),
    (2.00, (960, 480)),
    (2.21, (992, 448)),
    (2.29, (1024, 448)),
    (2.54, (1056, 416)),
    (2.62, (1088, 416)),
    (2.69, (1120, 416)),
    (3.00, (1152, 384)),
    (3.08, (1184, 384)),
    (3.17, (1216, 384)),
    (3.55, (1248, 352)),
    (3.64, (1280, 352)),
)
_BUCKETS_1024 = tuple((ratio, (2 * h, 2 * w)) for ratio, (h, w) in _BUCKETS_512)

_QUOTED = (re.compile('"(.*?)"'), re.compile("‘(.*?)’"), re.compile("“(.*?)”"))
_MAX_QUOTE_WEIGHT = 60


@dataclass(frozen=True)
class ImageGenInputs:
    """Inputs of the image generator for one prompt."""

    height: int  # pixels
    width: int
    text: str  # instruction with the text to draw, empty where there is none
    reference: torch.Tensor | None  # f32 [1, 3, height, width] in [-1, 1]


def image_gen_inputs(
    generation: Generation,
    prompt: str,
    image: np.ndarray | None,
    *,
    aspect_ratio: float | None = None,
    highres: bool | int = False,
) -> ImageGenInputs | None:
    """Inputs of image generation for a prompt before placeholder expansion; None where there are none.

    ``image`` is the first picture of the conversation after loading, u8 [H, W, 3]. flash only:
    ``aspect_ratio`` (width / height) of the result, ``highres`` False, 672 or True. preview and v1 have no
    such inputs, v1.5 only together with a picture. Raises ``InvalidRequestError``.
    """
    if aspect_ratio is not None and not (math.isfinite(aspect_ratio) and 1 / 16 <= aspect_ratio <= 16):
        raise InvalidRequestError(f"aspect_ratio: found {aspect_ratio}, expected a number from 1/16 to 16")
    if generation != "flash":
        if aspect_ratio is not None or highres:
            raise UnsupportedError("aspect_ratio, highres: image options of flash only")
        if generation != "v1.5" or image is None:
            return None
        (height, width), cover = process_ratio(*image.shape[:2])
        reference = _crop(_resize(image, *cover), height, width)
        return ImageGenInputs(height, width, "", _normalise(reference))
    text = image_gen_text(prompt)
    if image is None:
        return ImageGenInputs(512, 512 if aspect_ratio is None else int(512 * aspect_ratio), text, None)
    if aspect_ratio is not None:
        h, w = image.shape[:2]
        if w / h >= aspect_ratio:
            h, w = h, math.floor(aspect_ratio * h)
        else:
            h, w = math.floor(w / aspect_ratio), w
        image = _crop(image, min(max(h, 1), image.shape[0]), min(max(w, 1), image.shape[1]))
    (height, width), _ = process_ratio(*image.shape[:2], highres)
    # Unlike v1.5, straight to the final size: the aspect ratio is distorted.
    return ImageGenInputs(height, width, text, _normalise(_resize(image, height, width)))


def process_ratio(
    height: int, width: int, highres: bool | int = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Output size (height, width) closest in aspect ratio, and the size at which the picture covers it."""
    table = _BUCKETS_512 if not highres else _BUCKETS_672 if highres == 672 else _BUCKETS_1024
    ratio = height / width
    bucket_h, bucket_w = min(table, key=lambda entry: abs(ratio - entry[0]))[1]
    if bucket_h / height > bucket_w / width:
        return (bucket_h, bucket_w), (bucket_h, int(width * bucket_h / height))
    return (bucket_h, bucket_w), (int(height * bucket_w / width), bucket_w)


def image_gen_text(prompt: str) -> str:
    """The instruction for text to be drawn, ``Text "...". ``, from the last quotation in ``prompt``.

    Straight single quotes count as quotation marks if all of them pair up around short texts. A single
    quotation after remove, delete or clear is text to take away: nothing is drawn.
    """
    parts = prompt.split("'")
    if len(parts) > 1 and len(parts) % 2 and all(_weight(part) < _MAX_QUOTE_WEIGHT for part in parts[1::2]):
        prompt = prompt.replace("'", '"')
    found = [match for pattern in _QUOTED for match in pattern.findall(prompt)]
    if not found:
        return ""
    if len(found) == 1:
        lower = prompt.lower()
        before = lower[: min(at for mark in '"‘“' if (at := lower.find(mark)) >= 0)]
        if any(word in before for word in ("remove", "delete", "clear")):
            return ""
    return f'Text "{found[-1]}". ' if found[-1] else ""


def _weight(text: str) -> int:
    """Drawn length: a Chinese character counts three."""
    return sum(3 if "\u4e00" <= char <= "\u9fff" else 1 for char in text)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    return image_ops.resize_u8(pixels, height, width, kind="bilinear").numpy()


def _crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre crop; an odd rest is split half to even."""
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def _normalise(image: np.ndarray) -> torch.Tensor:
    """u8 [H, W, 3] to f32 [1, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    return (pixels / 255 - 0.5) * 2
