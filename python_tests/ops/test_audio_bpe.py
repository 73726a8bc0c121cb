"""BPE audio tokens: backends against compositions and against the original's library, round trips of
millions, streaming, wild values, and tables that are refused."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import tiny_audio_bpe
import tokenizers
import torch

from ming_rt import ops
from ming_rt.errors import TokenizerError
from ming_rt.ops import AudioBpe
from ming_rt.ops._native import kernels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory of made-up tables."""
    return tiny_audio_bpe.write(tmp_path_factory.mktemp("s3_bpe"), *tiny_audio_bpe.tables())


@pytest.fixture(scope="module")
def host(files):
    return AudioBpe.from_dir(files)


@pytest.fixture
def bpe(host, backend):
    """The tables where the backend's tensors are."""
    return host.to(torch.empty(0).device)


def rows_of(rng, count, rows):
    """Offsets of ``rows`` rows of ``count`` values, some of them empty."""
    inner = torch.randint(0, count + 1, (max(rows - 1, 0),), generator=rng).sort().values
    ends = [inner.new_zeros(1), inner, inner.new_full((1,), count)] if rows else [inner.new_zeros(1)]
    return torch.cat(ends).int()


SIZES = [(0, 0), (0, 3), (1, 1), (5, 9), (300, 1), (1024, 4), (1025, 300), (2500, 7), (4097, 2)]


@pytest.mark.parametrize(("count", "rows"), SIZES)
def test_decode_equals_the_composition(backend, bpe, rng, count, rows):
    ids = torch.randint(0, bpe.vocab_size + 20, (count,), generator=rng)
    cu_ids = rows_of(rng, count, rows)
    codes, cu_codes = ops.audio_bpe_decode(ids, cu_ids, bpe)
    expected, expected_cu = ops.audio_bpe_decode_torch(ids, cu_ids, bpe)
    assert torch.equal(codes[: len(expected)], expected)
    assert torch.equal(cu_codes, expected_cu)


def test_rows_do_not_depend_on_their_neighbours(backend, bpe, rng):
    ids = torch.randint(0, bpe.vocab_size, (600,), generator=rng)
    cu_ids = rows_of(rng, 600, 5)
    codes, ends = ops.audio_bpe_decode(ids, cu_ids, bpe)
    for a, b, begin, end in zip(cu_ids, cu_ids[1:], ends, ends[1:], strict=False):
        assert torch.equal(bpe.decode(ids[a:b]), codes[begin:end])


def test_one_id_of_each_row(backend, bpe, rng):
    """A step of a batch: what a talker decodes as it goes adds up to what it would at the end."""
    steps = torch.randint(0, bpe.vocab_size + 3, (6, 9), generator=rng)
    cu_ids = torch.arange(10, dtype=torch.int32)
    said: list[list[int]] = [[] for _ in range(9)]
    for ids in steps:
        codes, ends = ops.audio_bpe_decode(ids, cu_ids, bpe)
        for row in range(9):
            assert codes[ends[row] : ends[row + 1]].tolist() == list(bpe.codes_of(int(ids[row])))
            said[row] += bpe.codes_of(int(ids[row]))
    assert said == [bpe.decode(steps[:, row]).tolist() for row in range(9)]


def test_nothing_is_written_behind_the_last_code(backend, bpe, rng):
    ids = torch.randint(0, bpe.vocab_size, (40,), generator=rng)
    cu_ids = torch.tensor([0, 40], dtype=torch.int32)
    codes = torch.full((40 * bpe.longest,), -7, dtype=torch.int32)
    module, work = kernels(ids), None
    if hasattr(module, "audio_bpe_tiles"):
        work = torch.empty(module.audio_bpe_tiles(40), dtype=torch.int32)
    module.audio_bpe_decode(
        ids, cu_ids, bpe.offsets, bpe.table, bpe.longest, codes, torch.empty_like(cu_ids), work
    )
    expected = ops.audio_bpe_decode_torch(ids, cu_ids, bpe)[0]
    assert torch.equal(codes[: len(expected)], expected)
    assert (codes[len(expected) :] == -7).all()


