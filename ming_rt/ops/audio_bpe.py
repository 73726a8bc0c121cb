"""BPE audio tokens <-> codec tokens (contract: csrc/ops/audio_bpe/audio_bpe.h).

``audio_bpe_decode`` and ``audio_bpe_encode`` are the ops, on packed rows: row b of ``values`` is
``values[cu[b] : cu[b + 1]]``. ``AudioBpe`` reads a checkpoint's tables and holds them for both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ming_rt.errors import TokenizerError
from ming_rt.ops._native import cpu, kernels, on_device
from ming_rt.strict_json import load_json

CHARACTERS_FILE, MERGES_FILE = "char_mapping.txt", "tokenizer.json"

# The real tables: 52 kB and 1.4 MB, 5862 codes, 32768 ids, the longest of 80 codes.
_MAX_CHARACTERS_BYTES, _MAX_MERGES_BYTES = 4 << 20, 16 << 20
_MAX_IDS = 1 << 20
_MAX_LENGTH = 1024  # codes of one id
_MAX_TABLE = 1 << 24  # codes of all ids
_LINE = re.compile(r"([0-9]{1,7})\t(\w)")
# What the file may set and what that has to be: everything else would change the ids.
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


@dataclass(frozen=True, eq=False)
class AudioBpe:
    """The tables of one checkpoint; safe to share between threads.

    ``offsets`` int32 [V + 1] and ``table`` int32 [C] lie where ``decode`` runs: id i stands for
    ``table[offsets[i] : offsets[i + 1]]``, special ids for nothing. The others are on the CPU: ``symbols``
    int32 [codes], the id of each code (-1 outside the alphabet); the pairs that merge, by their left id:
    ``pair_starts`` int32 [V + 1], then ``pair_right``, ``pair_rank`` and ``pair_merged``, int32 [M] each.
    ``longest`` is the most codes of one id.
    """

    offsets: Tensor
    table: Tensor
    longest: int
    symbols: Tensor
    pair_starts: Tensor
    pair_right: Tensor
    pair_rank: Tensor
    pair_merged: Tensor

    @classmethod
    def build(
        cls, codes: int, expansions: Sequence[Sequence[int]], merges: Iterable[tuple[int, int, int]]
    ) -> AudioBpe:
        """Tables out of their parts, which are consistent.

        Args:
            codes: number of codec tokens.
            expansions: the codes of every id; ids of one code are the alphabet.
            merges: (left id, right id, merged id) by rank, no pair twice.
        """
        with torch.device("cpu"):
            lengths = torch.tensor([0, *map(len, expansions)])
            table = torch.tensor([code for e in expansions for code in e], dtype=torch.int32)
            symbols = torch.full((codes,), -1, dtype=torch.int32)
            pairs = torch.tensor(list(merges), dtype=torch.int64).view(-1, 3)
        for token_id, expansion in enumerate(expansions):
            if len(expansion) == 1:
                symbols[expansion[0]] = token_id
        order = torch.argsort(pairs[:, 0] * len(expansions) + pairs[:, 1])
        counts = torch.bincount(pairs[:, 0], minlength=len(expansions))
        return cls(
            offsets=lengths.cumsum(0).int(),
            table=table,
            longest=int(lengths.max()),
            symbols=symbols,
            pair_starts=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
            pair_right=pairs[order, 1].int(),
            pair_rank=order.int(),
            pair_merged=pairs[order, 2].int(),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> AudioBpe:
        """Reads a checkpoint's ``talker/s3_bpe``: char_mapping.txt and tokenizer.json.

        Raises TokenizerError where a file is missing, larger than any real one, or not what the ids are
        defined by: a bijection of codes 0, 1, ... and characters, and a plain BPE over those characters.
        """
        directory = Path(directory)
        code_of = _read_characters(directory / CHARACTERS_FILE)
        return _read_merges(directory / MERGES_FILE, code_of)

    def to(self, device: torch.device | str) -> AudioBpe:
        """The same tables for decoding on ``device``."""
        return replace(self, offsets=self.offsets.to(device), table=self.table.to(device))

    @property
    def vocab_size(self) -> int:
        """Number of BPE ids."""
        return self.offsets.shape[0] - 1

    @property
    def code_count(self) -> int:
        """Number of codec tokens that ``encode`` takes."""
        return self.symbols.shape[0]

    @cached_property
    def expansions(self) -> tuple[tuple[int, ...], ...]:
        """The codes of every id, on the host."""
        ends, table = self.offsets.tolist(), self.table.tolist()
        return tuple(tuple(table[a:b]) for a, b in pairwise(ends))

    @cached_property
    def pairs(self) -> Mapping[tuple[int, int], tuple[int, int]]:
        """(left id, right id) -> (rank, merged id), for the composition of ``encode``."""
        left = torch.repeat_interleave(self.pair_starts.diff()).tolist()
        right, rank, merged = (t.tolist() for t in (self.pair_right, self.pair_rank, self.pair_merged))
        return {(a, b): (r, m) for a, b, r, m in zip(left, right, rank, merged, strict=True)}

    def codes_of(self, token_id: int) -> tuple[int, ...]:
        """The codes of one id, for decoding as a talker speaks: what ``decode`` gives, token by token.

        An id from ``vocab_size`` on has none. Raises ValueError for a negative one.
        """
        if token_id < 0:
            raise ValueError(f"token_id: expected an id from 0, got {token_id}")
        return self.expansions[token_id] if token_id < self.vocab_size else ()

    def decode(self, ids: Tensor | Sequence[int]) -> Tensor:
        """The codes of one sequence of BPE ids: int32 [n] on the device of the tables, exactly as many.

        Waits for the device; ``audio_bpe_decode`` does not, and takes many sequences.

        Raises ValueError for a negative id.
        """
        row = torch.as_tensor(ids, dtype=torch.int64, device=self.table.device).contiguous()
        ends = torch.tensor([0, row.shape[0]], dtype=torch.int32, device=row.device)
        codes, cu_codes = audio_bpe_decode(row, ends, self)
        return codes[: int(cu_codes[-1])]

    def encode(self, codes: Tensor | Sequence[int]) -> Tensor:
        """The BPE ids of one sequence of codes: int64 [n] on the CPU; codes outside the alphabet are dropped.

        Raises ValueError for a code without a character (negative, or from ``code_count`` on).
        """
        row = torch.as_tensor(codes, dtype=torch.int64, device="cpu")
        low, high = (int(row.min()), int(row.max())) if row.numel() else (0, 0)
        if low < 0 or high >= self.code_count:
            raise ValueError(f"codes: expected 0 to {self.code_count - 1}, got {low} to {high}")
        ends = torch.tensor([0, row.shape[0]], dtype=torch.int32, device="cpu")
        ids, cu_ids = audio_bpe_encode(row.int(), ends, self)
        return ids[: int(cu_ids[-1])]


def audio_bpe_decode(ids: Tensor, cu_ids: Tensor, bpe: AudioBpe) -> tuple[Tensor, Tensor]:
    """The codes of every row of BPE ids, packed; does not wait for the device.

    Args:
        ids: int64 [N]; special ids and ids from ``bpe.vocab_size`` on stand for nothing.
        cu_ids: int32 [B + 1], rising, within [0, N].
        bpe: tables on the device of ``ids``.

    Returns:
        codes: int32 [N * bpe.longest], of which the first ones are written: as many as the ids stand for.
        cu_codes: int32 [B + 1], where each row's codes begin and end.

    Raises ValueError on a wrong dtype or shape and (on the CPU) a negative id or wrong offsets; a device
    leaves out such an id, and ``check_device`` raises it.
    """
    module = kernels(ids)
    device = ids.device
    codes = torch.empty(ids.shape[0] * bpe.longest, dtype=torch.int32, device=device)
    cu_codes = torch.empty_like(cu_ids, memory_format=torch.contiguous_format)
    workspace = None
    if on_device(ids):
        workspace = torch.empty(module.audio_bpe_tiles(ids.shape[0]), dtype=torch.int32, device=device)
    module.audio_bpe_decode(ids, cu_ids, bpe.offsets, bpe.table, bpe.longest, codes, cu_codes, workspace)
    return codes, cu_codes


def audio_bpe_decode_torch(ids: Tensor, cu_ids: Tensor, bpe: AudioBpe) -> tuple[Tensor, Tensor]:
    """``audio_bpe_decode`` as a plain torch composition; ``codes`` has the written ones alone."""
    known = ids.clamp(0, bpe.vocab_size - 1)
    begins = bpe.offsets[known].long()
    lengths = torch.where(ids == known, bpe.offsets[known + 1] - begins, 0)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    first = torch.repeat_interleave(begins - ends[:-1], lengths)
    codes = bpe.table[first + torch.arange(first.shape[0], device=ids.device)]
    return codes, ends[cu_ids.long()].int()


def audio_bpe_encode(codes: Tensor, cu_codes: Tensor, bpe: AudioBpe) -> tuple[Tensor, Tensor]:
    """The BPE ids of every row of codes, packed; on the CPU.

    Pairs of neighbours merge, the lowest rank first, of one rank the leftmost first. Codes outside the
    alphabet are dropped before, so that their neighbours meet.

    Args:
        codes: int32 [N], from 0 to ``bpe.code_count - 1``.
        cu_codes: int32 [B + 1], rising, within [0, N].
        bpe: tables.

    Returns:
        ids: int64 [N], of which the first ``cu_ids[-1]`` are written.
        cu_ids: int32 [B + 1], where each row's ids begin and end.

    Raises ValueError on a wrong dtype or shape, a code without a character, or wrong offsets.
    """
    ids = torch.empty(codes.shape[0], dtype=torch.int64, device="cpu")
    cu_ids = torch.empty_like(cu_codes, memory_format=torch.contiguous_format)
    pairs = (bpe.pair_starts, bpe.pair_right, bpe.pair_rank, bpe.pair_merged)
    cpu.audio_bpe_encode(codes, cu_codes, bpe.symbols, *pairs, ids, cu_ids)
    return ids, cu_ids


def audio_bpe_encode_torch(codes: Tensor, cu_codes: Tensor, bpe: AudioBpe) -> tuple[Tensor, Tensor]:
    """``audio_bpe_encode`` in plain Python; ``ids`` has the written ones alone."""
    symbols, values, ends = bpe.symbols.tolist(), codes.tolist(), cu_codes.tolist()
    rows = [
        _merge([s for code in values[a:b] if (s := symbols[code]) >= 0], bpe.pairs) for a, b in pairwise(ends)
    ]
    counts = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
    return torch.tensor([i for row in rows for i in row], dtype=torch.int64), counts.cumsum(0).int()


def _merge(row: list[int], pairs: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Ids of a row of alphabet ids: the pair of lowest (rank, place) merges until there is none."""
    ids: list[int | None] = [*row, None]
    after = list(range(1, len(row) + 1))
    before = list(range(-1, len(row) - 1))

    def pair_at(i: int) -> tuple[int, int] | None:
        return pairs.get((ids[i], ids[after[i]])) if after[i] < len(row) else None  # type: ignore[arg-type]

    heap = [(pair[0], i) for i in range(len(row)) if (pair := pair_at(i))]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        if ids[i] is None or (pair := pair_at(i)) is None or pair[0] != rank:
            continue
        ids[i], ids[after[i]] = pair[1], None
        after[i] = after[after[i]]
        if after[i] < len(row):
            before[after[i]] = i
        for j in (before[i], i):
            if j >= 0 and (pair := pair_at(j)):
                heappush(heap, (pair[0], j))
    return [i for i in ids if i is not None]


