"""Tokenizer: inert special text, decoding of arbitrary ids, streaming, both file formats, malformed files."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from tiny_tokenizer import SPECIAL, tokenizer_json, write_sentencepiece, write_tokenizer

from ming_rt.errors import InvalidRequestError, TokenizerError
from ming_rt.inputs.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "the role of the loop, isn't it?\n\n  x",
    "数字2025年 été 😀👩‍🚀 𠀀",
    "a\u0000b\ufeff\u200b",
    "<imag <image <IMAGE> </role",
]


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (write_tokenizer if request.param == "tokenizer.json" else write_sentencepiece)(directory)
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_dir(write_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() == t and "  " not in t and "\0" not in t])
def test_round_trip_sentencepiece(tmp_path, text):
    tokenizer = Tokenizer.from_dir(write_sentencepiece(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\ufeff", "").replace("\u200b", "")


def test_special_text_is_inert_unless_allowed(tokenizer):
    assert set(SPECIAL) <= set(tokenizer.special)
    for token, token_id in tokenizer.special.items():
        for text in (token, f"x{token}y", f"{token}{token}", f" {token}\n"):
            ids = tokenizer.encode(text)
            assert not any(tokenizer.is_special(i) for i in ids), text
        if token in SPECIAL:  # sentencepiece has <unk>, <s> and </s> besides, also special
            assert tokenizer.decode(tokenizer.encode(f"x{token}y")) == f"x{token}y"
        ids = tokenizer.encode(f"x{token}y", allow_special=True)
        assert ids == [*tokenizer.encode("x"), token_id, *tokenizer.encode("y")]


def test_all_special_tokens_in_one_text_are_inert(tokenizer):
    text = "".join(tokenizer.special) + " ".join(tokenizer.special)
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode(text))


def test_longest_special_token_wins(tmp_path):
    directory = write_tokenizer(tmp_path, special=["<a>", "<a><b>", "<b>"])
    tokenizer = Tokenizer.from_dir(directory)
    wanted = [tokenizer.token_id(t) for t in ("<a><b>", "<a>", "<b>")]
    assert tokenizer.encode("<a><b><a>", allow_special=True) == wanted[:2]
    assert tokenizer.encode("<b>", allow_special=True) == wanted[2:]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_special_token_that_is_a_vocabulary_entry_is_inert(tmp_path, ignore_merges):
    data = tokenizer_json()
    model = data["model"]
    vocab = model["vocab"] | {"<role>": 999, "role>": 1000}
    merges = [["e", ">"], ["rol", "e>"], ["<", "role>"]]
    vocab |= {"e>": 1001}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {**model, "vocab": vocab, "merges": model["merges"] + [" ".join(m) for m in merges]}
    write_tokenizer(tmp_path, model={**model, "ignore_merges": ignore_merges}, pre_tokenizer=plain)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("<role>", allow_special=True) == [999]
    for text in ("<role>", "a<role><role> b"):
        ids = tokenizer.encode(text)
        assert 999 not in ids
        assert tokenizer.decode(ids) == text


def test_segments_without_special_tokens_are_encoded_as_one_string(byte_level):
    whole = byte_level.encode("<role>the loop</role>", allow_special=True)
    parts = [("<role>th", True), ("e lo", False), ("op", True), ("", False), ("</role>", True)]
    assert byte_level.encode_segments(parts) == whole
    inert = byte_level.encode_segments([("<ro", True), ("le>", False)])
    assert inert == byte_level.encode("<role>")


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("ok fine")
    strange = [-1, tokenizer.size, 10**9, -(10**12)]
    assert tokenizer.decode([*strange, *ids, *strange]) == "ok fine"


def test_skipped_special_tokens_do_not_break_a_character(byte_level):
    first, *rest = byte_level.encode("é")
    role = byte_level.token_id("<role>")
    assert byte_level.decode([first, role, *rest]) == "é"
    assert byte_level.decode([first, role, *rest], skip_special=False) == "\ufffd<role>\ufffd"
    # An added token that is not marked special stays in the text.
    assert byte_level.decode([byte_level.token_id("<tool_call>")]) == "<tool_call>"


def certain(data: bytes) -> str:
    """Text that is certain after these bytes: all but a tail that could still become a character."""
    for held in (3, 2, 1):
        tail = data[-held:]
        if len(tail) == held and any(_starts_character(tail, more) for more in range(1, 4)):
            return data[:-held].decode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def _starts_character(tail: bytes, more: int) -> bool:
    """Whether some ``more`` continuation bytes complete ``tail`` to exactly one character."""
    ends = itertools.product(*[(0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF)] * more)
    for end in ends:
        try:
            if len((tail + bytes(end)).decode("utf-8")) == 1:
                return True
        except UnicodeDecodeError:
            continue
    return False


def test_stream_emits_what_is_certain_and_adds_up(byte_level):
    edge = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xE1, 0xED, 0xEF]
    edge += [0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    runs = list(itertools.product(edge, repeat=2))
    draw = random.Random(5)
    runs += [[draw.choice(edge) for _ in range(draw.randint(3, 7))] for _ in range(150)]
    for run in runs:
        stream = byte_level.stream()
        text = ""
        for i, byte in enumerate(run):  # the id of a byte is the byte itself in this vocabulary
            text += stream.push(byte)
            assert text == certain(bytes(run[: i + 1])), run
        assert text + stream.flush() == byte_level.decode(run) == bytes(run).decode("utf-8", "replace")
        assert stream.flush() == ""


def test_stream_equals_decode(tokenizer):
    draw = random.Random(6)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.size + 3) for _ in range(draw.randrange(40))]
        for skip in (False, True):
            stream = tokenizer.stream(skip)
            pushed = "".join(stream.push(i) for i in ids)
            assert pushed + stream.flush() == tokenizer.decode(ids, skip)


def test_stop_ids(byte_level):
    assert byte_level.stop_ids("v1") == (byte_level.token_id("<|endoftext|>"),)
    assert byte_level.stop_ids("flash") == (byte_level.token_id("<|role_end|>"),)


def test_unknown_token_and_invalid_text(tokenizer):
    with pytest.raises(TokenizerError, match="<nothing>"):
        tokenizer.token_id("<nothing>")
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_model_vocabulary_bounds_the_ids(tmp_path):
    directory = write_tokenizer(tmp_path)
    size = Tokenizer.from_dir(directory).size
    assert Tokenizer.from_dir(directory, size).size == size
    with pytest.raises(TokenizerError, match=f"token id {size - 1}"):
        Tokenizer.from_dir(directory, size - 1)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)


def changed(change) -> str:
    data = tokenizer_json()
    change(data)
    return json.dumps(data)


BROKEN = {
    "empty": "",
    "not an object": "null",
    "cut": json.dumps(tokenizer_json())[:500],
    "deep": "[" * 100_000,
    "no vocabulary": changed(lambda d: d["model"].pop("vocab")),
    "merge of unknown pieces": changed(lambda d: d["model"]["merges"].append("zz yy")),
    "negative id": changed(lambda d: d["model"]["vocab"].update(a=-1)),
    "shared id": changed(lambda d: d["model"]["vocab"].update(a=98)),
    "byte missing": changed(lambda d: d["model"]["vocab"].pop("!")),
    "bad regex": changed(lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(((")),
    "other model": changed(
        lambda d: d.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    ),
    "other decoder": changed(
        lambda d: d.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    ),
    "no decoder": changed(lambda d: d.update(decoder=None)),
    "dropout": changed(lambda d: d["model"].update(dropout=0.5)),
    "library panic": changed(lambda d: d["model"].update(continuing_subword_prefix="##")),
    "suffix": changed(lambda d: d["model"].update(end_of_word_suffix="</w>")),
    "stripping token": changed(lambda d: d["added_tokens"][0].update(lstrip=True)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_tokenizer_json(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(BROKEN[name], encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -7])
def test_malformed_sentencepiece(tmp_path, cut):
    path = write_sentencepiece(tmp_path) / "tokenizer.model"
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut > 0 else b"" if cut == 0 else b"\xff" * 9 + data[:cut])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)


def test_sentencepiece_takes_special_tokens_from_tokenizer_config(tmp_path):
    write_sentencepiece(tmp_path)
    config = {"added_tokens_decoder": {"5000": {"content": "<extra>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.token_id("<extra>") == 5000
    assert 5000 in tokenizer.encode("a<extra>b", allow_special=True)
    assert 5000 not in tokenizer.encode("a<extra>b")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}')
    with pytest.raises(TokenizerError, match="added_tokens_decoder"):
        Tokenizer.from_dir(tmp_path)