def test_special_ids_and_ids_behind_the_table_stand_for_nothing(backend, bpe):
    ids = [0, 1, 2, 3, 4, bpe.vocab_size, 2**40]
    assert bpe.decode(ids).tolist() == []
    assert bpe.decode([]).tolist() == []
    assert [bpe.codes_of(i) for i in ids] == [()] * len(ids)
    assert len(bpe.codes_of(5)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_encode_equals_the_original_library(isa, rng, tmp_path, seed):
    """Also with a table whose ranks and ids are in different orders and whose merges overlap."""
    tokenizer, characters = tiny_audio_bpe.tables(seed, codes=60, alphabet=(3, 12, 40, 58)[seed])
    directory = tiny_audio_bpe.write(tmp_path, tokenizer, characters)
    bpe = AudioBpe.from_dir(directory)
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    alphabet = (bpe.symbols >= 0).nonzero().flatten()
    assert len(alphabet) == (3, 12, 40, 58)[seed]
    for length in (*range(12), 40, 200, 1000):
        pool = alphabet if length % 2 else torch.arange(60)
        codes = pool[torch.randint(0, len(pool), (length,), generator=rng)].int()
        ids = bpe.encode(codes)
        assert ids.tolist() == library.encode("".join(characters[c] for c in codes)).ids
        ends = torch.tensor([0, length], dtype=torch.int32)
        assert torch.equal(ids, ops.audio_bpe_encode_torch(codes, ends, bpe)[0])
        kept = codes[bpe.symbols[codes] >= 0]
        assert torch.equal(bpe.decode(ids), kept)


def test_encode_takes_many_rows(isa, host, rng):
    codes = torch.randint(0, host.code_count, (500,), generator=rng).int()
    for rows in (0, 1, 9, 600):
        ends = rows_of(rng, 500, rows)
        ids, cu_ids = ops.audio_bpe_encode(codes, ends, host)
        expected, expected_cu = ops.audio_bpe_encode_torch(codes, ends, host)
        assert torch.equal(cu_ids, expected_cu)
        assert torch.equal(ids[: len(expected)], expected)


@pytest.mark.parametrize("count", [1, 4000])
def test_millions_of_codes_come_back(isa, host, rng, count):
    """In many rows and in one; fewer codes where it is one, for a row has one thread."""
    codes = torch.randint(0, host.code_count, (4_000_000 if count > 1 else 500_000,), generator=rng).int()
    ends = rows_of(rng, len(codes), count)
    ids, cu_ids = ops.audio_bpe_encode(codes, ends, host)
    ids = ids[: int(cu_ids[-1])]
    known = host.symbols[codes] >= 0
    assert len(ids) < known.sum()
    back, cu_codes = ops.audio_bpe_decode(ids, cu_ids, host)
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), known.cumsum(0)])
    assert torch.equal(cu_codes.long(), kept[ends.long()])
    assert torch.equal(back[: int(kept[-1])], codes[known])


def test_long_rows_of_one_code(isa, tmp_path):
    """Every pair overlaps its neighbours; the leftmost goes first."""
    tokenizer, characters = tiny_audio_bpe.tables(codes=1, alphabet=1, merges=20, longest=16)
    host = AudioBpe.from_dir(tiny_audio_bpe.write(tmp_path, tokenizer, characters))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for length in (1, 2, 3, 17, 1001):
        assert host.encode([0] * length).tolist() == library.encode(characters[0] * length).ids


# Wild values.


def decode_bad(backend, message, fault, ids, cu_ids, bpe):
    """The CPU refuses; a device reports and gives what is left."""
    arguments = torch.tensor(ids), torch.tensor(cu_ids, dtype=torch.int32), bpe
    if backend not in ("emu", "cuda"):
        with pytest.raises(ValueError, match=f"audio_bpe_decode: {message}"):
            ops.audio_bpe_decode(*arguments)
        return None
    codes, cu_codes = ops.audio_bpe_decode(*arguments)
    with pytest.raises(ValueError, match=fault):
        ops.check_device()
    return codes.tolist(), cu_codes.tolist()


@pytest.mark.parametrize("wild", [-1, -(2**40)])
def test_negative_ids(backend, bpe, wild):
    found = decode_bad(backend, f"ids: expected ids from 0, got {wild}", "ids: expected BPE audio ids",
                       [5, wild, 6], [0, 2, 3], bpe)  # fmt: skip
    if found:
        assert found[0][:2] == [*bpe.codes_of(5), *bpe.codes_of(6)]
        assert found[1] == [0, 1, 2]
    with pytest.raises(ValueError, match="token_id: expected an id from 0"):
        bpe.codes_of(wild)


@pytest.mark.parametrize("cu_ids", [[0, 4], [-1, 3], [0, 2, 1, 3], [3, 2**31 - 1]])
def test_wild_row_offsets(backend, bpe, cu_ids):
    found = decode_bad(
        backend, "cu_ids: expected rising offsets from 0 to 3", "cu_seqlens", [5, 6, 7], cu_ids, bpe
    )
    if found:
        assert all(0 <= end <= 3 for end in found[1])


