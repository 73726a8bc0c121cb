"""Made-up tables of BPE audio tokens, in the files upstream ships: codes as characters, merges over some."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tables(
    seed: int = 0, codes: int = 90, alphabet: int = 40, merges: int = 400, longest: int = 80
) -> tuple[dict[str, Any], list[str]]:
    """(tokenizer.json, the character of each code); ranks and ids are in different orders.

    Ids are the special ones, the alphabet, the merged. Some are made by several merges.
    """
    draw = random.Random(seed)
    characters = [chr(c) for c in draw.sample(range(0x4E00, 0x9FA5), codes)]
    tokens = sorted(draw.sample(characters, alphabet))
    pairs: set[tuple[str, str]] = set()
    while len(pairs) < merges:
        # Early tokens more often, so that long ones come about and pairs overlap.
        left, right = (tokens[int(len(tokens) * draw.random() ** 2)] for _ in range(2))
        if len(left + right) <= longest:
            pairs.add((left, right))
            if left + right not in tokens:
                tokens.append(left + right)
    ranked = sorted(pairs)
    draw.shuffle(ranked)
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(SPECIAL)]
    for entry in added:
        entry |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate((*SPECIAL, *tokens))},
            "merges": [f"{left} {right}" for left, right in ranked],
        },
    }, characters


def write(directory: Path, tokenizer: object, characters: list[str]) -> Path:
    """Both files."""
    text = "".join(f"{code}\t{character}\n" for code, character in enumerate(characters))
    (directory / "char_mapping.txt").write_text(text, encoding="utf-8")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory
