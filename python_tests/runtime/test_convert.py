"""Torch archives into safetensors: what upstream ships, what is refused, damage, files and command."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ming_rt import cli
from ming_rt.errors import WeightsError
from ming_rt.runtime import convert as module
from ming_rt.runtime.convert import convert, read_archive


def saved(path, value, **options):
    """A file of ``torch.save``."""
    torch.save(value, path, **options)
    return path


def tensors(*names):
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


def zipped(path, members, compression=zipfile.ZIP_STORED, comment=b""):
    """A zip of (name, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
        archive.comment = comment
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_pickle(path, change):
    """The file with its pickle changed."""
    found = members(path)
    return zipped(path, [(n, change(d) if n.endswith("data.pkl") else d) for n, d in found])


# What upstream ships.


@pytest.mark.parametrize(
    "wrap", [dict, OrderedDict, lambda t: {"model": t}, lambda t: {"model": t, "step": [1, 2.5]}]
)
def test_state_dicts(tmp_path, wrap):
    expected = tensors("encoder.w", "decoder.b")
    found = read_archive(saved(tmp_path / "flow.pt", wrap(expected)))
    assert found.texts == {}
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_a_real_state_dict(tmp_path):
    """With the attribute torch hangs on it, and parameters instead of tensors."""
    layer = torch.nn.Linear(3, 2)
    for value in (layer.state_dict(), dict(layer.named_parameters())):
        found = read_archive(saved(tmp_path / "x.pt", value)).tensors
        assert torch.equal(found["weight"], layer.weight)
        assert not found["weight"].requires_grad


def test_the_prefix_of_the_vocoder_goes(tmp_path):
    found = read_archive(saved(tmp_path / "hift_v2.pt", tensors("generator.a.w", "b.generator.w", "c")))
    assert list(found.tensors) == ["a.w", "b.w", "c"]


@pytest.mark.parametrize(("magnitude", "direction"), module._WEIGHT_NORM)
def test_both_spellings_of_weight_norm(tmp_path, magnitude, direction):
    names = ["generator.ups.0" + magnitude, "generator.ups.0" + direction]
    assert len(read_archive(saved(tmp_path / "hift.pt", tensors(*names))).tensors) == 2
    for name in names:
        with pytest.raises(WeightsError, match=r"ups.0.*: weight norm without ups.0"):
            read_archive(saved(tmp_path / "hift.pt", tensors(name)))


def test_presets(tmp_path):
    speaker = torch.randn(1, 192)
    assert torch.equal(read_archive(saved(tmp_path / "luna.pt", speaker)).tensors["vp_emb"], speaker)
    found = read_archive(saved(tmp_path / "luna.pt", {"prompt_text": "感谢。", "vp_emb": speaker}))
    assert found.texts == {"prompt_text": "感谢。"}
    assert list(found.tensors) == ["vp_emb"]


def test_where_it_was_saved_does_not_matter(tmp_path):
    path = saved(tmp_path / "x.pt", tensors("a"))
    with_pickle(path, lambda data: data.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    assert torch.equal(read_archive(path).tensors["a"], torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", module.DTYPES)
def test_dtypes_and_views(tmp_path, dtype):
    base = torch.arange(48).view(6, 8).to(dtype)
    values = {
        "whole": base,
        "again": base,
        "view": base[1:4, ::2],
        "turned": base.T,
        "one": base[0, 0],
        "none": base[:0],
    }
    convert(saved(tmp_path / "x.pt", values))
    found = load_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name


# What is refused.


class Run:
    """Code in a pickle."""

    ran = False

    def __reduce__(self):
        return setattr, (Run, "ran", True)


class Command:
    def __reduce__(self):
        return os.system, ("exit 3",)


class Kind(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Run(), "its pickle asks for '__builtin__.setattr', expected nothing but dense tensors"),
        ({"a": torch.zeros(2), "b": Command()}, "its pickle asks for 'posix.system'"),
        ({"a": torch.nn.Linear(2, 2)}, "its pickle asks for 'torch.nn.modules.linear.Linear"),
        ({"a": torch.eye(3).to_sparse()}, "asks for 'torch.*sparse"),
        ({"a": torch.zeros(3, device="meta")}, "asks for 'torch._utils._rebuild_meta_tensor_no_storage"),
        ({"a": torch.zeros(3).as_subclass(Kind)}, "asks for 'torch._tensor._rebuild_from_type_v2"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "asks for 'torch.ComplexFloatStorage"),
        ({"a": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "its pickle asks for"),
        ({"a": torch.zeros(1).expand(1 << 40)}, r"a: shape \[1099511627776\] repeats values"),
        ({"a": torch.zeros(4).as_strided((4, 4), (0, 1))}, "a: shape .* repeats values"),
        ({"a": torch.zeros((1,) * 9)}, "a: shape .* more than 8 dimensions"),
        ({"a": {"b": torch.zeros(1)}}, "a: expected a dense tensor, found a value of type dict"),
        ({"a": [torch.zeros(1)]}, "a: expected a dense tensor, found a value of type list"),
        (
            {"a": 3, "b": None},
            "2 problems:\n.*a: expected a dense tensor, found a value of type int\n.*b: .*NoneType",
        ),
        ({"a": "text"}, "a: expected a dense tensor, found a value of type str"),
        ({3: torch.zeros(1)}, "expected names of tensors as keys, found 3"),
        ({"": torch.zeros(1)}, "expected names of tensors as keys, found ''"),
        ({"a\n": torch.zeros(1)}, "expected names of tensors as keys"),
        ({"a" * 301: torch.zeros(1)}, "expected names of tensors as keys"),
        ({"__metadata__": torch.zeros(1)}, "expected names of tensors as keys"),
        ({"a": torch.zeros(1), "generator.a": torch.zeros(1)}, "generator.a: there is a 'a' already"),
        ({"generator.": torch.zeros(1)}, "there is a '' already"),
        ({"prompt_text": "x" * 10_001}, "prompt_text: expected up to 10000 characters"),
        ({"prompt_text": "\ud800"}, "prompt_text: .* valid Unicode"),
        ({"prompt_text": 3}, "prompt_text: expected a dense tensor"),
        ({}, "expected a dict of tensors, found an empty dict"),
        ({"model": {}}, "expected a dict of tensors, found an empty dict"),
        ([torch.zeros(1)], "expected a dict of tensors, found a value of type list"),
        (7, "expected a dict of tensors, found a value of type int"),
    ],
)
def test_values_that_are_refused(tmp_path, value, message):
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        read_archive(saved(tmp_path / "x.pt", value))
    assert not Run.ran


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_code_in_other_protocols(tmp_path, protocol):
    path = saved(tmp_path / "x.pt", tensors("a"))
    with_pickle(path, lambda _: pickle.dumps(Command(), protocol))
    with pytest.raises(WeightsError, match=r"asks for 'posix.system|asks for 'STACK_GLOBAL'"):
        read_archive(path)


def test_many_names_for_one_large_tensor(tmp_path):
    one = torch.zeros(100_000)
    with pytest.raises(WeightsError, match="4000000 bytes of tensors out of a file of"):
        read_archive(saved(tmp_path / "x.pt", {f"a{i}": one for i in range(10)}))


def test_old_archives_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"x.pt: not a torch archive"):
        read_archive(saved(tmp_path / "x.pt", tensors("a"), _use_new_zipfile_serialization=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(WeightsError, match=r"x.pt: (holds compressed|its pickle)"):
        read_archive(tmp_path / "x.pt")


# Bombs and damage.


def test_compressed_archives(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1 << 20)})
    zipped(path, members(path), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(WeightsError, match="compressed files, which torch does not write"):
        read_archive(path)


def patched(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("sizes", [(1 << 31, 1 << 31), (1 << 31, 24), (24, 1 << 31)])
def test_declared_sizes(tmp_path, sizes):
    """Sizes of the last record in the zip's directory, packed and unpacked."""
    path = zipped(tmp_path / "x.pt", members(saved(tmp_path / "x.pt", tensors("a"))))
    at = path.read_bytes().rindex(b"PK\1\2")
    patched(path, at + 20, b"".join(size.to_bytes(4, "little") for size in sizes))
    with pytest.raises(WeightsError, match=r"compressed files|more bytes than its own|whole torch archive"):
        read_archive(path)


def test_a_number_of_values_the_file_does_not_have(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(4)})
    with_pickle(path, lambda data: data.replace(b"K\4tq", b"K\xfatq").replace(b"K\4\x85", b"K\xfa\x85"))
    with pytest.raises(WeightsError, match="torch cannot read it"):
        read_archive(path)


def test_two_ways_to_read_a_zip(tmp_path):
    """A second pickle, names that differ in case, bytes before and behind: torch could read another one."""
    path = saved(tmp_path / "x.pt", tensors("a"))
    plain = members(path)
    data = next(data for name, data in plain if name.endswith("data.pkl"))
    for extra in ("x/DATA.PKL", "y/data.pkl", "y/data/0"):
        with pytest.raises(WeightsError, match="one folder of files of different names"):
            read_archive(zipped(path, [*plain, (extra, data)]))
    zipped(path, plain, comment=b"more")
    with pytest.raises(WeightsError, match="not the whole of one"):
        read_archive(path)
    content = zipped(path, plain).read_bytes()
    read_archive(path)
    for changed, message in (
        (b"before" + content, "end of the zip is damaged"),
        (content + b"behind", "whole"),
    ):
        path.write_bytes(changed)
        with pytest.raises(WeightsError, match=message):
            read_archive(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "expected one folder"),
        ([("x/version", b"3")], "with a data.pkl"),
        ([("data.pkl", b".")], "with a data.pkl"),
    ],
)
def test_zips_that_are_none_of_torch(tmp_path, files, message):
    with pytest.raises(WeightsError, match=message):
        read_archive(zipped(tmp_path / "x.pt", files))


