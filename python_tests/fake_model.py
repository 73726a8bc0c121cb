"""A model without arithmetic: its logits are a hash of everything the cache holds for the sequence.

A wrong page, slot, position, router or media row therefore changes the next token, and every result has to be
bit-equal however the work was cut into steps. ``reference`` computes the same answer without engine or pages.
"""

from __future__ import annotations

import codecs
import itertools
import threading
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from ming_rt.inputs.processor import Prompt
from ming_rt.models.fusion import MediaEmbeds
from ming_rt.models.omni import Plan
from ming_rt.models.thinker import ThinkerOutput
from ming_rt.runtime.device import Device
from ming_rt.runtime.engine import Engine, EngineOptions

VOCAB, HIDDEN, LAYERS, HEADS, DIM = 97, 6, 2, 2, 6
EOS, PATCH = 95, 96
DELTA = 5  # generated token n gets position n + DELTA


class FakeTokenizer:
    """Ids 0..79 are characters or short words, 80..83 the bytes of one character, special ids no text."""

    words = (
        *"abcdefghijklmnopqrstuvwxyz .,ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "the",
        " and",
        "ab",
        "stop",
        "é",
        "好",
    )

    def stream(self) -> FakeStream:
        return FakeStream()


class FakeStream:
    """Incremental detokeniser of one answer."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in (EOS, PATCH) or token >= VOCAB:
            return ""
        if 80 <= token < 84:
            return self._utf8.decode("🐟".encode()[token - 80 : token - 79])
        return self._utf8.decode(FakeTokenizer.words[token % len(FakeTokenizer.words)].encode())

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


TOKENIZER = FakeTokenizer()


def make_prompt(ids, pixels=None, grid=None) -> Prompt:
    """A prompt of token ids; ``pixels`` f32 [n, 4] gives one row per PATCH token."""
    return Prompt(
        input_ids=np.asarray(ids, np.int64),
        text="",
        pixel_values=None if pixels is None else np.asarray(pixels, np.float32),
        image_grid_thw=None if pixels is None else np.array([[1, 2, 2]]),
        pixel_values_videos=None,
        video_grid_thw=None,
        audio_feats=(),
        audio_encoder=None,
        audio_spans=np.empty((0, 2), np.int64),
    )


def plan(prompt: Prompt) -> Plan:
    index = np.arange(len(prompt.input_ids), dtype=np.int32)
    positions = np.stack([index, index * 2, index + 7])
    return Plan(positions, DELTA, (prompt.input_ids == PATCH).astype(np.uint8))


def features(prompt: Prompt) -> MediaEmbeds | None:
    if prompt.pixel_values is None:
        return None
    feats = torch.from_numpy(prompt.pixel_values).sum(1, keepdim=True).expand(-1, HIDDEN).contiguous()
    return MediaEmbeds(np.flatnonzero(prompt.input_ids == PATCH), feats)


def entries(ids, positions, modality, media_rows, media_feats) -> torch.Tensor:
    """What the fake caches for each token: f32 [N, DIM]."""
    media = torch.zeros(len(ids))
    if media_rows is not None:
        media[media_rows] = media_feats[:, 0].float()
    columns = [ids.float(), *positions.float(), modality.float(), media]
    return torch.stack(columns, dim=1)


def logits_of(cached: torch.Tensor) -> torch.Tensor:
    """f32 [VOCAB] from the entries of a whole sequence [T, DIM]."""
    assert torch.isfinite(cached).all(), "read a cache entry nobody wrote"
    seed = zlib.crc32(cached.contiguous().numpy().tobytes())
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3)


@dataclass
class FakeThinker:
    """``forward`` over the real KVCache; hooks make single steps fail or wait."""

    before_step: object = None

    def forward(self, batch, kv) -> ThinkerOutput:
        if self.before_step is not None:
            self.before_step(batch)
        modality = (
            torch.zeros(len(batch.input_ids), dtype=torch.uint8) if batch.modality is None else batch.modality
        )
        new = entries(batch.input_ids, batch.positions, modality, batch.media_rows, batch.media_feats)
        real = batch.slots >= 0  # not padding rows
        slots, stored = batch.slots[real], new[real]
        page, offset = slots // kv.page_size, slots % kv.page_size
        for layer in range(LAYERS):
            kv.k[layer][page, :, offset] = (stored * 2**layer)[:, None].expand(-1, HEADS, -1)
            kv.v[layer][page, :, offset] = (stored * -(2**layer))[:, None].expand(-1, HEADS, -1)
        cached = [self._cached(batch, kv, b) for b in range(len(batch.kv_lens))]
        begins = batch.cu_seqlens_q.tolist()
        place = {}
        for b, (begin, end) in enumerate(itertools.pairwise(begins)):
            for row in range(begin, end):
                place[row] = cached[b][: int(batch.kv_lens[b]) - (end - 1 - row)]
        rows = batch.logit_rows.tolist()
        logits = torch.stack([logits_of(place[row]) for row in rows]) if rows else torch.empty(0, VOCAB)
        if not batch.want_hidden:
            return ThinkerOutput(logits)
        last = torch.stack([logits_of(place[row])[:HIDDEN] for row in range(len(new))])
        return ThinkerOutput(logits, new[:, :HIDDEN], last)

    def _cached(self, batch, kv, b: int) -> torch.Tensor:
        length = int(batch.kv_lens[b])
        index = torch.arange(length)
        pages = batch.page_table[b].long()[index // kv.page_size]
        found = [kv.k[layer][pages, :, index % kv.page_size] / 2**layer for layer in range(LAYERS)]
        found += [kv.v[layer][pages, :, index % kv.page_size] / -(2**layer) for layer in range(LAYERS)]
        for other in found[1:]:
            assert torch.equal(other, found[0]), "layers or heads disagree"
        return found[0][:, 0]


class FakeModel:
    """The face of the omni model that the engine uses."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            thinker=SimpleNamespace(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_key_value_heads=HEADS,
                head_dim=DIM,
            )
        )
        self.thinker = FakeThinker()
        self.encoded = 0
        self.threads: set[str] = set()

    def plan(self, prompt: Prompt) -> Plan:
        self.threads.add(threading.current_thread().name)
        return plan(prompt)

    def encode(self, prompt: Prompt, memo) -> MediaEmbeds | None:
        def encode(missing: list[int]) -> list[list[torch.Tensor]]:
            self.encoded += 1
            return [[features(prompt).feats]]

        ((feats,),) = memo([("fake", prompt.pixel_values)], encode)
        return MediaEmbeds(features(prompt).rows, feats)


