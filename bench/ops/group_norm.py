"""Bench rows of the norms between the flow model's convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case

FRAMES = (50, 200, 860)


def cases(generator: torch.Generator) -> Iterator[Case]:
    """A resnet's first norm of both generations: with Mish, time and the next convolution's padding."""
    device = generator.device
    for frames in FRAMES:
        x = torch.randn(2, frames, 256, generator=generator, device=device)
        weight, bias = torch.randn(2, 256, generator=generator, device=device)
        shift = torch.randn(1, 256, generator=generator, device=device).expand(2, -1)
        for tag, groups, per_frame, pad in (("v1", 8, False, (1, 1)), ("v1.5", 1, True, (2, 0))):
            arguments = (x, weight, bias, 1e-5, groups)
            options = {"per_frame": per_frame, "act": "mish", "shift": shift, "pad": pad}
            yield Case(
                "group_norm+mish",
                f"{tag} 2x{frames}x256",
                "fp32",
                lambda: ops.group_norm(*arguments, **options),  # noqa: B023
                lambda: ops.group_norm_torch(*arguments, **options),  # noqa: B023
                bytes=x.numel() * 8,
            )
