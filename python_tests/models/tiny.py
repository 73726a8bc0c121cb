"""Tiny thinkers of every family with random weights, and the prompts to feed them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from thinker_harness import Prompt

from ming_rt.config import ThinkerConfig
from ming_rt.models.fusion import AUDIO, IMAGE, MediaEmbeds
from ming_rt.runtime.comm import Comm

FAMILIES = {
    "preview": {"norm_head": True, "multi_gate": True},
    "v1": {"multi_gate": True},
    "v1_one_router_biases": {"use_qkv_bias": True, "use_bias": True, "rms_norm_eps": 1e-5},
    "v1_dense_first": {"multi_gate": True, "first_k_dense_replace": 1, "num_shared_experts": 0},
    "v1.5": {"multi_gate": True, "rope_scaling": {"type": "3D", "factor": None}},
    "flash": {
        "model_type": "bailing_moe_v2",
        "router_type": "MultiRouter",
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "video_patch_token": 102,
        "rope_scaling": {"type": "video_rope", "factor": None},
    },
}


def tiny_config(family: str, **changes) -> ThinkerConfig:
    """The family's smallest configuration that still splits over two ranks."""
    return ThinkerConfig.from_dict(
        {
            "model_type": "bailing_moe",
            "vocab_size": 112,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "num_shared_experts": 2,
            "rope_theta": 600000,
            "use_bias": False,
            "image_patch_token": 100,
            "image_start_token": 101,
            "video_start_token": 103,
            **FAMILIES[family],
            **changes,
        }
    )


def random_prompt(length: int, hidden: int, seed: int) -> Prompt:
    """A prompt with an image and an audio at random places, positions that are no simple count."""
    rng = np.random.default_rng(seed)
    modality = np.zeros(length, np.uint8)
    middle = length // 2
    modality[1:middle] = IMAGE
    modality[middle + 1 : length - 1] = AUDIO
    rows = np.flatnonzero(modality)
    feats = torch.from_numpy(rng.standard_normal((len(rows), hidden), dtype=np.float32))
    media = MediaEmbeds(rows, torch.nn.functional.normalize(feats, dim=-1))
    positions = np.cumsum(rng.integers(0, 2, (3, length)), axis=1)
    return Prompt(rng.integers(0, 100, length), positions, 7 - length, modality, media)


class ThreadComm(Comm):
    """One rank of a group of threads in this process."""

    def __init__(self, rank: int, shared: list, barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self.rank] = x
        self._barrier.wait()
        parts = list(self._shared)
        self._barrier.wait()
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=-1)


def run_ranks(world: int, work: Callable[[ThreadComm], torch.Tensor]) -> list[torch.Tensor]:
    """``work(comm)`` on every rank at once; the results by rank."""
    barrier, shared = threading.Barrier(world), [None] * world
    results: list = [None] * world

    def rank_main(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = work(ThreadComm(rank, shared, barrier))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results
