"""Streaming of a piece of speech in v1.5: which audio tokens become sound when, and how that is joined."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

HOP = 50
"""Tokens of a chunk, which is also the chunk length of the flow's attention."""
LOOKAHEAD = 3
"""Tokens after a chunk that the flow has to see."""
OVERLAP = 3840
"""Samples in which one chunk fades into the next: 8 frames of 480."""


@dataclass(frozen=True)
class Chunk:
    """One call of flow and vocoder."""

    tokens: int
    """The call gets that many tokens from the beginning of the piece."""
    offset: int
    """Sound is wanted from this token on."""
    is_last: bool
    """The sound goes to the end of the tokens. The flow then uses full attention; otherwise the last
    ``LOOKAHEAD`` tokens are only looked at, and attention is chunked."""


class ChunkSchedule:
    """Decides when the next chunk of a piece can be made.

    The chunks depend only on the number of tokens: every ``HOP`` tokens make one, the first of them longer so
    that voice prompt and chunk together end on a multiple of ``HOP``. The original looks at the clock too: if
    the talker has finished when a longer first chunk has been made, a rest that is not longer than that chunk
    with its look-ahead is one last chunk. ``hurried`` does so.

    Args:
        prompt_tokens: audio tokens of the voice prompt that the flow gets in front.
        hurried: see above.
    """

    def __init__(self, prompt_tokens: int, *, hurried: bool = False) -> None:
        self._first_hop = HOP + -prompt_tokens % HOP
        self._hurried = hurried
        self._offset = 0
        self._rest_hop = 0  # hurried: a rest below this and the look-ahead is the last chunk
        self.finished = False
        """The last chunk has been given."""

    def next(self, available: int, done: bool) -> Chunk | None:
        """The next chunk, or None where it needs more tokens, or the piece is over or has no tokens at all.

        Call again, without waiting, after each chunk that is not the last one.

        Args:
            available: tokens of the piece there are by now.
            done: there will be no more of them.
        """
        if self.finished:
            return None
        hop = self._first_hop if self._offset == 0 else HOP
        rest = available - self._offset
        if done and rest < max(hop, self._rest_hop) + LOOKAHEAD:
            self.finished = True
            return Chunk(available, self._offset, True) if available else None
        self._rest_hop = 0
        if rest < hop + LOOKAHEAD:
            return None
        chunk = Chunk(self._offset + hop + LOOKAHEAD, self._offset, False)
        self._offset += hop
        self._rest_hop = hop if self._hurried else 0
        return chunk


class SpeechJoiner:
    """Joins the sound of successive chunks, each of which begins with a second version of the last samples.

    The last ``OVERLAP`` samples of a chunk are held back and faded into the beginning of the next one.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def push(self, speech: Tensor, is_last: bool) -> Tensor:
        """The samples that are now final: f32 ``[b, n]``, n at least ``OVERLAP`` -> f32 ``[b, m]``.

        Raises:
            ValueError: fewer samples than the overlap.
        """
        if self._held is not None:
            speech = crossfade(speech, self._held)
        if is_last:
            self._held = None
            return speech
        if speech.shape[-1] < OVERLAP:
            raise ValueError(f"speech: expected {OVERLAP} samples or more, got {speech.shape[-1]}")
        self._held = speech[..., -OVERLAP:]
        return speech[..., :-OVERLAP]


def crossfade(speech: Tensor, before: Tensor) -> Tensor:
    """Fade ``before`` into the beginning of ``speech``, with the two halves of a symmetric Hamming window.

    The halves add up to 1.08, so the overlap is a little louder than either side, as in the original.

    Args:
        speech: float ``[b, n]``.
        before: float ``[b, m]``, m up to n.

    Returns:
        ``speech`` with another beginning, same shape and dtype; computed in float64.

    Raises:
        ValueError: ``before`` is longer than ``speech``.
    """
    length = before.shape[-1]
    if length > speech.shape[-1]:
        raise ValueError(f"speech: expected {length} samples or more, got {speech.shape[-1]}")
    rising, falling = _fades(length, speech.device)
    head = speech[..., :length].double() * rising + before.double() * falling
    return torch.cat([head.to(speech.dtype), speech[..., length:]], dim=-1)


@lru_cache(maxsize=4)
def _fades(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """f64 ``[length]`` each: the factors of the new and of the old samples."""
    window = torch.from_numpy(np.hamming(2 * length)).to(device)
    return window[:length], window[length:]