def make_engine(model: FakeModel | None = None, *, device: Device = Device(), **options) -> Engine:  # noqa: B008
    """An engine over the fake model whose cache memory starts as NaN.

    On ``device`` "emu", without the ops emulated, it takes the path of GPUs with the kernels of the CPU.
    """
    sizes = {"num_pages": 64, "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **options}
    engine = Engine(model or FakeModel(), TOKENIZER, (EOS,), torch.float32, EngineOptions(**sizes), device)
    kv = engine._worker.kv
    for pages in (*kv.k, *kv.v):
        pages.fill_(float("nan"))
    return engine


def check_all_free(engine: Engine) -> None:
    """Every page is back and no invariant of the pool is broken."""
    pool = engine._worker.pool
    pool.check(holders=[])
    assert pool.available == pool.num_pages
    assert not engine._worker.live
    assert engine.stats().kv_pages_used == 0


def reference(prompt: Prompt, max_tokens: int) -> list[int]:
    """Greedy answer computed directly from the definition."""
    p, media = plan(prompt), features(prompt)
    s = len(prompt.input_ids)
    ids, positions = list(prompt.input_ids), [list(axis) for axis in p.positions]
    for _ in range(max_tokens):
        modality = np.zeros(len(ids), np.uint8)
        modality[:s] = p.modality
        cached = entries(
            torch.tensor(ids),
            torch.tensor(positions),
            torch.from_numpy(modality),
            None if media is None else torch.from_numpy(media.rows),
            None if media is None else media.feats,
        )
        token = int(logits_of(cached).argmax())
        for axis in positions:
            axis.append(len(ids) + DELTA)
        ids.append(token)
        if token == EOS:
            break
    return [int(i) for i in ids[s:]]
