"""Bench rows of token sampling at the real vocabulary sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case

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
    for model, vocab in VOCABS:
        for batch in BATCHES:
            logits = torch.randn(batch, vocab, generator=generator) * 4
            for tag, temperature, top_k, top_p, penalty, ngram, n in (
                SETTINGS if batch == 1 else SETTINGS[::3]
            ):
                history = torch.randint(0, vocab, (batch * 500,), generator=generator)
                options = {
                    "temperature": torch.full((batch,), temperature),
                    "top_k": torch.full((batch,), top_k, dtype=torch.int32),
                    "top_p": torch.full((batch,), top_p),
                    "repetition_penalty": torch.full((batch,), penalty),
                    "no_repeat_ngram_size": torch.full((batch,), ngram, dtype=torch.int32),
                    "history": history,
                    "history_bounds": torch.arange(batch)[:, None] * 500 + torch.tensor([0, 500]),
                    "uniforms": torch.rand(batch, generator=generator),
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
