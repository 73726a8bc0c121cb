"""The one noise table that the flow of v1.5 starts every piece from."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

CHANNELS = 80
MAX_FRAMES = 15000
"""300 seconds at 50 frames per second."""


def fixed_noise(frames: int) -> np.ndarray:
    """Standard normal noise, f32 ``[1, 80, frames]``, read-only: the first frames of the table.

    The table is torch's ``randn`` on the CPU with seed 0, up to the last bits of logarithm and cosine, and
    does not depend on torch. It is made on first use, in less than a tenth of a second, and kept (4.8 MB).

    Raises:
        ValueError: more frames than the table has.
    """
    if not 0 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames: expected 0 to {MAX_FRAMES}, got {frames}")
    return _table()[:, :, :frames]


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    size = CHANNELS * MAX_FRAMES
    # The 32-bit outputs of the Mersenne Twister; numpy keeps this stream the same for ever.
    raw = np.random.RandomState(0).randint(0, 1 << 32, size, dtype=np.uint32)
    uniform = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    # Box-Muller on blocks of 16: eight radii, then the eight angles that go with them.
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    table = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(
        1, CHANNELS, MAX_FRAMES
    )
    table.flags.writeable = False
    return table
