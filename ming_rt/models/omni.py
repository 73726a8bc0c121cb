"""The whole model: encoders turn media into unit-length rows, the thinker reads them among the words.

Before the engine a prompt takes two steps: ``plan`` (positions and routers, cheap) and ``encode`` (encoders).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ming_rt.config import AudioConfig, OmniConfig, VisionConfig, WhisperConfig
from ming_rt.errors import UnsupportedError
from ming_rt.layers.linear import Replicated
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.models.audio_sanm import SanmEncoder
from ming_rt.models.audio_whisper import WhisperEncoder
from ming_rt.models.fusion import MediaEmbeds, router_modality, scatter
from ming_rt.models.positions import position_ids
from ming_rt.models.projector import AudioProjector, VisionProjector, l2_normalize
from ming_rt.models.thinker import Thinker
from ming_rt.models.vision import VisionTower
from ming_rt.runtime.comm import Comm
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource

if TYPE_CHECKING:
    from ming_rt.inputs.processor import Prompt


# A memo stands around the encoders: it gets the content of each medium and a function that encodes those at
# the given indices, and returns the features of all (a list per medium).
Content = Sequence[np.ndarray | str]
Encode = Callable[[list[int]], list[list[torch.Tensor]]]
Memo = Callable[[Sequence[Content], Encode], list[list[torch.Tensor]]]


def no_memo(items: Sequence[Content], encode: Encode) -> list[list[torch.Tensor]]:
    """Remembers nothing."""
    return encode(list(range(len(items))))


@dataclass(frozen=True)
class Plan:
    """Positions i32 ``[3, S]``, router per token u8 ``[S]``, and the offset of generated tokens.

    The token decoded with ``n`` tokens in the cache has position ``n + delta`` on all axes, the text router.
    """

    positions: np.ndarray
    delta: int
    modality: np.ndarray


class VisionEncoder:
    """Vision tower and projector (``linear_proj``)."""

    def __init__(self, config: VisionConfig, src: WeightSource, hidden: int, depth: int) -> None:
        self.tower = VisionTower(config, src)
        self.projector = VisionProjector(src, "linear_proj", config.out_hidden_size, hidden, depth)

    def __call__(self, pixels: torch.Tensor, grid_thw: np.ndarray, tap: Tap = no_tap) -> torch.Tensor:
        """Patches f32 ``[N, patch_dim]``, grids ``[n, 3]`` -> unit rows ``[N / 4, H]``."""
        return l2_normalize(self.projector(self.tower(pixels, grid_thw, tap)))


class AudioEncoder:
    """Whisper or SANM encoder and its projector."""

    def __init__(self, config: AudioConfig, src: WeightSource, hidden: int, depth: int) -> None:
        self.config = config
        kind = WhisperEncoder if isinstance(config, WhisperConfig) else SanmEncoder
        self.encoder: WhisperEncoder | SanmEncoder = kind(config, src)
        self.projector = AudioProjector(
            src,
            config.proj_prefix,
            config.output_size,
            hidden,
            depth,
            config.ds_kernel_size,
            config.ds_stride,
        )

    def __call__(self, segments: list[torch.Tensor], tap: Tap = no_tap) -> list[torch.Tensor]:
        """All segments of one request, f32 ``[T_i, F]`` -> rows ``[L_i, H]`` of each."""
        features = self.encoder.lengths([len(segment) for segment in segments])
        projected = self.projector(self.encoder(segments, tap))
        rows = [item[: self.projector.length(count)] for item, count in zip(projected, features, strict=True)]
        return [l2_normalize(item) for item in rows] if self.config.norm_query_embeds else rows


class Omni:
    """All parts the checkpoint has: ``thinker``, ``vision`` or None, and ``audio`` by encoder name.

    Everything lives on ``device``; prompts come as arrays of the host and are moved there. Ranks share the
    thinker; every rank that encodes media holds whole encoders.
    """

    def __init__(self, config: OmniConfig, src: WeightSource, comm: Comm | None = None) -> None:
        self.config, self.device = config, src.device
        whole = Replicated(src)
        hidden, depth = config.thinker.hidden_size, config.mlp_depth
        self.vision = VisionEncoder(config.vision, whole, hidden, depth) if config.vision else None
        self.audio = {name: AudioEncoder(part, whole, hidden, depth) for name, part in config.audio.items()}
        self.thinker = Thinker(config.thinker, src, comm)

    def plan(self, prompt: Prompt) -> Plan:
        """Positions and routers of a prompt.

        Raises:
            InvalidRequestError: placeholders, grids and spans contradict each other.
        """
        positions, delta = position_ids(
            self.config.thinker,
            prompt.input_ids[None],
            image_grid_thw=prompt.image_grid_thw,
            video_grid_thw=prompt.video_grid_thw,
        )
        has_vision = prompt.pixel_values is not None or prompt.pixel_values_videos is not None
        modality = router_modality(self.config.thinker, prompt.input_ids, has_vision, prompt.audio_spans)
        return Plan(positions[:, 0].astype(np.int32), int(delta[0]), modality)

    def encode(self, prompt: Prompt, memo: Memo = no_memo) -> MediaEmbeds | None:
        """Features of all media of a prompt with the tokens they replace; None for a text prompt.

        ``memo`` may answer for media it has seen before; each picture and video counts on its own, recordings
        only together (Whisper pads them to the longest, which changes their features).

        Raises:
            UnsupportedError: the checkpoint has no encoder for a medium of the prompt.
            InvalidRequestError: feature and placeholder counts differ.
        """
        return scatter(
            self.config.thinker,
            prompt.input_ids,
            images=self._see(prompt.pixel_values, prompt.image_grid_thw, memo),
            videos=self._see(prompt.pixel_values_videos, prompt.video_grid_thw, memo),
            audios=self._hear(prompt, memo),
            audio_spans=prompt.audio_spans,
        )

    def _see(self, pixels: np.ndarray | None, grid_thw: np.ndarray | None, memo: Memo) -> torch.Tensor | None:
        if pixels is None or grid_thw is None:
            return None
        if self.vision is None:
            raise UnsupportedError("this checkpoint has no vision tower and cannot take images or videos")
        vision = self.vision
        pictures = np.split(pixels, grid_thw.prod(axis=1).cumsum()[:-1])

        def compute(missing: list[int]) -> list[list[torch.Tensor]]:
            return [[vision(*send([pictures[i]], self.device), grid_thw[i : i + 1])] for i in missing]

        found = memo([("vision", *item) for item in zip(pictures, grid_thw, strict=True)], compute)
        return torch.cat([feats for (feats,) in found])

    def _hear(self, prompt: Prompt, memo: Memo) -> list[torch.Tensor]:
        if not prompt.audio_feats:
            return []
        encoder = self.audio.get(prompt.audio_encoder or "")
        if encoder is None:
            raise UnsupportedError(
                f"this checkpoint has no {prompt.audio_encoder} audio encoder, "
                f"found {', '.join(sorted(self.audio)) or 'none'}"
            )
        segments = prompt.audio_feats

        def compute(_missing: list[int]) -> list[list[torch.Tensor]]:
            return [encoder(send(segments, self.device))]

        return memo([(prompt.audio_encoder or "", *segments)], compute)[0]