@pytest.mark.parametrize("offsets", [(-1, 1), (2, 1), (0, 2**31 - 1), (0, 90)])
def test_wild_tables(backend, bpe, offsets):
    """Offsets that fall or leave the table, and an expansion longer than was said."""
    broken = replace(bpe, offsets=bpe.offsets.clone())
    broken.offsets[5:7] = torch.tensor(offsets)
    broken.offsets[7] = broken.offsets[6]
    message = r"table_offsets: expected up to \d+ codes of table_codes, got .* for id 5"
    found = decode_bad(backend, message, "table_offsets", [5, 9], [0, 1, 2], broken)
    if found:
        assert found[0][0] == bpe.codes_of(9)[0]
        assert found[1] == [0, 0, 1]


I32, I64 = torch.int32, torch.int64


@pytest.mark.parametrize(
    ("ids", "cu_ids", "message"),
    [
        (torch.zeros(2, dtype=I32), torch.zeros(1, dtype=I32), "ids: expected int64, got int32"),
        (torch.zeros(2, 2, dtype=I64), torch.zeros(1, dtype=I32), "ids: expected"),
        (torch.zeros(2, dtype=I64), torch.zeros(1, dtype=I64), "cu_ids: expected int32"),
        (torch.zeros(2, dtype=I64), torch.zeros(0, dtype=I32), r"expected cu_ids \[B \+ 1\]"),
    ],
)
def test_bad_arguments(host, ids, cu_ids, message):
    with pytest.raises(ValueError, match=f"audio_bpe_decode: .*{message}"):
        ops.audio_bpe_decode(ids, cu_ids, host)