def _read_characters(path: Path) -> dict[str, int]:
    """Character -> code of a char_mapping.txt, whose lines are "code<TAB>character"."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CHARACTERS_BYTES + 1)
    except OSError as problem:
        raise TokenizerError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if len(data) > _MAX_CHARACTERS_BYTES:
        raise TokenizerError(f"{path}: larger than {_MAX_CHARACTERS_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not UTF-8") from None
    code_of: dict[str, int] = {}
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise TokenizerError(
                f"{path}: line {number}: found {line!r:.80}, expected a code, a tab and a letter"
            )
        if match[2] in code_of:
            raise TokenizerError(f"{path}: line {number}: {match[2]!r} appears more than once")
        code_of[match[2]] = int(match[1])
    if sorted(code_of.values()) != list(range(len(lines))):
        raise TokenizerError(f"{path}: expected each code from 0 to {len(lines) - 1} once")
    return code_of


def _read_merges(path: Path, code_of: Mapping[str, int]) -> AudioBpe:
    """The tables of a tokenizer.json over the characters of ``code_of``."""
    data = load_json(path, max_bytes=_MAX_MERGES_BYTES, error=TokenizerError)
    top = _object(path, "the file", data)
    model = _object(path, "model", top.get("model"))
    for key in ("normalizer", "post_processor", "decoder", "truncation", "padding"):
        _expect(path, key, top.get(key), None)
    _expect(path, "pre_tokenizer", top.get("pre_tokenizer"), {"type": "Whitespace"})
    for key, value in _MODEL.items():
        _expect(path, f"model.{key}", model.get(key, value), value)
    vocab = _object(path, "model.vocab", model.get("vocab"))
    size = len(vocab)
    if not 0 < size <= _MAX_IDS:
        raise TokenizerError(f"{path}: model.vocab: found {size} entries, expected 1 to {_MAX_IDS}")
    tokens: list[str] = [""] * size
    seen = bytearray(size)
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < size or seen[token_id]:
            raise TokenizerError(f"{path}: model.vocab: {token!r:.80} has id {token_id!r:.40}, expected "
                                 f"each id from 0 to {size - 1} once")  # fmt: skip
        seen[token_id], tokens[token_id] = 1, token
    special = _special(path, top.get("added_tokens"), vocab, code_of)
    expansions = _expansions(path, tokens, special, code_of)
    return AudioBpe.build(len(code_of), expansions, _pairs(path, model.get("merges"), vocab, special))


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: {name}: expected an object, found {type(value).__name__}")
    return value


def _expect(path: Path, name: str, found: Any, value: Any) -> None:
    if type(found) is not type(value) or found != value:
        raise TokenizerError(f"{path}: {name}: found {found!r:.80}, expected {value!r}")


def _special(path: Path, added: Any, vocab: Mapping[str, int], code_of: Mapping[str, int]) -> set[int]:
    """Ids that stand for no code; their texts are none that codes could spell."""
    special = set()
    for token in added if isinstance(added, list) else [added]:
        entry = _object(path, "added_tokens", token)
        content, token_id = entry.get("content"), entry.get("id")
        good = isinstance(content, str) and type(token_id) is int and entry.get("special") is True
        if not good or vocab.get(content) != token_id or not code_of.keys().isdisjoint(content):
            raise TokenizerError(
                f"{path}: added_tokens: found {content!r:.80} with id {token_id!r:.40}, expected special "
                f"entries of model.vocab without a character of {CHARACTERS_FILE}"
            )
        special.add(vocab[content])
    return special


def _expansions(
    path: Path, tokens: Sequence[str], special: set[int], code_of: Mapping[str, int]
) -> list[tuple[int, ...]]:
    """The codes of every id."""
    expansions: list[tuple[int, ...]] = []
    total = 0
    for token_id, token in enumerate(tokens):
        if token_id in special:
            expansions.append(())
            continue
        total += len(token)
        if not 0 < len(token) <= _MAX_LENGTH or total > _MAX_TABLE:
            raise TokenizerError(
                f"{path}: model.vocab: id {token_id} has {len(token)} characters, expected 1 to "
                f"{_MAX_LENGTH}, and up to {_MAX_TABLE} of all ids"
            )
        try:
            expansions.append(tuple(code_of[char] for char in token))
        except KeyError as missing:
            raise TokenizerError(
                f"{path}: model.vocab: id {token_id} has the character {missing.args[0]!r}, which "
                f"{CHARACTERS_FILE} lacks"
            ) from None
    return expansions


def _pairs(
    path: Path, merges: Any, vocab: Mapping[str, int], special: set[int]
) -> list[tuple[int, int, int]]:
    """(left id, right id, merged id) by rank; a merge is written "left right" or ["left", "right"]."""
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: model.merges: expected a list, found {type(merges).__name__}")
    pairs: dict[tuple[int, int], int] = {}
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        good = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)
        ids = [vocab.get(text, -1) for text in (*parts, "".join(parts))] if good else [-1]
        if min(ids) < 0 or not special.isdisjoint(ids):
            raise TokenizerError(
                f"{path}: model.merges: merge {rank} is {merge!r:.80}, expected two entries of model.vocab "
                "that make a third"
            )
        left, right, merged = ids
        if (left, right) in pairs:
            raise TokenizerError(f"{path}: model.merges: merge {rank} appears more than once")
        pairs[left, right] = merged
    return [(left, right, merged) for (left, right), merged in pairs.items()]
