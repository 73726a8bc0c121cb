"""Prefill and decode of the whole thinker at the real Lite dimensions against the plain torch composition."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ming_rt.config import ThinkerConfig
from ming_rt.demo import config_dict
from ming_rt.models.thinker import Thinker
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.weights import RandomSource

from .timing import Case, Row, measure
from .torch_thinker import TorchThinker

LAYERS = 4
PAGE = 64


class Sequence:
    """One sequence of our thinker on a cache of its own."""

    def __init__(self, thinker: Thinker, capacity: int) -> None:
        c = thinker.config
        pages = -(-capacity // PAGE)
        self.thinker = thinker
        self.kv = KVCache(
            c.num_hidden_layers, pages, PAGE, c.num_key_value_heads, c.head_dim, thinker.embed.dtype
        )
        self.page_table = torch.arange(pages, dtype=torch.int32)[None]

    def forward(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """Logits f32 [V] of the last of ``ids``, which follow ``past`` cached tokens."""
        positions = torch.arange(past, past + len(ids))
        batch = Batch(
            input_ids=ids,
            positions=positions.int().expand(3, -1).contiguous(),
            slots=positions,
            page_table=self.page_table,
            cu_seqlens_q=torch.tensor([0, len(ids)], dtype=torch.int32),
            kv_lens=torch.tensor([past + len(ids)], dtype=torch.int32),
            logit_rows=torch.tensor([len(ids) - 1]),
        )
        return self.thinker.forward(batch, self.kv).logits[0]


def work(config: ThinkerConfig, tokens: int) -> tuple[int, int]:
    """(weight bytes read at least, matrix FLOPs) of one step over ``tokens`` tokens of one sequence, bf16."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = hidden * (qkv + config.num_attention_heads * config.head_dim)
    shared, expert = 3 * hidden * width * config.num_shared_experts, 3 * hidden * width
    hit = min(config.num_experts, tokens * config.num_experts_per_tok)
    layers, head = config.num_hidden_layers, hidden * config.vocab_size
    read = layers * (attention + shared + hit * expert) + head
    per_token = layers * (attention + shared + config.num_experts_per_tok * expert)
    return 2 * read, 2 * (tokens * per_token + head)


def rows(
    seconds: float = 2.0, only: str = "", prefill: tuple[int, ...] = (128, 512), context: int = 512
) -> Iterator[Row]:
    """Rows ``prefill`` (tokens per step as given) and ``decode`` (batch 1 after ``context`` tokens)."""
    tags = {f"prefill {n} tokens, {LAYERS} Lite layers": n for n in prefill}
    tags[f"decode at {context}, {LAYERS} Lite layers"] = 1
    wanted = {tag: n for tag, n in tags.items() if only in f"thinker {tag} bf16"}
    if not wanted:
        return
    config = ThinkerConfig.from_dict(config_dict("v1.5", size="real", num_layers=LAYERS))
    ours = Thinker(config, RandomSource(seed=0, dtype=torch.bfloat16))
    baseline = TorchThinker(config, RandomSource(seed=0, dtype=torch.bfloat16))
    sequence = Sequence(ours, context + max(wanted.values()))
    ids = torch.randint(0, 100_000, (context + max(prefill),), generator=torch.Generator().manual_seed(0))
    for tag, count in wanted.items():
        past = context if count == 1 else 0
        if past:
            sequence.forward(ids[:past], 0)
            baseline.reset()
            baseline.forward(ids[:past])
        step = ids[past : past + count]

        def run_ours(step=step, past=past) -> torch.Tensor:
            return sequence.forward(step, past)

        def run_torch(step=step, past=past) -> torch.Tensor:
            baseline.reset(past)
            return baseline.forward(step)

        error = (run_ours() - run_torch()).norm() / run_torch().norm()
        read, flops = work(config, count)
        row = measure(Case("thinker", tag, "bf16", run_ours, run_torch, read, flops), seconds)
        row.extra.update(relative_error=float(error), tokens_per_second=count / row.median_us * 1e6)
        yield row
