"""Bench rows of the resizers and of patch extraction."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

RESIZED = [
    ((3000, 4000), (756, 1008)),
    ((1080, 1920), (672, 1176)),
    ((480, 640), (476, 644)),
    ((91, 137), (224, 364)),
]
RESIZED_FRAMES = [
    ("bicubic", (8, 720, 1280), (420, 756)),
    ("bilinear", (8, 720, 1280), (420, 756)),
    ("bicubic", (16, 120, 160), (280, 392)),
]


def cases(generator: torch.Generator) -> Iterator[Case]:
    """A camera picture, a screen, a thumbnail; video frames of both generations; patches of both."""

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device)

    for (h, w), (height, width) in () if on_gpu(generator) else RESIZED:  # resizing runs on the CPU
        image = pixels(h, w, 3)
        yield Case(
            "resize_u8 bicubic",
            f"{h}x{w}->{height}x{width}",
            "u8",
            lambda: ops.resize_u8(image, height, width),  # noqa: B023
            lambda: ops.resize_u8_torch(image, height, width),  # noqa: B023
            bytes=image.numel() + height * width * 3,
        )
    for kind, (t, h, w), (height, width) in () if on_gpu(generator) else RESIZED_FRAMES:
        frames = pixels(t, h, w, 3)
        yield Case(
            f"resize_frames {kind}",
            f"{t}x{h}x{w}->{height}x{width}",
            "u8",
            lambda: ops.resize_frames(frames, height, width, kind, to_uint8=True),  # noqa: B023
            lambda: ops.resize_frames_torch(frames, height, width, kind, to_uint8=True),  # noqa: B023
            bytes=frames.numel() + t * height * width * 3,
        )
    for frames in [pixels(1, 896, 896, 3), pixels(1, 280, 280, 3), pixels(8, 420, 756, 3)]:
        for x, dtype in [(frames, "u8"), (frames.float(), "fp32")]:
            size = "x".join(map(str, frames.shape[:3]))
            rows = max(2, len(frames)) * frames[0].numel()
            yield Case(
                "patchify",
                size,
                dtype,
                lambda: ops.patchify(x, MEAN, STD),  # noqa: B023
                lambda: ops.patchify_torch(x, MEAN, STD),  # noqa: B023
                bytes=x.numel() * x.element_size() + rows * 4,
            )
