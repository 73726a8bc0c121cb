"""The whole model at full size on a GPU, through the engine: decoding, prefill, and time to the first token.

Ming-Lite-Omni v1.5 with all its layers and random weights made on the device. Times are a caller's:
scheduling, sampling and the way of each token to the host included. Decoding is the difference of two runs
that differ in length only, so the prefill before it drops out. Pictures come as patches: decoding and
resizing a file is not in the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ming_rt.config import OmniConfig, ThinkerConfig
from ming_rt.demo import config_dict
from ming_rt.inputs.processor import Prompt
from ming_rt.models.omni import Omni
from ming_rt.runtime.engine import Engine, EngineOptions
from ming_rt.runtime.request import SamplingParams
from ming_rt.runtime.weights import RandomSource

from .timing import Row

if TYPE_CHECKING:
    from ming_rt.runtime.device import Device

    from .gpu_run import Progress

CONTEXT, SHORT, LONG = 1024, 64, 320  # tokens of a prompt, of the two answers
BATCHES = (1, 8)
PREFILL = 4096
GRID = (1, 64, 60)  # patches of the picture: 960 tokens
IMAGE_PROMPT = 1024
PAGE = 32
RUNS = 5


class NoText:
    """A tokenizer for token ids nobody reads."""

    def stream(self) -> NoText:
        """Itself: there is no state."""
        return self

    def push(self, _token: int) -> str:
        """No text."""
        return ""

    def flush(self) -> str:
        """No text."""
        return ""


def build(device: torch.device, size: str = "real", layers: int | None = None) -> Omni:
    """v1.5 with random bfloat16 weights on ``device``."""
    config = OmniConfig.from_dict(config_dict("v1.5", size=size, num_layers=layers))  # type: ignore[arg-type]
    return Omni(config, RandomSource(dtype=torch.bfloat16, device=device))


def engine(model: Omni, device: Device, longest: int = PREFILL) -> Engine:
    """An engine whose steps take a whole prompt."""
    sequences = max(BATCHES)
    pages = sequences * -(-(CONTEXT + LONG) // PAGE) + -(-longest // PAGE) + 8
    options = EngineOptions(
        num_pages=pages, page_size=PAGE, max_num_seqs=sequences, max_num_batched_tokens=longest
    )
    return Engine(model, NoText(), (), torch.bfloat16, options, device)  # type: ignore[arg-type]


class Prompts:
    """Fresh random prompts, so that no run finds the pages of another."""

    def __init__(self, config: ThinkerConfig, seed: int = 0) -> None:
        self.config, self.rng = config, np.random.default_rng(seed)

    def text(self, tokens: int) -> Prompt:
        """Ids of ordinary words."""
        highest = min(100_000, self.config.vocab_size // 2)
        return Prompt(self.rng.integers(10, highest, tokens), "")

    def image(self, tokens: int, grid: tuple[int, int, int] = GRID) -> Prompt:
        """A picture of ``grid`` patches, then words, ``tokens`` in all."""
        c, patches = self.config, int(np.prod(grid))
        count = patches // 4
        start = [] if c.image_start_token is None else [c.image_start_token]
        words = self.text(tokens - count - len(start)).input_ids
        return Prompt(
            np.array([*start, *[c.image_patch_token] * count, *words]),
            "",
            pixel_values=self.rng.standard_normal((patches, 1176), dtype=np.float32),
            image_grid_thw=np.array([grid]),
        )


def generate(server: Engine, prompts: list[Prompt], tokens: int) -> float:
    """Seconds until all prompts have ``tokens`` tokens of answer."""
    begin = time.perf_counter()
    handles = [server.submit(prompt, SamplingParams(max_tokens=tokens)) for prompt in prompts]
    for handle in handles:
        done = handle.result()
        if len(done.token_ids) != tokens:
            raise RuntimeError(f"{len(done.token_ids)} tokens instead of {tokens}")
    return time.perf_counter() - begin


def decode_seconds(server: Engine, prompts: Prompts, batch: int, runs: int = RUNS) -> list[float]:
    """Seconds per decode step of ``batch`` sequences, one value per run, sorted; the first run warms up."""
    steps = []
    for run in range(runs + 1):
        short, long = (
            generate(server, [prompts.text(CONTEXT) for _ in range(batch)], tokens)
            for tokens in (SHORT, LONG)
        )
        if run:
            steps.append((long - short) / (LONG - SHORT))
    return sorted(steps)


def first_token_seconds(server: Engine, make: Callable[[], Prompt], runs: int = RUNS) -> list[float]:
    """Seconds to the first token, one value per run, sorted; two runs warm up."""
    return sorted([generate(server, [make()], 1) for _ in range(runs + 2)][2:])


def decode_bytes(config: ThinkerConfig, batch: int, context: int) -> float:
    """Bytes a decode step reads at least in bf16: weights, with the experts uniform routing hits, and KV."""
    c = config
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    attention = c.hidden_size * c.head_dim * (heads + c.num_attention_heads)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    hit = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** batch)
    layer = attention + expert * (c.num_shared_experts + hit)
    kv = 2 * c.num_key_value_heads * c.head_dim * context * batch
    return 2 * (c.num_hidden_layers * (layer + kv) + c.hidden_size * c.vocab_size)


def prefill_flops(config: ThinkerConfig, tokens: int) -> float:
    """Multiplications and additions of a prompt's step: matrices and causal attention, one row of logits."""
    c = config
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    attention = c.hidden_size * c.head_dim * (heads + c.num_attention_heads)
    experts = 3 * c.hidden_size * c.moe_intermediate_size * (c.num_shared_experts + c.num_experts_per_tok)
    scores = 2 * c.num_attention_heads * c.head_dim * (tokens + 1) / 2
    return 2 * (c.num_hidden_layers * tokens * (attention + experts + scores) + c.hidden_size * c.vocab_size)