@pytest.mark.parametrize("code", [-1, 90, 2**31, 2**40])
def test_codes_without_a_character(host, code):
    with pytest.raises(ValueError, match="codes: expected 0 to 89, got"):
        host.encode([3, code])
    if code < 2**31:
        with pytest.raises(ValueError, match=r"audio_bpe_encode: codes: expected values in 0..89"):
            ops.audio_bpe_encode(torch.tensor([code], dtype=I32), torch.tensor([0, 1], dtype=I32), host)
    with pytest.raises(ValueError, match="cu_codes: expected rising offsets"):
        ops.audio_bpe_encode(torch.tensor([1], dtype=I32), torch.tensor([0, 2], dtype=I32), host)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("symbols", 2**20, "symbols"),
        ("symbols", -2, "symbols"),
        ("pair_starts", -1, "pair_starts"),
        ("pair_starts", 2**20, "pair_starts"),
        ("pair_merged", -1, "pair_merged"),
        ("pair_merged", 2**20, "pair_merged"),
        ("pair_rank", -1, "pair_rank"),
    ],
)
def test_wild_tables_of_the_encoder(host, field, value, message):
    broken = getattr(host, field).clone()
    broken[len(broken) // 2] = value
    with pytest.raises(ValueError, match=f"audio_bpe_encode: {message}: expected"):
        replace(host, **{field: broken}).encode([1, 2])


# Files.


def test_other_spellings_of_a_merge_and_orders_of_lines(files, host, tmp_path):
    tokenizer, characters = tiny_audio_bpe.tables()
    tokenizer["model"]["merges"] = [merge.split(" ") for merge in tokenizer["model"]["merges"]]
    tokenizer["model"]["ignore_merges"] = False
    tiny_audio_bpe.write(tmp_path, tokenizer, characters)
    lines = (tmp_path / "char_mapping.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "char_mapping.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    other = AudioBpe.from_dir(tmp_path)
    for field in fields(host):
        ours, theirs = (torch.as_tensor(getattr(each, field.name)) for each in (host, other))
        assert torch.equal(ours, theirs), field.name


def set_model(key, value):
    return lambda tokenizer: tokenizer["model"].__setitem__(key, value)


def set_top(key, value):
    return lambda tokenizer: tokenizer.__setitem__(key, value)


def set_vocab(token, token_id):
    return lambda tokenizer: tokenizer["model"]["vocab"].__setitem__(token, token_id)


def rename(old, new):
    def change(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        token = next(token for token, i in vocab.items() if i == old)
        vocab[new] = vocab.pop(token)

    return change


def special(token_id, value=True):
    return {"id": token_id, "content": "[PAD]", "special": value}


def repeat_merge(tokenizer):
    tokenizer["model"]["merges"].append(tokenizer["model"]["merges"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_model("type", "Unigram"), r"model.type: found 'Unigram', expected 'BPE'"),
        (set_model("dropout", 0.1), r"model.dropout: found 0.1, expected None"),
        (set_model("unk_token", "[UNK]"), "model.unk_token: found"),
        (set_model("byte_fallback", True), "model.byte_fallback: found True, expected False"),
        (set_model("byte_fallback", 0), "model.byte_fallback: found 0, expected False"),
        (set_model("ignore_merges", True), "model.ignore_merges"),
        (set_model("continuing_subword_prefix", "##"), "model.continuing_subword_prefix"),
        (set_model("vocab", []), "model.vocab: expected an object, found list"),
        (set_model("vocab", {}), "model.vocab: found 0 entries"),
        (set_model("merges", None), "model.merges: expected a list, found NoneType"),
        (set_model("merges", ["a"]), "model.merges: merge 0 is 'a', expected two entries"),
        (set_model("merges", ["[PAD] [UNK]"]), "model.merges: merge 0"),
        (set_model("merges", [["[PAD]", 3]]), "model.merges: merge 0"),
        (set_model("merges", [{}]), "model.merges: merge 0"),
        (repeat_merge, "model.merges: merge 400 appears more than once"),
        (set_top("model", None), "model: expected an object, found NoneType"),
        (set_top("normalizer", {"type": "NFC"}), "normalizer: found"),
        (set_top("pre_tokenizer", None), "pre_tokenizer: found None"),
        (set_top("decoder", {"type": "BPEDecoder"}), "decoder: found"),
        (set_top("added_tokens", None), "added_tokens: expected an object, found NoneType"),
        (set_top("added_tokens", [special(5)]), r"added_tokens: found '\[PAD\]' with id 5"),
        (set_top("added_tokens", [special(0, False)]), "expected special"),
        (set_top("added_tokens", []), r"id 0 has the character '\['"),
        (set_vocab("[PAD]", 1), r"expected each id from 0 to"),
        (set_vocab("[PAD]", -1), r"'\[PAD\]' has id -1"),
        (set_vocab("[PAD]", 0.0), r"'\[PAD\]' has id 0.0"),
        (set_vocab("[PAD]", False), r"'\[PAD\]' has id False"),
        (rename(9, "x"), "id 9 has the character 'x', which char_mapping.txt lacks"),
        (rename(9, ""), "id 9 has 0 characters, expected 1 to 1024"),
        (rename(9, "x" * 1025), "id 9 has 1025 characters"),
    ],
)  # fmt: skip
def test_merges_that_are_refused(tmp_path, change, message):
    tokenizer, characters = tiny_audio_bpe.tables()
    tokenizer = copy.deepcopy(tokenizer)
    change(tokenizer)
    tiny_audio_bpe.write(tmp_path, tokenizer, characters)
    with pytest.raises(TokenizerError, match=message):
        AudioBpe.from_dir(tmp_path)


def test_a_special_token_that_codes_can_spell(tmp_path):
    tokenizer, characters = tiny_audio_bpe.tables()
    text = next(token for token, i in tokenizer["model"]["vocab"].items() if i == 7)
    tokenizer["added_tokens"].append({"id": 7, "content": text, "special": True})
    with pytest.raises(TokenizerError, match="without a character of char_mapping"):
        AudioBpe.from_dir(tiny_audio_bpe.write(tmp_path, tokenizer, characters))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: found '', expected a code, a tab and a letter"),
        ("0\t一\n\n".encode(), "line 2: found ''"),
        ("0\t一\r\n1\t二\r\n".encode(), "line 1"),
        ("0 一\n".encode(), "line 1"),
        ("-1\t一\n".encode(), "line 1"),
        ("０\t一\n".encode(), "line 1"),
        ("0\t一二\n".encode(), "line 1"),
        (b"0\t \n", "line 1"),
        ("0\t。\n".encode(), "line 1"),
        ("0\t一\n1\t一\n".encode(), "line 2: '一' appears more than once"),
        ("0\t一\n0\t二\n".encode(), "expected each code from 0 to 1 once"),
        ("1\t一\n2\t二\n".encode(), "expected each code from 0 to 1 once"),
        (b"0\t\xff\n", "not UTF-8"),
        (b"0" * (5 << 20), "larger than"),
    ],
)
def test_characters_that_are_refused(tmp_path, text, message):
    tiny_audio_bpe.write(tmp_path, *tiny_audio_bpe.tables())
    (tmp_path / "char_mapping.txt").write_bytes(text)
    with pytest.raises(TokenizerError, match=f"char_mapping.txt: {message}"):
        AudioBpe.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "the file: expected an object, found list"),
        ("[" * 100, "nested deeper"),
        ('{"a": 1, "a": 2}', "appears more than once"),
        (" " * (17 << 20), "more than .* bytes"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    tiny_audio_bpe.write(tmp_path, *tiny_audio_bpe.tables())
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=message):
        AudioBpe.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["char_mapping.txt", "tokenizer.json"])
def test_missing_files(tmp_path, name):
    tiny_audio_bpe.write(tmp_path, *tiny_audio_bpe.tables())
    (tmp_path / name).unlink()
    with pytest.raises(TokenizerError, match=name):
        AudioBpe.from_dir(tmp_path)
