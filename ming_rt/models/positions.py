"""Position ids of a prompt: 1-D (preview, v1), three-axis MRoPE (v1.5) and centred video_rope (flash).

Every form returns the same thing, positions ``[3, b, S]`` on the axes (t, h, w) and one ``delta`` per row, so
that the rest of the runtime does not know which rule made them: the token decoded with ``n`` tokens in the
cache stands at ``n + delta`` on all three axes.
"""

from __future__ import annotations

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

    seconds = None if second_per_grid_ts is None else np.asarray(second_per_grid_ts, dtype=np.float32)
    blocks = _Blocks(config, images, videos, seconds)
    positions = np.ones((3, *ids.shape), dtype=np.int64)
    delta = np.empty(ids.shape[0], dtype=np.int64)
    for row, valid in enumerate(mask != 0):
        placed, used = blocks.place(ids[row, valid])
        positions[:, row, valid] = placed
        delta[row] = used - ids.shape[1]
    return positions, delta


def _grid_rows(grid: np.ndarray | None) -> np.ndarray | None:
    return None if grid is None or len(grid) == 0 else np.asarray(grid, dtype=np.int64)


class _Blocks:
    """Walks the rows of a batch in order; the grid counters run over the whole batch."""

    def __init__(
        self,
        config: ThinkerConfig,
        images: np.ndarray | None,
        videos: np.ndarray | None,
        seconds: np.ndarray | None,
    ) -> None:
        self.centred = config.rope.type == "video_rope"
        self.seconds = seconds
        self.kinds = [  # (patch id, start id, grids, next grid) of images, then of videos
            [config.image_patch_token, config.image_start_token, images, 0],
            [config.video_patch_token, config.video_start_token, videos, 0],
        ]

    def place(self, tokens: np.ndarray) -> tuple[np.ndarray, int]:
        """Positions ``[3, n]`` of one row without pads, and the first position after it."""
        left = [self._count(tokens, kind) for kind in self.kinds]
        parts: list[np.ndarray] = []
        start, nxt = 0, np.float32(0)
        while any(left):
            ends = [
                self._find(tokens, start, kind[0]) if n else len(tokens)
                for n, kind in zip(left, self.kinds, strict=True)
            ]
            which = 0 if ends[0] < ends[1] else 1  # one id for both kinds: the next video grid goes first
            left[which] -= 1
            grid, tau = self._next_grid(which)
            end, length = ends[which], int(grid.prod())
            if end + length > len(tokens):
                raise InvalidRequestError(
                    f"a visual block of {length} tokens does not fit the {len(tokens) - end} tokens that "
                    "follow its start; expected one placeholder per merged patch of each grid"
                )
            text = nxt + np.arange(end - start, dtype=np.float32)
            block, nxt = self._block(nxt + np.float32(end - start), grid, tau)
            parts += [np.stack([text] * 3), block]
            start = end + length
        tail = nxt + np.arange(len(tokens) - start, dtype=np.float32)
        placed = np.concatenate([*parts, np.stack([tail] * 3)], axis=1)
        last = placed[0].max() if self.centred else placed.max()
        return placed.astype(np.int64), int(last) + 1

    def _block(self, base: np.float32, grid: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.float32]:
        """Positions ``[3, T*H*W]`` of one visual block and the position after it."""
        _, height, width = grid
        t, y, x = np.meshgrid(base + tau, np.arange(height), np.arange(width), indexing="ij")
        if self.centred:  # the spatial axes lie around the temporal one, which alone moves the text on
            block = np.stack([t, t + y - (height - 1) // 2, t + x - (width - 1) // 2])
            used = block[0].max()
        else:
            block = np.stack([t, base + y, base + x])
            used = block.max()
        return block.reshape(3, -1).astype(np.float32), np.float32(used + 1)

    def _next_grid(self, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Merged grid (T, H, W) of the next image (0) or video (1) and its temporal offsets."""
        _, _, grids, index = self.kinds[which]
        if index >= len(grids):
            raise InvalidRequestError(
                f"the prompt has more {('images', 'videos')[which]} than the {len(grids)} grids given"
            )
        self.kinds[which][3] += 1
        time, height, width = grids[index]
        tau = np.arange(time, dtype=np.float32)
        if self.seconds is not None:
            tau = tau * (self.seconds[index] if which else np.float32(0))
            tau = tau * np.float32(TOKENS_PER_SECOND)
            tau = tau if self.centred else np.trunc(tau)
        elif self.centred:
            tau = tau * np.float32(TOKENS_PER_SECOND)
        return np.array([time, height // MERGE, width // MERGE]), tau

    @staticmethod
    def _count(tokens: np.ndarray, kind: list) -> int:
        patch, start, grids, _ = kind
        if grids is None:
            return 0
        return int(np.count_nonzero((tokens[:-1] == start) & (tokens[1:] == patch)))

    @staticmethod
    def _find(tokens: np.ndarray, start: int, patch: int) -> int:
        found = np.flatnonzero(tokens[start:] == patch)
        return start + int(found[0]) if len(found) else len(tokens)