def row(shape: str, seconds: list[float], tokens: int, read: float = 0, flops: float = 0) -> Row:
    """A row of sorted times of a step over ``tokens`` tokens."""
    median = statistics.median(seconds)
    return Row(
        "thinker",
        shape,
        "bf16",
        median * 1e6,
        seconds[0] * 1e6,
        seconds[-1] * 1e6,
        float("nan"),
        read / median / 1e9,
        flops / median / 1e12,
        {"tokens_per_second": tokens / median, "runs": len(seconds), "percentiles": "lowest and highest run"},
    )


Job = Callable[[Engine, Prompts], Row]


def jobs() -> dict[str, Job]:
    """What is measured, by name."""

    def decode(name: str, batch: int) -> Job:
        def job(server: Engine, prompts: Prompts) -> Row:
            read = decode_bytes(prompts.config, batch, CONTEXT + (SHORT + LONG) // 2)
            return row(name, decode_seconds(server, prompts, batch), batch, read)

        return job

    def prefill(server: Engine, prompts: Prompts) -> Row:
        seconds = first_token_seconds(server, lambda: prompts.text(PREFILL))
        flops = prefill_flops(prompts.config, PREFILL)
        return row(f"prefill {PREFILL}", seconds, PREFILL, flops=flops)

    def image(server: Engine, prompts: Prompts) -> Row:
        seconds = first_token_seconds(server, lambda: prompts.image(IMAGE_PROMPT))
        return row(image_name, seconds, IMAGE_PROMPT)

    image_name = f"first token of a {IMAGE_PROMPT}-token image prompt"
    names = {f"decode batch {batch} at {CONTEXT}": batch for batch in BATCHES}
    return {
        **{name: decode(name, batch) for name, batch in names.items()},
        f"prefill {PREFILL}": prefill,
        image_name: image,
    }


def measure(progress: Progress, device: Device, only: str = "") -> None:
    """All rows whose name holds ``only``, into ``progress``; a model that cannot be built fails them all."""
    wanted = {name: job for name, job in jobs().items() if only in f"thinker {name} bf16"}
    if not wanted or progress.over():
        return
    try:
        model = build(device.torch)
        server = engine(model, device)
    except Exception as error:
        progress.failed["thinker"] = f"{type(error).__name__}: {error}"[:500]
        return
    prompts = Prompts(model.config.thinker)
    with server:
        for name, job in wanted.items():
            progress.attempt(f"thinker {name} bf16", lambda job=job: job(server, prompts))  # type: ignore[misc]
