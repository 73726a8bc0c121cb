"""Bench rows of the embedding lookup."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case

VOCABULARY = 32768  # more than a cache holds


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Decode, a batch, and a prompt half of which is media, at the hidden size of Lite."""
    device = generator.device
    table = torch.randn(VOCABULARY, 2048, generator=generator, device=device, dtype=torch.bfloat16)
    for tokens, media in [(1, 0), (16, 0), (512, 0), (4096, 2048)]:
        ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator, device=device)
        arguments = (ids, table)
        if media:
            arguments = (ids, table, torch.arange(media, device=device), table[:media].clone())
        yield Case(
            "embed",
            f"{tokens}x2048" + (f" media {media}" if media else ""),
            "bf16",
            lambda: ops.embed(*arguments),  # noqa: B023
            lambda: ops.embed_torch(*arguments),  # noqa: B023
            bytes=tokens * 2048 * 4,
        )
