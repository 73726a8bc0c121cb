"""What a talker reads for one piece of text: its two id streams, positions, and what happens at each step.

At every place the talker sees the sum of two embeddings, of an audio id and of a text id. Both streams begin
with the same head::

    <prompt> </prompt> <thinker_prefix> <audio_pad>... </thinker_prefix> <vp> <audio_pad> </vp>

where the rows of the language model's states and the speaker's row are put in place of the embeddings. Then

* preview: ``<audio_bos>`` beside the first text id; the other text ids follow one per step.
* v1: the same with the text of the voice prompt in front. Its audio is forced on the first steps.
* v1.5: ``<audio_bos>`` and the audio of the voice prompt beside all of the text; only padding follows.

Step ``s`` is the choice of an audio id from the logits of the ``s``-th call of the network, call 0 being the
prefill. That id and the text id of the step are what call ``s + 1`` gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ming_rt.config import Generation
from ming_rt.errors import InvalidRequestError

MAX_STEPS = 1000
"""Steps of one piece at most, forced ones included."""

_MIN_STEPS = 10  # of v1 (after the voice prompt) and v1.5, before the end may be chosen


@dataclass(frozen=True)
class TalkerIds:
    """The ids of the special tokens in the talker's tokenizer and of the first audio token."""

    prompt_start: int
    prompt_end: int
    thinker_start: int
    thinker_end: int
    speaker_start: int
    speaker_end: int
    audio_bos: int
    audio_eos: int
    audio_pad: int
    text_eos: int
    text_pad: int
    first_audio: int

    @classmethod
    def find(cls, token_id: Callable[[str], int], text_vocab_size: int) -> TalkerIds:
        """Ids looked up by ``token_id``; audio ids follow the ``text_vocab_size`` text ids."""
        return cls(**{name: token_id(token) for name, token in _TOKENS.items()}, first_audio=text_vocab_size)


_TOKENS = {
    "prompt_start": "<prompt>",
    "prompt_end": "</prompt>",
    "thinker_start": "<thinker_prefix>",
    "thinker_end": "</thinker_prefix>",
    "speaker_start": "<vp>",
    "speaker_end": "</vp>",
    "audio_bos": "<audio_bos>",
    "audio_eos": "<audio_eos>",
    "audio_pad": "<audio_pad>",
    "text_eos": "<text_eos>",
    "text_pad": "<text_pad>",
}


@dataclass(frozen=True)
class TalkerPrompt:
    """Inputs of the prefill and the script of the steps after it."""

    audio_ids: np.ndarray
    """i64 ``[L]``"""
    text_ids: np.ndarray
    """i64 ``[L]``"""
    positions: np.ndarray
    """i64 ``[L]``; all equal in preview and v1."""
    thinker_rows: slice
    """Rows of the language model's states, which replace the embeddings; empty without them."""
    speaker_row: int
    """Row of the speaker vector, which replaces the embedding."""
    later_text: tuple[int, ...]
    """Text ids of the steps; the last one repeats."""
    forced: tuple[int, ...]
    """Audio ids that are fed on the first steps whatever was chosen, and are not part of the answer."""
    ban_steps: int
    """On that many first steps ``<audio_eos>`` cannot be chosen."""

    def text_id(self, step: int) -> int:
        """The text id that is fed with the audio id of ``step``."""
        return self.later_text[min(step, len(self.later_text) - 1)]

    def position(self, step: int) -> int:
        """Where the ids of ``step`` stand when they are fed.

        v1 begins its next piece at the position of the last ids it fed, see ``talker_prompt``.
        """
        return int(self.positions[-1]) + 1 + step


def talker_prompt(
    generation: Generation,
    ids: TalkerIds,
    text: Sequence[int],
    *,
    thinker_length: int = 0,
    prompt_text: Sequence[int] = (),
    prompt_audio: Sequence[int] = (),
    position: int | None = None,
) -> TalkerPrompt:
    """The prompt of one piece.

    Args:
        generation: ``preview``, ``v1`` or ``v1.5``.
        text: ids of the piece, at least one.
        thinker_length: number of rows of the language model's states, 0 = none are given.
        prompt_text: ids of what is said in the voice prompt (v1, v1.5).
        prompt_audio: BPE audio tokens of the voice prompt, counted from 0 (v1, v1.5).
        position: v1, from the second piece of a reply on: where the piece before it stopped. Distances
            between tokens stay the same, but the end may then be chosen earlier, usually at once.

    Raises:
        InvalidRequestError: no text; v1.5: the texts have more tokens than the audio of the voice prompt, so
            that they do not fit beside it; a voice prompt for preview; flash, which has another talker.
    """
    if generation not in ("preview", "v1", "v1.5"):
        raise InvalidRequestError(f"generation: expected preview, v1 or v1.5, got {generation}")
    if not len(text):
        raise InvalidRequestError("text: nothing to be spoken is left in it")
    if generation == "preview" and (len(prompt_text) or len(prompt_audio)):
        raise InvalidRequestError("voice prompt: the talker of preview takes a speaker vector only")
    head = [ids.prompt_start, ids.prompt_end, ids.thinker_start, *[ids.audio_pad] * thinker_length]
    head += [ids.thinker_end, ids.speaker_start, ids.audio_pad, ids.speaker_end]
    voice = [ids.first_audio + int(token) for token in prompt_audio]
    words = [*map(int, prompt_text), *map(int, text)]
    if generation == "v1.5":
        if len(words) > len(voice):
            raise InvalidRequestError(
                f"text: its {len(text)} tokens and the {len(prompt_text)} of the voice prompt do not fit "
                f"beside that prompt's {len(voice)} audio tokens; expected less text or a longer voice prompt"
            )
        beside = [*words, ids.text_eos, *[ids.text_pad] * (len(voice) - len(words))]
        later, forced, ban_steps = [ids.text_pad], [], _MIN_STEPS
        audio = [ids.audio_bos, *voice]
        positions = np.arange(len(head) + len(audio))
    else:
        audio, beside = [ids.audio_bos], words[:1]
        later, forced = [*words[1:], ids.text_eos, ids.text_pad], voice
        positions = np.full(len(head) + 1, len(head) if position is None else position)
        # The end is ruled out by position, which counts the head but not where it began.
        ban_steps = max(len(voice) + _MIN_STEPS - int(positions[0]), 0) if generation == "v1" else 0
    return TalkerPrompt(
        audio_ids=np.array(head + audio, dtype=np.int64),
        text_ids=np.array(head + beside, dtype=np.int64),
        positions=positions.astype(np.int64),
        thinker_rows=slice(3, 3 + thinker_length),
        speaker_row=5 + thinker_length,
        later_text=tuple(later),
        forced=tuple(forced),
        ban_steps=ban_steps,
    )
