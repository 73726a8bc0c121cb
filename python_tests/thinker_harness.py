"""Runs a thinker the way the engine does: packed batches, paged cache, any mix of chunks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from golden_cases import GoldenCase

from ming_rt.models.fusion import MediaEmbeds
from ming_rt.models.thinker import Thinker, ThinkerOutput
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.device import Device
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.weights import Checkpoint, WeightSource, load

T = TypeVar("T")


def load_case(
    case: GoldenCase,
    directory: Path,
    build: Callable[[WeightSource], T],
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    device: Device | None = None,
) -> T:
    """Builds a model from a golden case's weights with the real loader, as a checkpoint in ``directory``."""
    target = directory / "model.safetensors"
    if not target.exists():
        shutil.copyfile(case.path / "weights.safetensors", target)
    return load(build, Checkpoint(directory), dtype, rank=rank, world=world, device=device)


@dataclass
class Prompt:
    """One sequence: ids ``[S]``, positions ``[3, S]``, delta, router per token ``[S]``, media to place."""

    ids: np.ndarray
    positions: np.ndarray
    delta: int = 0
    modality: np.ndarray | None = None
    media: MediaEmbeds | None = None


@dataclass
class Chunk:
    """Tokens ``begin`` to ``end`` of a prompt, or one generated token."""

    sequence: int
    ids: np.ndarray
    positions: np.ndarray
    modality: np.ndarray
    media: MediaEmbeds | None = None


@dataclass
class Runner:
    """A thinker with a cache for some sequences whose pages are scattered over the pool."""

    thinker: Thinker
    prompts: Seq[Prompt]
    page_size: int = 16
    capacity: int = 128
    dtype: torch.dtype = torch.float32
    taps: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, count = self.thinker.config, len(self.prompts)
        pages = -(-self.capacity // self.page_size)
        kv_heads = config.num_key_value_heads // self.thinker.comm.world
        self.device = self.thinker.embed.device
        sizes = (config.num_hidden_layers, count * pages + 1, self.page_size, kv_heads, config.head_dim)
        self.kv = KVCache(*sizes, self.dtype, self.device)
        for pool in (*self.kv.k, *self.kv.v):
            pool.fill_(float("nan"))  # reading a slot nobody wrote shows at once
        order = np.random.default_rng(count).permutation(count * pages) + 1
        self.page_table = order.reshape(count, pages).astype(np.int32)
        self.lengths = [0] * count

    def chunk(self, sequence: int, begin: int, end: int) -> Chunk:
        """Tokens ``begin`` to ``end`` of a prompt."""
        prompt, media = self.prompts[sequence], None
        if prompt.media is not None:
            inside = (prompt.media.rows >= begin) & (prompt.media.rows < end)
            media = MediaEmbeds(
                prompt.media.rows[inside] - begin, prompt.media.feats[torch.from_numpy(inside)]
            )
        modality = np.zeros(len(prompt.ids), np.uint8) if prompt.modality is None else prompt.modality
        return Chunk(
            sequence, prompt.ids[begin:end], prompt.positions[:, begin:end], modality[begin:end], media
        )

    def token(self, sequence: int, token: int) -> Chunk:
        """One generated token."""
        position = self.lengths[sequence] + self.prompts[sequence].delta
        return Chunk(sequence, np.array([token]), np.full((3, 1), position), np.zeros(1, np.uint8))

    def step(self, chunks: Seq[Chunk], *, all_logits: bool = False) -> ThinkerOutput:
        """One forward step; logits of the last token of each chunk, or of all tokens."""
        counts = [len(chunk.ids) for chunk in chunks]
        ends = np.cumsum([0, *counts])
        slots, rows, feats = [], [], []
        for chunk, first in zip(chunks, ends, strict=False):
            where = self.lengths[chunk.sequence] + np.arange(len(chunk.ids))
            slots.append(self.slots(chunk.sequence, where))
            self.lengths[chunk.sequence] += len(chunk.ids)
            if chunk.media is not None:
                rows.append(chunk.media.rows + first)
                feats.append(chunk.media.feats)
        modality = np.concatenate([chunk.modality for chunk in chunks])
        positions = np.concatenate([chunk.positions for chunk in chunks], axis=1)

        def place(values: np.ndarray | Seq[int], dtype: type) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(self.device)

        batch = Batch(
            input_ids=place(np.concatenate([chunk.ids for chunk in chunks]), np.int64),
            positions=place(positions, np.int32),
            slots=place(np.concatenate(slots), np.int64),
            page_table=place(self.page_table[[chunk.sequence for chunk in chunks]], np.int32),
            cu_seqlens_q=place(ends, np.int32),
            kv_lens=place([self.lengths[chunk.sequence] for chunk in chunks], np.int32),
            logit_rows=place(np.arange(ends[-1]) if all_logits else ends[1:] - 1, np.int64),
            modality=place(modality, np.uint8) if modality.any() else None,
            media_rows=place(np.concatenate(rows), np.int64) if rows else None,
            media_feats=torch.cat(feats).to(self.device) if feats else None,
            want_hidden=True,
        )
        self.taps = {}
        out = self.thinker.forward(
            batch, self.kv, tap=lambda name, t: self.taps.update({name: t.cpu().clone()})
        )
        return ThinkerOutput(*(None if t is None else t.cpu() for t in vars(out).values()))

    def prefill(self, *, all_logits: bool = False) -> ThinkerOutput:
        """All prompts whole, in one step."""
        chunks = [self.chunk(i, 0, len(prompt.ids)) for i, prompt in enumerate(self.prompts)]
        return self.step(chunks, all_logits=all_logits)

    def slots(self, sequence: int, where: np.ndarray) -> np.ndarray:
        """Cache slots of token numbers ``where`` of a sequence."""
        pages = self.page_table[sequence][where // self.page_size].astype(np.int64)
        return pages * self.page_size + where % self.page_size

    def cached(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[Hkv, T, D]`` of a sequence in one layer."""
        slots = torch.from_numpy(self.slots(sequence, np.arange(self.lengths[sequence])))
        pools = (self.kv.k[layer], self.kv.v[layer])
        return tuple(pool.cpu().transpose(1, 2).flatten(0, 1)[slots].transpose(0, 1) for pool in pools)