def test_a_large_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_PICKLE", 50)
    with pytest.raises(WeightsError, match=r"data.pkl has .* bytes, expected at most 50"):
        read_archive(saved(tmp_path / "x.pt", tensors("a")))
    monkeypatch.setattr(module, "_MAX_DIRECTORY", 50)
    with pytest.raises(WeightsError, match=r"a list of files of .* bytes"):
        read_archive(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02}q\x00h\x05.",
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo place of 4 billion
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02X\x03\x00\x00\x00abcQ.",
        b"\xff" * 50,
    ],
)
def test_damaged_pickles(tmp_path, data):
    path = saved(tmp_path / "x.pt", tensors("a"))
    with_pickle(path, lambda _: data)
    with pytest.raises(WeightsError, match=r"x.pt: "):
        read_archive(path)


def test_damage_anywhere(tmp_path):
    """Cut short, and with bytes changed: an error of ours, or values of the same shape."""
    path = saved(tmp_path / "x.pt", {**tensors("a", "b"), "prompt_text": "hello"})
    content = path.read_bytes()
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError):
            read_archive(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            found = read_archive(path)
        except WeightsError:
            refused += 1
        else:
            assert sum(t.nbytes for t in found.tensors.values()) <= 2 * len(content)
    assert refused > 80


# Files.


@pytest.fixture
def checkpoint(tmp_path):
    """A directory as upstream ships it."""
    for name, value in {
        "flow.pt": tensors("a"),
        "hift.pt": tensors("generator.b"),
        "spks/luna.pt": {"vp_emb": torch.ones(1, 192), "prompt_text": "你好"},
    }.items():
        path = tmp_path / "checkpoint" / "talker" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    return tmp_path / "checkpoint"


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


WRITTEN = ["talker/flow.safetensors", "talker/hift.safetensors", "talker/spks/luna.safetensors"]


def test_a_checkpoint(checkpoint, tmp_path):
    before = files(checkpoint)
    written = convert(checkpoint, tmp_path / "out")
    assert files(tmp_path / "out") == WRITTEN
    assert files(checkpoint) == before
    assert [(w.target, w.tensors) for w in written] == [(tmp_path / "out" / name, 1) for name in WRITTEN]
    with safe_open(tmp_path / "out" / WRITTEN[2], "pt") as file:
        assert file.metadata() == {"prompt_text": "你好"}
    assert list(load_file(tmp_path / "out" / WRITTEN[1])) == ["b"]
    convert(checkpoint)
    assert files(checkpoint) == sorted(before + WRITTEN)
    mode = (checkpoint / WRITTEN[0]).stat().st_mode
    assert mode == (checkpoint / "config.json").stat().st_mode


def test_nothing_is_overwritten_without_being_told(checkpoint):
    (checkpoint / WRITTEN[1]).write_text("mine")
    before = files(checkpoint)
    with pytest.raises(WeightsError, match=r"hift.safetensors: is there already; --force replaces it"):
        convert(checkpoint)
    assert files(checkpoint) == before
    assert (checkpoint / WRITTEN[1]).read_text() == "mine"
    convert(checkpoint, force=True)
    assert list(load_file(checkpoint / WRITTEN[1])) == ["b"]


def test_one_bad_archive_and_nothing_is_written(checkpoint):
    torch.save(Command(), checkpoint / "talker" / "z.pt")
    torch.save({"a": 1}, checkpoint / "talker" / "y.pt")
    before = files(checkpoint)
    with pytest.raises(WeightsError, match=r"(?s)2 problems.*y.pt: a: .*z.pt: its pickle asks for") as caught:
        convert(checkpoint)
    assert len(caught.value.problems) == 2
    assert files(checkpoint) == before


def test_a_write_that_fails_leaves_the_old_file(checkpoint, monkeypatch):
    convert(checkpoint)
    before = {name: (checkpoint / name).read_bytes() for name in files(checkpoint)}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(WeightsError, match=r"flow.safetensors: cannot be written .*No space left"):
        convert(checkpoint, force=True)
    assert {name: (checkpoint / name).read_bytes() for name in files(checkpoint)} == before


def test_what_is_no_archive(tmp_path):
    with pytest.raises(WeightsError, match=r"found no .pt file"):
        convert(tmp_path)
    with pytest.raises(WeightsError, match=r"gone.pt: no such file"):
        convert(tmp_path / "gone.pt")
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(WeightsError, match=r"x.pt: no such file"):
        convert(tmp_path)
    (tmp_path / "x.pt").rmdir()
    (tmp_path / "x.pt").write_bytes(io.BytesIO().getvalue())
    with pytest.raises(WeightsError, match=r"x.pt: not a torch archive"):
        convert(tmp_path)


def test_too_many_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_FILES", 1)
    for name in ("a.pt", "b.pt"):
        saved(tmp_path / name, tensors("a"))
    with pytest.raises(WeightsError, match=r"found 2 .pt files, expected at most 1"):
        convert(tmp_path)


def test_the_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", str(checkpoint), "-o", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {out / name}: 1 tensors" for name in WRITTEN]
    assert cli.main(["convert", str(checkpoint), "-o", str(out)]) == 1
    assert capsys.readouterr().err.startswith("ming-rt: 3 problems:\n  ")
    assert cli.main(["convert", str(checkpoint / "talker" / "flow.pt"), "-o", str(out), "--force"]) == 0
    assert (out / "flow.safetensors").is_file()
    assert cli.main(["convert", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("ming-rt: ")
