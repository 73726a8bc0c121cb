"""Bench rows of the bookkeeping between two decode steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt import ops

from ..timing import Case, on_gpu

PAGE, PAGES = 4096, 1024  # every timed call is a step further: room for four million


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Rows that share one history, as padding rows do."""
    device = generator.device
    history = torch.zeros(PAGE * PAGES, dtype=torch.int64, device=device)
    for rows in (1, 8, 32) if on_gpu(generator) else (1, 16):
        table = torch.randint(0, 1000, (rows, PAGES), generator=generator, dtype=torch.int32, device=device)

        def state(rows=rows, table=table) -> tuple:
            ids = torch.full((rows,), 7, device=device)
            positions = torch.zeros(3, rows, dtype=torch.int32, device=device)
            bounds = torch.zeros(rows, 2, dtype=torch.int64, device=device)
            return ids, positions, positions[0].clone(), bounds[:, 0].clone(), table, history, bounds, PAGE

        ours, composition = state(), state()
        yield Case(
            "advance",
            f"b{rows}",
            "int",
            lambda: ops.advance(*ours),  # noqa: B023
            lambda: ops.advance_torch(*composition),  # noqa: B023
            bytes=rows * 92,
        )
