"""Position ids of a prompt: 1-D (preview, v1), three-axis MRoPE (v1.5) and centred video_rope (flash).

Every form returns the same thing, positions ``[3, b, S]`` on the axes (t, h, w) and one ``delta`` per row, so
that the rest of the runtime does not know which rule made them: the token decoded with ``n`` tokens in the
cache stands at ``n + delta`` on all three axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ming_rt.config import ThinkerConfig
from ming_rt.errors import InvalidRequestError

MERGE = 2  # patches per side of one visual token
TOKENS_PER_SECOND = 2  # temporal units per second, also the step between two temporal slices of video_rope


def position_ids(
    config: ThinkerConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    second_per_grid_ts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a padded batch of prompts.

    Args:
        config: rope type and the literal token ids of config.json (never corrected, never guessed).
        input_ids: i64 ``[b, S]``.
        attention_mask: ``[b, S]``, 0 on pads (either side); pads get position 1.
        image_grid_thw, video_grid_thw: i64 ``[n, 3]`` rows (t, h, w) in 14x14 patches, whole batch in order.
        second_per_grid_ts: seconds per temporal slice of each video; without it slices are one unit apart
            (two for video_rope).

    Returns:
        positions i64 ``[3, b, S]`` and delta i64 ``[b]``.

    Raises:
        InvalidRequestError: the placeholders of a row do not fit the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
    images, videos = _grid_rows(image_grid_thw), _grid_rows(video_grid_thw)
    if config.rope.type not in ("3D", "video_rope") or (images is None and videos is None):
        line = np.where(mask != 0, np.cumsum(mask, axis=1) - 1, 1)
        return np.stack([line] * 3), line.max(axis=1) + 1 - ids.shape[1]

    seconds = still = None
    if second_per_grid_ts is not None:
        seconds = np.asarray(second_per_grid_ts, dtype=np.float32)
        still = None if images is None else np.zeros(len(images), dtype=np.float32)
    kinds = (
        _Kind("image", config.image_patch_token, config.image_start_token, images, still),
        _Kind("video", config.video_patch_token, config.video_start_token, videos, seconds),
    )
    positions = np.ones((3, *ids.shape), dtype=np.int64)
    delta = np.empty(ids.shape[0], dtype=np.int64)
    for row, valid in enumerate(mask != 0):
        placed, used = _place(ids[row, valid], *kinds, centred=config.rope.type == "video_rope")
        positions[:, row, valid] = placed
        delta[row] = used - ids.shape[1]
    return positions, delta


def _grid_rows(grid: np.ndarray | None) -> np.ndarray | None:
    return None if grid is None or len(grid) == 0 else np.asarray(grid, dtype=np.int64)


@dataclass
class _Kind:
    """The images or the videos of a batch; ``used`` counts their grids over all rows."""

    name: str
    patch: int
    start: int | None
    grids: np.ndarray | None
    seconds: np.ndarray | None
    used: int = 0

    def count(self, tokens: np.ndarray) -> int:
        """Blocks in a row: start tokens with a patch token behind them, if there are grids at all."""
        if self.grids is None:
            return 0
        return int(np.count_nonzero((tokens[:-1] == self.start) & (tokens[1:] == self.patch)))

    def find(self, tokens: np.ndarray, begin: int) -> int:
        """The first patch token from ``begin`` on, or the row's end."""
        found = np.flatnonzero(tokens[begin:] == self.patch)
        return begin + int(found[0]) if len(found) else len(tokens)

    def take(self) -> tuple[list[int], np.float32 | None]:
        """Merged grid (t, h, w) of the next block, and its seconds per temporal slice."""
        grids = [] if self.grids is None else self.grids
        if self.used >= len(grids):
            raise InvalidRequestError(
                f"the prompt has more {self.name} blocks than the {len(grids)} grids given"
            )
        time, height, width = grids[self.used].tolist()
        seconds = None if self.seconds is None else self.seconds[self.used]
        self.used += 1
        return [time, height // MERGE, width // MERGE], seconds


def _place(tokens: np.ndarray, images: _Kind, videos: _Kind, *, centred: bool) -> tuple[np.ndarray, int]:
    """Positions ``[3, n]`` of one row without pads, and the position that follows it."""
    image_count, video_count = images.count(tokens), videos.count(tokens)
    parts: list[np.ndarray] = []
    begin, base = 0, np.float32(0)  # fp32: fractions of seconds carry on until the final truncation
    while image_count or video_count:
        image_at = images.find(tokens, begin) if image_count else len(tokens)
        video_at = videos.find(tokens, begin) if video_count else len(tokens)
        if image_at < video_at:
            grid, seconds = images.take()
            image_count -= 1
        else:  # also where both kinds share one patch id: the next video goes first, whatever the prompt says
            grid, seconds = videos.take()
            video_count -= 1
        at, length = min(image_at, video_at), math.prod(grid)
        if at + length > len(tokens):
            raise InvalidRequestError(
                f"a visual block needs {length} placeholder tokens, found {len(tokens) - at} before the end"
            )
        parts.append(_line(base, at - begin))
        block = _block(base + np.float32(at - begin), grid, seconds, centred)
        parts.append(block)
        base = (block[0] if centred else block).max() + 1  # centred: time alone moves the text on
        begin = at + length
    placed = np.concatenate([*parts, _line(base, len(tokens) - begin)], axis=1)
    return placed.astype(np.int64), int((placed[0] if centred else placed).max()) + 1


def _line(base: np.float32, length: int) -> np.ndarray:
    """Text: all axes count on together."""
    return np.tile(base + np.arange(length, dtype=np.float32), (3, 1))


def _block(base: np.float32, grid: list[int], seconds: np.float32 | None, centred: bool) -> np.ndarray:
    """Positions ``[3, t * h * w]`` of one image or video, t slowest."""
    time, height, width = grid
    tau = np.arange(time, dtype=np.float32)
    if seconds is not None:
        tau = tau * seconds * np.float32(TOKENS_PER_SECOND)
        tau = tau if centred else np.trunc(tau)
    elif centred:
        tau = tau * np.float32(TOKENS_PER_SECOND)
    t, y, x = np.meshgrid(base + tau, np.arange(height), np.arange(width), indexing="ij")
    if centred:  # the spatial axes lie around the temporal one
        y, x = t + y - (height - 1) // 2, t + x - (width - 1) // 2
    else:
        y, x = base + y, base + x
    return np.stack([t, y, x]).reshape(3, -1).astype(np.float32)
