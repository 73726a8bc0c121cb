"""Text to token ids and back, from a checkpoint's tokenizer.json or tokenizer.model.

Special tokens are taken out of the backend and matched here, so that only text the caller trusts can ever
become a special id: a user who types ``<role>`` gets the ids of those six characters. Decoding joins the
bytes of all kept tokens before reading them as UTF-8; a character may be spread over several tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from ming_rt.config import Generation
from ming_rt.errors import InvalidRequestError, TokenizerError
from ming_rt.strict_json import load_json

STOP_TOKEN: Mapping[Generation, str] = MappingProxyType(
    {"preview": "<|endoftext|>", "v1": "<|endoftext|>", "v1.5": "<|endoftext|>", "flash": "<|role_end|>"}
)

_MAX_FILE_BYTES = 256 << 20  # the largest real tokenizer.json is about 12 MB


class _Backend(Protocol):
    """What a vocabulary file has to provide."""

    special: dict[str, int]  # tokens that ordinary text never gives -> id
    visible: set[int]  # special ids that stay in the text when special tokens are skipped
    size: int  # highest id + 1, special tokens included
    adds_leading_space: bool  # the model puts a space before the text, to be dropped again when decoding

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never a special one."""

    def token_id(self, token: str) -> int | None:
        """Id of an ordinary vocabulary entry, as written in the file."""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes (possibly part of a character) of an ordinary id; empty where there is no token."""


def _byte_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte: printable bytes stay themselves, the rest follow 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _ByteLevel:
    """Byte-level BPE of a tokenizer.json."""

    adds_leading_space = False

    def __init__(self, path: Path) -> None:
        try:
            full = Backend.from_str(_read(path).decode("utf-8"))
        except TokenizerError:
            raise
        except BaseException as problem:
            # The library raises plain Exception, and for some files panics with a BaseException of its own.
            if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
                raise
            raise TokenizerError(f"{path}: the tokenizers library cannot read it ({problem})") from None
        model, decoder = full.model, full.decoder
        if not isinstance(model, models.BPE) or not isinstance(decoder, decoders.ByteLevel):
            raise TokenizerError(
                f"{path}: found a {type(model).__name__} model with decoder {type(decoder).__name__}, "
                "expected byte-level BPE (model BPE, decoder ByteLevel)"
            )
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if value := getattr(model, option):
                raise TokenizerError(f"{path}: found {option} {value!r}, expected none")
        added = full.get_added_tokens_decoder()
        for token in added.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise TokenizerError(
                    f"{path}: added token {token.content!r} has lstrip, rstrip or single_word set, "
                    "expected added tokens that match literally"
                )
        self.special = {token.content: token_id for token_id, token in added.items() if token.content}
        self.visible = {token_id for token_id, token in added.items() if not token.special}
        # Without its added tokens the same model reads any text as ordinary text; the model itself is shared.
        self._plain = Backend(model)
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        if full.pre_tokenizer is not None:
            self._plain.pre_tokenizer = full.pre_tokenizer
        vocab = self._plain.get_vocab(with_added_tokens=False)
        self.size = max([*vocab.values(), *added, -1]) + 1
        self._bytes = _byte_alphabet()
        if len(set(vocab.values())) != len(vocab):
            raise TokenizerError(f"{path}: two vocabulary entries share one id")
        missing = [f"0x{byte:02X}" for char, byte in self._bytes.items() if char not in vocab]
        if missing:
            raise TokenizerError(f"{path}: no token for the bytes {', '.join(missing[:8])}, expected all 256")
        # A special token that is a vocabulary entry too could come out of the model as one word.
        self._leaks = {i: text for text, i in self.special.items() if len(text) > 1 and vocab.get(text) == i}

    def encode(self, text: str) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self._leaks and not self._leaks.keys().isdisjoint(ids):
            return [j for i in ids for j in self._inert(i)]
        return ids

    def _inert(self, token_id: int) -> list[int]:
        text = self._leaks.get(token_id)
        return [token_id] if text is None else self.encode(text[0]) + self.encode(text[1:])

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._plain.id_to_token(token_id)
        return b"" if token is None else self.text_bytes(token)

    def text_bytes(self, token: str) -> bytes:
        """Bytes of a vocabulary entry; one with a character outside the alphabet stands for itself."""
        try:
            return bytes(self._bytes[char] for char in token)
        except KeyError:
            return token.encode("utf-8")


class _SentencePiece:
    """A sentencepiece tokenizer.model; tokenizer_config.json may declare further special tokens."""

    _USER_DEFINED, _CONTROL = 4, 3
    _MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)

    def __init__(self, path: Path) -> None:
        data = bytearray(_read(path))
        try:
            if not sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(bytes(data)):
                raise RuntimeError("no model in it")
            special: dict[str, int] = {}
            for index, (piece, kind_at) in enumerate(_pieces(data)):
                kind = data[kind_at] if kind_at else 1
                if kind == self._USER_DEFINED and self._MARKUP.fullmatch(piece):
                    # The library finds user-defined pieces in any text, control pieces in none.
                    kind = data[kind_at] = self._CONTROL
                if kind == self._CONTROL:
                    special[piece] = index
            self._model = sentencepiece.SentencePieceProcessor(model_proto=bytes(data))
        except (RuntimeError, IndexError, UnicodeDecodeError) as problem:
            raise TokenizerError(f"{path}: not a sentencepiece model ({problem})") from None
        self.special = special | _declared_special(path.with_name("tokenizer_config.json"))
        self.visible: set[int] = set()
        self.size = max(self._model.vocab_size(), *(i + 1 for i in self.special.values()), 0)
        self.adds_leading_space = self._model.encode("a", out_type=str)[:1] in (["▁a"], ["▁"])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def token_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def token_bytes(self, token_id: int) -> bytes:
        model = self._model
        if token_id >= model.vocab_size():
            return b""
        if model.is_byte(token_id):
            return bytes([int(model.id_to_piece(token_id)[3:5], 16)])
        if model.is_unknown(token_id):
            return model.decode([token_id]).encode("utf-8")
        return model.id_to_piece(token_id).replace("▁", " ").encode("utf-8")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as problem:
        raise TokenizerError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if len(data) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
    return data


def _fields(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Fields of a protobuf message: (field number, begin and end of the value)."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    at = start
    while at < end:
        tag, at = varint(at)
        kind = tag & 7
        if kind == 2:
            length, at = varint(at)
            stop = at + length
        else:
            stop = varint(at)[1] if kind == 0 else at + {1: 8, 5: 4}.get(kind, end)
        if stop > end:
            raise IndexError("truncated message")
        yield tag >> 3, at, stop
        at = stop


def _pieces(data: bytes | bytearray) -> Iterator[tuple[str, int]]:
    """Pieces of a serialized sentencepiece model in id order: (text, position of its type byte or 0)."""
    for number, begin, end in _fields(data, 0, len(data)):
        if number == 1:
            parts = {field: span for field, *span in _fields(data, begin, end)}
            text_begin, text_end = parts.get(1, (0, 0))
            yield data[text_begin:text_end].decode("utf-8"), parts.get(3, (0, 0))[0]


def _declared_special(path: Path) -> dict[str, int]:
    """Special tokens of a tokenizer_config.json (``added_tokens_decoder``: id -> {content, ...})."""
    if not path.exists():
        return {}
    config = load_json(path, error=TokenizerError)
    declared = config.get("added_tokens_decoder", {}) if isinstance(config, dict) else {}
    try:
        return {str(entry["content"]): int(token_id) for token_id, entry in declared.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TokenizerError(f"{path}: added_tokens_decoder: expected {{id: {{content: text}}}}") from None


class Tokenizer:
    """Encodes and decodes with one checkpoint's vocabulary; safe to share between threads."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        self.special: Mapping[str, int] = MappingProxyType(backend.special)
        self._special_text = {token_id: text for text, token_id in backend.special.items()}
        longest_first = sorted(backend.special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met; the same value whoever writes it

    @classmethod
    def from_dir(cls, directory: str | Path, model_vocab_size: int | None = None) -> Tokenizer:
        """Reads tokenizer.json, or tokenizer.model where there is no tokenizer.json.

        ``model_vocab_size`` is the number of embedding rows: a tokenizer with a higher id does not belong to
        the model. No code and no template of the checkpoint is run. Raises ``TokenizerError``.
        """
        directory = Path(directory)
        backend: _Backend
        if (path := directory / "tokenizer.json").is_file():
            backend = _ByteLevel(path)
        elif (path := directory / "tokenizer.model").is_file():
            backend = _SentencePiece(path)
        else:
            raise TokenizerError(f"{directory}: found neither tokenizer.json nor tokenizer.model")
        if model_vocab_size is not None and backend.size > model_vocab_size:
            raise TokenizerError(
                f"{path}: found token id {backend.size - 1}, expected ids below the model's vocabulary of "
                f"{model_vocab_size}"
            )
        return cls(backend)

    @property
    def size(self) -> int:
        """Highest token id + 1. The model may produce higher ids; they decode to nothing."""
        return self._backend.size

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of ``text``, without adding any token.

        ``allow_special`` turns literal special tokens (leftmost, longest) into their ids; by default they are
        inert ordinary text and no special id is ever produced.
        """
        return self.encode_segments([(text, allow_special)])

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a text given as (text, allow_special) pieces.

        Neighbouring stretches without special tokens are encoded as one string, as if the pieces had been
        joined first. Raises ``InvalidRequestError`` for text that is not valid Unicode.
        """
        ids: list[int] = []
        pending: list[str] = []

        def flush() -> None:
            if text := "".join(pending):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise InvalidRequestError("text has a lone surrogate, expected valid Unicode") from None
                ids.extend(self._backend.encode(text))
            pending.clear()

        for text, allow_special in segments:
            end = 0
            for match in self._special_pattern.finditer(text) if allow_special else ():
                pending.append(text[end : match.start()])
                flush()
                ids.append(self.special[match.group()])
                end = match.end()
            pending.append(text[end:])
        flush()
        return ids

    def token_id(self, token: str) -> int:
        """Id of a special token or vocabulary entry; raises ``TokenizerError`` where it does not exist."""
        token_id = self.special.get(token)
        if token_id is None:
            token_id = self._backend.token_id(token)
        if token_id is None:
            raise TokenizerError(f"the tokenizer has no token {token!r}, which this model needs")
        return token_id

    def stop_ids(self, generation: Generation) -> tuple[int, ...]:
        """Ids that end an answer of this generation."""
        return (self.token_id(STOP_TOKEN[generation]),)

    def is_special(self, token_id: int) -> bool:
        """Whether ``token_id`` is one of the special tokens."""
        return token_id in self._special_text

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Bytes the id contributes to the text; empty for an id without a token."""
        if (text := self._special_text.get(token_id)) is not None:
            skipped = skip_special and token_id not in self._backend.visible
            return b"" if skipped else text.encode("utf-8")
        if not 0 <= token_id < self._backend.size:
            return b""
        token = self._bytes.get(token_id)
        if token is None:
            token = self._bytes[token_id] = self._backend.token_bytes(token_id)
        return token

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become one U+FFFD per maximal invalid prefix."""
        stream = self.stream(skip_special)
        return "".join([*(stream.push(int(i)) for i in ids), stream.flush()])

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A new incremental decoder; what it emits adds up to ``decode`` of the same ids."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Decodes one answer id by id; an incomplete character is held back until it is complete or broken."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer._backend.adds_leading_space

    def push(self, token_id: int) -> str:
        """Text that became certain with this id."""
        token = self._tokenizer.token_bytes(token_id, self._skip_special)
        if token and self._drop_space:
            self._drop_space, token = False, token.removeprefix(b" ")
        text = self._utf8.decode(token)
        held = self._utf8.getstate()[0]
        if held[:1] == b"\xed" and held[1:] >= b"\xa0":
            # A surrogate, which no third byte can make valid; the codec would wait for that byte.
            text += self._utf8.decode(b"", final=True)
        return text

    def flush(self) -> str:
        """The held-back rest at the end of the answer, as U+FFFD; the decoder then starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._drop_space = self._tokenizer._backend.adds_leading_space
        return rest
