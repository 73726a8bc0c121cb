"""The one noise table that the flow of v1.5 starts every piece from."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

FRAMES = 15000
"""300 seconds at 50 frames per second."""


@lru_cache(maxsize=2)
def fixed_noise(channels: int = 80) -> np.ndarray:
    """Standard normal noise, f32 ``[channels, FRAMES]``, read-only; a piece takes the first of the frames.

    The table is torch's ``randn`` on the CPU with seed 0, up to the last bits of logarithm and cosine, and
    needs nothing of torch. It is made on first use, in about a tenth of a second, and kept (4.8 MB).
    """
    size = channels * FRAMES
    # The 32-bit outputs of the Mersenne Twister; numpy keeps this stream the same for ever.
    raw = np.random.RandomState(0).randint(0, 1 << 32, size + 16, dtype=np.uint32)
    uniform = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    table = _normal(uniform[: size - size % 16])
    if size % 16:  # the last 16 values are then drawn again
        table = np.concatenate([table, table[:16]])[:size]
        table[-16:] = _normal(uniform[size:])
    table.flags.writeable = False
    return table.reshape(channels, FRAMES)


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller on blocks of 16: eight radii, then the eight angles that go with them."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
