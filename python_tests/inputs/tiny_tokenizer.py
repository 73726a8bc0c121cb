"""Small vocabularies made on the spot: byte-level tokenizer.json and sentencepiece tokenizer.model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

SPECIAL = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "<|role_end|>", "<role>", "</role>"]
SPECIAL += ["<imagePatch>", "<image>", "</image>", "<video>", "</video>", "<framePatch>"]
SPECIAL += ["<audioPatch>", "<audio>", "</audio>", "<tool_call>"]
MERGES = ["Ġ t", "h e", "Ġt he", "l o", "r o", "ro l", "> x", "= ="]
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
SPACES = r"|\s*[\r\n]|\s+(?!\S)|\s+"


def byte_chars() -> list[str]:
    """The 256 characters of a byte-level vocabulary, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def tokenizer_json(special=SPECIAL, **changes) -> dict:
    """The object of a tokenizer.json; ``changes`` replace its top-level entries."""
    vocab = {char: i for i, char in enumerate(byte_chars())}
    for merge in MERGES:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS + SPACES}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocab) + i, "content": text, "special": text != "<tool_call>", **flags}
            for i, text in enumerate(special)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": list(MERGES)},
        **changes,
    }


def write_tokenizer(directory: Path, **changes) -> Path:
    """Writes ``tokenizer_json`` into a directory."""
    text = json.dumps(tokenizer_json(**changes), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return directory


def write_sentencepiece(directory: Path) -> Path:
    """Trains a sentencepiece model whose special tokens are user-defined pieces."""
    sentences = [
        "the quick brown fox jumps over the lazy dog",
        "pack my box with five dozen liquor jugs",
    ] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[*SPECIAL, "qu"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(out.getvalue())
    return directory
