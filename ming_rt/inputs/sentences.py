"""Cuts text into the pieces that the talkers of v1 and v1.5 speak one at a time.

v1 cuts a whole reply with ``pieces``. v1.5 speaks while the reply is being written: ``SentenceSplitter``
collects groups of about a sentence, and each group is cut like a reply.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ming_rt.errors import InvalidRequestError
from ming_rt.inputs.speech_text import han_count, normalise

MAX_LENGTH = 50
"""Characters of a piece that the talkers were driven with."""

_ENDS = "！？，。!?,"
_MIN_TAIL = 5  # a shorter rest does not join a finished sentence
_FIRST_GROUP, _NEXT_GROUP = 12, 8  # elements before a mark ends a group


@dataclass(frozen=True)
class Piece:
    """Normalised text to be spoken in one go; ``group`` counts the sentence groups of the reply from 0.

    Only pieces of group 0 are spoken as a stream of short chunks, later ones in one chunk each.
    """

    text: str
    group: int


def pieces(text: str, max_length: int = MAX_LENGTH) -> list[str]:
    """The normalised ``text`` in pieces of about ``max_length`` (at least 1) characters, none empty."""
    return [piece for piece in cut(text, max_length) if piece]


def cut(text: str, max_length: int) -> list[str]:
    """``pieces`` with the empty ones that a text without anything to be spoken gives."""
    if max_length < 1:
        raise InvalidRequestError(f"max_length: expected 1 or more, got {max_length}")
    text = normalise(text.replace("\n", " ")).replace("。，", "。")
    if len(text) <= max_length:
        return [text]
    out: list[str] = []
    for sentence in _parts(text, "。"):
        for clause in _parts(sentence, "，"):
            clause = clause.replace("。，", "。")
            size = max_length if han_count(clause) > max_length else len(clause)
            for start in range(0, len(clause), size):
                _add(out, clause[start : start + size], max_length)
    return out


def split_sentences(text: str, max_length: int = MAX_LENGTH) -> list[Piece]:
    """All pieces of a whole reply, exactly as v1.5 speaks it."""
    splitter = SentenceSplitter(max_length, chinese=any(map(_is_chinese, text)))
    return splitter.push(text) + splitter.flush()


class SentenceSplitter:
    """Collects the text of a reply in groups of about a sentence and gives their pieces as they get ready.

    A reply with Chinese characters is read character by character, another one word by word (split at white
    space, so a word counts when the space after it has come). Which one a reply is, is known at its first
    Chinese character; text since the last finished group is then read again. ``chinese`` says beforehand
    that one will come.

    How the reply is divided among calls of ``push`` makes no difference. The pieces are those of the whole
    reply, ``split_sentences``, unless its first Chinese character comes after a finished group of other text.
    Pieces without anything to be spoken are left out, and so are groups without any pieces.
    """

    def __init__(self, max_length: int = MAX_LENGTH, *, chinese: bool = False) -> None:
        self._max_length = max_length
        self._by_words = not chinese
        self._unread: list[str] = []  # by words: characters since the last group
        self._word: list[str] = []
        self._group: list[str] = []  # words or characters
        self._has_chinese = False  # the group has a Chinese character
        self._count = 0

    def push(self, text: str) -> list[Piece]:
        """Take the next part of the reply, of any length; returns the pieces that are now certain."""
        out: list[Piece] = []
        for char in text:
            if char == "-":
                continue
            if self._by_words and _is_chinese(char):
                again, self._by_words = self._unread, False
                self._unread, self._word, self._group = [], [], []
                for earlier in again:
                    out += self._take(earlier)
            if not self._by_words:
                out += self._take(char)
                continue
            self._unread.append(char)
            if not char.isspace():
                self._word.append(char)
            elif self._word:
                word, self._word = "".join(self._word), []
                out += self._take(word)
        return out

    def flush(self) -> list[Piece]:
        """The pieces of the rest; to be called once, at the end of the reply."""
        out = self._take("".join(self._word)) if self._word else []
        self._word = []
        if re.search("[a-zA-Z1-9\u4e00-\u9fff]", "".join(self._group)):
            out += self._finish()
        return out

    def _take(self, element: str) -> list[Piece]:
        """Add a character or word to the group; its pieces if it is then complete."""
        last, group = element[-1], self._group
        if self._is_long() and (last in _ENDS or (last == "." and group[-1][-1:] not in tuple("0123456789"))):
            self._append(element)
            return self._finish()
        if last == "\n":
            if not group:
                return []
            if not self._has_chinese:
                self._append(element[:-1])
            elif _is_chinese(group[-1][-1:]):
                self._append("，")
            return self._finish() if self._is_long() else []
        if element != " ":
            self._append(element)
        return []

    def _append(self, element: str) -> None:
        self._group.append(element)
        self._has_chinese = self._has_chinese or any(map(_is_chinese, element))

    def _is_long(self) -> bool:
        return len(self._group) >= (_NEXT_GROUP if self._count else _FIRST_GROUP)

    def _finish(self) -> list[Piece]:
        text = ("" if self._has_chinese else " ").join(self._group)
        self._group, self._unread, self._has_chinese = [], [], False
        spoken = [piece.removeprefix("，") for piece in cut(text, self._max_length)]
        out = [Piece(piece, self._count) for piece in spoken if piece]
        self._count += bool(out)
        return out


def _is_chinese(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"


def _parts(text: str, mark: str) -> list[str]:
    """What stands between the marks, trimmed, each ending in ``mark`` or a mark of its own."""
    parts = (part.strip() for part in text.split(mark))
    return [part if part[-1] in _ENDS else part + mark for part in parts if part]


def _add(out: list[str], part: str, max_length: int) -> None:
    """Join ``part`` to the last piece if there is room, else begin a new one."""
    count = han_count(part)
    fits = bool(out) and len(out[-1]) + count <= max_length
    if fits and not (out[-1].endswith("。") and count < _MIN_TAIL):
        out[-1] += part
    else:
        out.append(part.lstrip("，") if out else part)
