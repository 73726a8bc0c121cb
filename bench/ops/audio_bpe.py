"""Bench rows of BPE audio tokens, against a Python loop over a table as upstream has it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu

CODES, ALPHABET, MERGES, SPECIAL = 5862, 894, 31869, 5  # of the real tables; here the merges are made up


def made_up() -> ops.AudioBpe:
    """Tables of the real sizes."""
    draw = random.Random(0)
    expansions: list[tuple[int, ...]] = [()] * SPECIAL + [(code,) for code in range(ALPHABET)]
    merges: dict[tuple[int, int], int] = {}
    while len(merges) < MERGES:
        # Mostly short ones: an id has 2.7 codes on average, 2.5 in the real tables.
        left = SPECIAL + int((len(expansions) - SPECIAL) * draw.random() ** 4)
        pair = (left, SPECIAL + draw.randrange(ALPHABET))
        if pair not in merges:
            merges[pair] = len(expansions)
            expansions.append(expansions[pair[0]] + expansions[pair[1]])
    return ops.AudioBpe.build(CODES, expansions, [(*pair, merged) for pair, merged in merges.items()])


def cases(generator: torch.Generator) -> Iterator[Case]:
    """A step of a batch, a sentence, and many long answers; then the prompt of a speaker."""
    host = made_up()
    device = generator.device
    bpe = host.to(device)
    for rows, length in [(1, 1), (32, 1), (1, 300), (64, 1000)]:
        ids = torch.randint(0, bpe.vocab_size, (rows * length,), generator=generator, device=device)
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)

        def loop(ids=ids, rows=rows):
            return [[c for i in row for c in host.expansions[i]] for row in ids.view(rows, -1).tolist()]

        yield Case(
            "audio_bpe_decode",
            f"{rows}x{length}",
            "int",
            lambda: ops.audio_bpe_decode(ids, ends, bpe),  # noqa: B023
            loop,
            bytes=rows * length * (8 + 4 * bpe.table.shape[0] // bpe.vocab_size),
        )
    if on_gpu(generator):
        return
    for rows, length in [(1, 324), (64, 324)]:
        codes = torch.randint(0, ALPHABET, (rows * length,), generator=generator).int()
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        yield Case(
            "audio_bpe_encode",
            f"{rows}x{length}",
            "int",
            lambda: ops.audio_bpe_encode(codes, ends, host),  # noqa: B023
            lambda: ops.audio_bpe_encode_torch(codes, ends, host),  # noqa: B023
            bytes=rows * length * 12,
        )
