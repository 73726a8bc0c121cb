"""How memory is shared out: a GPU's before the first weight is read, the host's KV cache after the last."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ming_rt.config import OmniConfig, SanmConfig, ThinkerConfig, VisionConfig, WhisperConfig
from ming_rt.errors import CapacityError
from ming_rt.runtime.device import Device
from ming_rt.runtime.kv_cache import KVCache
from ming_rt.runtime.memory import available_memory
from ming_rt.runtime.options import EngineOptions

RESERVE = 512 << 20  # kernels' code and scratch, the buffers of decode graphs, unusable gaps
# Patches of one video with the pixels that flash takes by default. A request may ask for more, and fails
# alone if the memory does not suffice.
MEDIUM_PATCHES = 49152
KV_SHARE = 0.25  # of the host's free memory
KV_LEAST = 64 << 20  # where hardly anything is free; pages take memory only when they are used
KV_SEQUENCES = 4  # of full length that the host's cache should hold, if that is less
RECORDING_FRAMES = {"whisper": 15000, "sanm": 5000}  # encoder frames of a recording of 300 s


@dataclass(frozen=True)
class MemoryPlan:
    """All numbers in bytes but ``utilization``, the share of ``total`` this process may fill.

    ``used`` is taken already, by others and by what this process holds; ``activations`` is the peak of one
    step or of encoding one medium, which never run at once; ``media`` keeps encoded media.
    """

    device: str
    total: int
    used: int
    utilization: float
    weights: int
    activations: int
    media: int
    reserve: int = RESERVE

    @property
    def kv(self) -> int:
        """What is left for KV pages; below 0 where the rest does not even fit."""
        taken = self.used + self.weights + self.activations + self.media + self.reserve
        return int(self.total * self.utilization) - taken

    def check(self, kv: int, what: str) -> None:
        """Raises CapacityError with all numbers unless ``kv`` bytes, needed for ``what``, are left."""
        if self.kv < kv:
            left = f"{self.kv} are left" if self.kv >= 0 else f"the rest alone lacks {-self.kv}"
            raise CapacityError(
                f"{self.device}: {what} needs {kv} bytes of KV cache, {left}: gpu_memory_utilization "
                f"{self.utilization:g} of {self.total} bytes, less {self.used} in use, {self.weights} for "
                f"weights, {self.activations} for activations, {self.media} for encoded media and "
                f"{self.reserve} in reserve"
            )


def memory_plan(
    place: Device,
    utilization: float,
    weight_bytes: int,
    config: OmniConfig,
    dtype: torch.dtype,
    options: EngineOptions,
) -> MemoryPlan:
    """Where the memory of a GPU will go, as it is used now."""
    torch.cuda.empty_cache()  # what earlier sessions of this process left behind
    free, total = torch.cuda.mem_get_info(place.torch)
    return MemoryPlan(
        device=f"{place} ({place.name})",
        total=total,
        used=total - free,
        utilization=utilization,
        weights=weight_bytes,
        activations=activation_bytes(config, dtype, options.max_num_batched_tokens, options.max_num_seqs),
        media=options.media_cache_bytes,
    )


def page_bytes(thinker: ThinkerConfig, dtype: torch.dtype, page_size: int) -> int:
    """Bytes of one KV page over all layers."""
    return page_size * KVCache.bytes_per_token(
        thinker.num_hidden_layers, thinker.num_key_value_heads, thinker.head_dim, dtype
    )


def with_pages(
    options: EngineOptions,
    thinker: ThinkerConfig,
    dtype: torch.dtype,
    kv_bytes: int | None,
    max_model_len: int | None,
    plan: MemoryPlan | None = None,
) -> EngineOptions:
    """The options with a KV cache as large as asked for, or as a GPU's plan or the host's memory allow.

    Raises:
        CapacityError: the plan leaves too little, or ``kv_bytes`` does not hold ``max_model_len`` tokens.
    """
    size = options.page_size
    per_page = page_bytes(thinker, dtype, size)
    length = max_model_len or thinker.rope.max_position_embeddings
    needed = -(-length // size) * per_page
    if plan is None:
        free = max(int(available_memory() * KV_SHARE), KV_LEAST)
        budget = kv_bytes or min(free, KV_SEQUENCES * needed)
    else:
        least = kv_bytes or (needed if max_model_len else per_page)
        plan.check(least, f"a cache of {least // per_page * size} tokens")
        budget = kv_bytes or min(plan.kv, options.max_num_seqs * needed)
    if max_model_len is not None and budget < needed:
        raise CapacityError(
            f"max_model_len: {max_model_len} tokens need {needed} bytes of KV cache, got {budget}; "
            "expected a larger kv_bytes or fewer tokens"
        )
    return replace(options, num_pages=max(budget // per_page, 1), max_model_len=length)


def activation_bytes(config: OmniConfig, dtype: torch.dtype, tokens: int, sequences: int) -> int:
    """Most memory that a step of ``tokens`` tokens and ``sequences`` answers, or one encoder, works in.

    A step: the residual stream, then the larger of the attention's and the feed-forward's tensors, for every
    token; and for every answer its float32 logits with two copies. An encoder: the same sum over its rows. A
    product of the library that has a bias, a residual or a gate leaves float32 sums beside its result, each
    as large as two values of bfloat16. A tenth is added, since freed tensors leave gaps.
    """
    size = dtype.itemsize
    rows = [thinker_values(config.thinker) * tokens * size + 3 * 4 * config.thinker.vocab_size * sequences]
    if config.vision:
        pixels = config.vision.patch_dim * (4 + size)  # as they come in float32, and converted
        rows.append(MEDIUM_PATCHES * (pixels + vision_values(config.vision) * size))
    rows += [RECORDING_FRAMES[name] * audio_values(audio) * size for name, audio in config.audio.items()]
    return max(rows) * 11 // 10


def thinker_values(config: ThinkerConfig) -> int:
    """Values per token that a layer has at once."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    stream = 4 * hidden  # embeddings, residual, its norm, the block's output
    # The projection of all heads, rotated queries, the attention's output.
    attention = (3 * heads + 2 * config.num_key_value_heads) * config.head_dim
    # The sums of gate and up, and the inner row.
    dense = 5 * (config.intermediate_size or 0) if config.num_dense_layers else 0
    # Of each chosen expert its inner row, its output and 12 bytes of routing; the shared expert's sums and
    # inner row, or that and its output; the logits.
    chosen = config.num_experts_per_tok * (config.moe_intermediate_size + hidden + 6)
    width = config.num_shared_experts * config.moe_intermediate_size
    shared = max(5 * width, width + hidden)
    return stream + max(attention, dense, chosen + shared + 2 * config.num_experts)


def vision_values(config: VisionConfig) -> int:
    """Values per patch that a block has at once; every patch also has its row of cosines and sines."""
    stream = 3 * config.hidden_size + 2 * config.head_dim
    # The projection of all heads with its sums; the sums of gate and up, and the inner row.
    return stream + max(9 * config.hidden_size, 5 * config.intermediate_size)


def audio_values(config: WhisperConfig | SanmConfig) -> int:
    """Values per encoder frame that a block has at once, with what its convolution unfolds."""
    if isinstance(config, WhisperConfig):
        return 3 * config.n_state + 3 * 4 * config.n_state  # the inner row, four times as wide, with its sums
    unfolded = 2 * config.kernel_size * config.output_size  # in float32
    inner = 3 * max(config.linear_units, 3 * config.output_size)  # with its sums
    return 4 * config.output_size + max(unfolded, inner, 2 * config.input_size)
