"""A one-line progress bar for long loads."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class ProgressBar:
    """Draws bytes done of bytes total on a terminal; silent where the stream is none or the job is small.

    Args:
        label: what is going on, e.g. "loading".
        stream: stderr by default.
        least: totals below this many bytes are not worth a bar.
    """

    def __init__(self, label: str, stream: TextIO | None = None, least: int = 1 << 30) -> None:
        self.label = label
        self.stream = sys.stderr if stream is None else stream
        self.least = least
        self._begin = self._drawn = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Draw ``done`` of ``total`` bytes, on a terminal and for big totals only."""
        if total < self.least or not self.stream.isatty():
            return
        now = time.monotonic()
        if done < total and now - self._drawn < 0.1:
            return
        self._drawn = now
        filled = 30 * done // total
        rate = done / 1e9 / max(now - self._begin, 1e-3)
        line = f"\r{self.label} [{'#' * filled}{'.' * (30 - filled)}] {done / 1e9:.1f}/{total / 1e9:.1f} GB"
        self.stream.write(f"{line} {rate:.1f} GB/s" + ("\n" if done >= total else ""))
        self.stream.flush()
