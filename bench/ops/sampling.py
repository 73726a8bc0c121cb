"""Bench rows of token sampling at the real vocabulary sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu

VOCABS = [("lite", 126464), ("flash", 157184)]
BATCHES = [1, 16]
# tag, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, n_logprobs
SETTINGS = [
    ("greedy", 0.0, 0, 1.0, 1.0, 0, 0),
    ("greedy penalties", 0.0, 0, 1.0, 1.1, 10, 0),
    ("greedy logprobs20", 0.0, 0, 1.0, 1.0, 0, 20),
    ("draw", 1.0, 0, 1.0, 1.0, 0, 0),
    ("top_k50", 0.8, 50, 1.0, 1.0, 0, 0),
    ("top_p0.9", 0.8, 0, 0.9, 1.0, 0, 0),
    ("top_k50 top_p0.9", 0.8, 50, 0.9, 1.0, 0, 0),
]


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Logits of unit-normal noise times 4: a realistic spread, about as flat as a language model gets."""
    device = generator.device
    for model, vocab in VOCABS:
        for batch in (1, 8, 16, 32) if on_gpu(generator) else BATCHES:
            logits = torch.randn(batch, vocab, generator=generator, device=device) * 4
            for tag, temperature, top_k, top_p, penalty, ngram, n in (
                SETTINGS if batch == 1 else SETTINGS[::3]
            ):
                history = torch.randint(0, vocab, (batch * 500,), generator=generator, device=device)
                bounds = torch.arange(batch)[:, None] * 500 + torch.tensor([0, 500])
                options = {
                    "temperature": torch.full((batch,), temperature, device=device),
                    "top_k": torch.full((batch,), top_k, dtype=torch.int32, device=device),
                    "top_p": torch.full((batch,), top_p, device=device),
                    "repetition_penalty": torch.full((batch,), penalty, device=device),
                    "no_repeat_ngram_size": torch.full((batch,), ngram, dtype=torch.int32, device=device),
                    "history": history,
                    "history_bounds": bounds.to(device),
                    "uniforms": torch.rand(batch, generator=generator, device=device),
                    "n_logprobs": n,
                }
                yield Case(
                    "sample",
                    f"{model} b{batch} {tag}",
                    "fp32",
                    lambda: ops.sample(logits, **options),  # noqa: B023
                    lambda: ops.sample_torch(logits, **options),  # noqa: B023
                    bytes=logits.nbytes,
                )
