"""The ``ming-rt`` command as a user sees it: output, one-line errors and exit codes."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import ming_rt
from ming_rt import cli
from ming_rt.config import GENERATIONS

COMMANDS = ("chat", "transcribe", "info", "demo", "convert", "bench")


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch, cache_home):
    """Runs ``ming-rt`` in this process; ``typed`` is what comes through the pipe on stdin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))

    def call(*arguments: object, typed: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as end:  # argparse: help, version and wrong usage
            code = end.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model(demo_model) -> Path:
    return demo_model("v1.5")


@pytest.fixture(scope="module")
def answers(model, demo_files):
    """What the Python face says to the questions asked here; the command line must say the same."""
    with ming_rt.load(model) as session:

        def answer(text: str, **media: Path) -> str:
            parts = [{"type": kind, kind: str(path)} for kind, path in media.items()]
            content = [*parts, {"type": "text", "text": text}]
            return session.chat([{"role": "user", "content": content}], max_tokens=6).text

        yield {
            "text": answer("Hello"),
            "image": answer("What?", image=demo_files.image),
            "audio": answer("What?", audio=demo_files.audio),
            "video": answer("What?", video=demo_files.video),
            "transcript": session.transcribe(str(demo_files.audio), max_tokens=6).text,
        }


def one_line(error: str) -> bool:
    return error.startswith("ming-rt: ") and error.count("\n") == 1 and "Traceback" not in error


# Help and usage.


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(run, command):
    result = run(*([command] if command else []), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: ming-rt")
    if command is None:
        assert all(re.search(rf"\n    {name}\s", result.out) for name in COMMANDS)


def test_every_argument_is_explained():
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert tuple(commands.choices) == COMMANDS
    for name, command in commands.choices.items():
        assert command.description
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"


def test_version(run):
    assert run("--version").out == f"ming-rt {ming_rt.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["talk"],
        ["chat"],
        ["chat", "demo", "hi", "there"],
        ["chat", "demo", "hi", "--tempreature", "1"],
        ["chat", "demo", "hi", "--temperature", "hot"],
        ["chat", "demo", "hi", "--top-k", "1.5"],
        ["chat", "demo", "hi", "--max-tokens", ""],
        ["chat", "demo", "hi", "--dtype", "int4"],
        ["chat", "demo", "hi", "--image"],
        ["transcribe", "demo"],
        ["chat", "demo", "hi", "--quant", "int2"],
        ["chat", "demo", "hi", "--gpu-memory-utilization", "most"],
        ["info", "demo", "v1"],
        ["info", "demo", "--js"],
        ["demo", "--generation", "v2"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run, arguments):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage: ming-rt")


@pytest.mark.parametrize(
    "arguments", [["what"], ["ops", "--threads", "0"], ["ops", "--seconds", "nan"]], ids=" ".join
)
def test_wrong_usage_of_the_bench_is_2(run, arguments):
    pytest.importorskip("ming_rt.bench", reason="the bench is part of the installed package")
    result = run("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("ming-rt bench: ")


# Mistakes.


@pytest.mark.parametrize("command", ["chat", "transcribe", "info"])
@pytest.mark.parametrize(
    "path", ["/no/such/model", "", "demo:v9", "x" * 5000, "a\0b", "~nobody-at-all/x", os.devnull, __file__]
)
def test_no_model_there_is_1(run, demo_files, command, path):
    more = {"chat": ["hi"], "transcribe": [demo_files.audio], "info": []}[command]
    result = run(command, path, *more)
    assert (result.code, result.out) == (1, "")
    assert one_line(result.err)


def edit(name: str, old: bytes, new: bytes):
    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        assert old in data
        (directory / name).write_bytes(data.replace(old, new, 1))

    return change


def cut(name: str, size: int):
    return lambda directory: os.truncate(sorted(directory.glob(name))[0], size)


def remove(name: str):
    return lambda directory: sorted(directory.glob(name))[0].unlink()


def write(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


DAMAGE = {
    "empty directory": (lambda d: [p.unlink() for p in d.iterdir()], "config.json: file not found"),
    "no config": (remove("config.json"), "config.json: file not found"),
    "config is no JSON": (cut("config.json", 100), "config.json"),
    "config is a list": (write("config.json", b"[]"), "config.json"),
    "config of another model": (write("config.json", b'{"model_type": "llama"}'), "config.json"),
    "config nested deeply": (write("config.json", b"[" * 100_000), "config.json"),
    "config with an endless number": (write("config.json", b'{"a": ' + b"1" * 10_000 + b"}"), "config.json"),
    "config is a directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        "config.json",
    ),
    "no hidden size": (edit("config.json", b'"hidden_size"', b'"hidden_sise"'), "hidden_size"),
    "negative layers": (
        edit("config.json", b'"num_hidden_layers": ', b'"num_hidden_layers": -'),
        "num_hidden_layers",
    ),
    "preprocessor is no JSON": (cut("preprocessor_config.json", 9), "preprocessor_config.json"),
    "no tokenizer": (remove("tokenizer.json"), "neither tokenizer.json nor tokenizer.model"),
    "tokenizer is no JSON": (cut("tokenizer.json", 1000), "tokenizer.json"),
    "tokenizer of another kind": (
        write("tokenizer.json", b'{"model": {"type": "WordLevel"}}'),
        "tokenizer.json",
    ),
    "no index": (remove("*.index.json"), "safetensors"),
    "index is no JSON": (cut("*.index.json", 100), "index.json"),
    "index leads elsewhere": (
        edit("model.safetensors.index.json", b"model-0", b"../model-0"),
        "expected the name",
    ),
    "no shard": (remove("*.safetensors"), "model-00001-of"),
    "truncated shard": (cut("*.safetensors", 5000), "model-00001-of"),
    "empty shard": (cut("*.safetensors", 0), "model-00001-of"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_1(run, model, tmp_path, case):
    damage, named = DAMAGE[case]
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    damage(broken)
    for command in (["chat", broken, "hi"], ["info", broken]):
        result = run(*command)
        needed = "tokenizer" not in case or command[0] == "chat"
        assert result.code == int(needed)
        if needed:
            assert named in result.err + result.out
            assert "Traceback" not in result.err
            assert result.err.count("\n") < 60
    if case not in ("no shard", "truncated shard", "empty shard", "no index", "index is no JSON"):
        assert one_line(run("chat", broken, "hi").err)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "0"], "top_p"),
        (["--repetition-penalty", "inf"], "repetition_penalty"),
        (["--no-repeat-ngram-size", "-2"], "no_repeat_ngram_size"),
        (["--seed", "-1"], "seed"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--stop", ""], "stop"),
        (["--image", "/no/such.png"], "/no/such.png"),
        (["--audio", "/no/such.wav"], "/no/such.wav"),
        (["--video", "http://127.0.0.1/x.mp4"], "web address"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_told_before_the_model_is_loaded(run, model, monkeypatch, options, named):
    monkeypatch.setattr(ming_rt, "load", lambda *a, **k: pytest.fail("loaded"), raising=False)
    result = run("chat", model, "hi", *options)
    assert (result.code, result.out) == (1, "")
    assert one_line(result.err)
    assert named in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "MODEL", "hi", "--threads", "0"],
        ["chat", "MODEL", "hi", "--threads", "100000"],
        ["chat", "MODEL", "hi", "--device", "gpu"],
        ["chat", "MODEL", "hi", "--device", "cuda:999"],
        ["chat", "MODEL", "hi", "--device", "cpu", "--quant", "int8"],
        ["chat", "MODEL", "hi", "--gpu-memory-utilization", "1.5"],
        ["transcribe", "MODEL", "SOUND", "--device", "cpu", "--quant", "int4"],
        ["chat", "MODEL", "hi", "--image", "SOUND"],
        ["chat", "MODEL", "hi", "--audio", "IMAGE"],
        ["chat", "MODEL", "hi", "--video", "SOUND"],
        ["chat", "MODEL", "hi", "--image", "IMAGE", "--video", "VIDEO"],
        ["chat", "MODEL", "hi", "--audio", "SOUND", "--audio", "SOUND"],
        ["chat", "MODEL", "\udcff"],
        ["transcribe", "MODEL", "IMAGE"],
        ["transcribe", "MODEL", "/no/such.wav"],
        ["transcribe", "MODEL", "SOUND", "--language", "Chinese"],
        ["transcribe", "MODEL", "SOUND", "--max-tokens", "0"],
        ["demo", "--max-tokens", "0"],
    ],
    ids=" ".join,
)
def test_mistakes_are_1(run, model, demo_files, arguments):
    names = {"MODEL": model, "IMAGE": demo_files.image, "SOUND": demo_files.audio, "VIDEO": demo_files.video}
    result = run(*(names.get(a, a) for a in arguments))
    assert (result.code, result.out) == (1, "")
    assert one_line(result.err)


def test_a_cache_that_cannot_be_written_is_1(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for command in (["demo"], ["chat", "demo", "hi"], ["info", "demo:v1"]):
        result = run(*command)
        assert (result.code, result.out) == (1, "")
        assert one_line(result.err)


# Answers.


@pytest.mark.parametrize("kind", ["text", "image", "audio", "video"])
def test_one_question(run, model, demo_files, answers, kind):
    media = [] if kind == "text" else [f"--{kind}", getattr(demo_files, kind)]
    result = run("chat", model, "Hello" if kind == "text" else "What?", *media, "--max-tokens", 6)
    assert result == (0, answers[kind] + "\n", "")


def test_options_of_a_question(run, model):
    seeded = ["chat", model, "Hi", "--max-tokens", 8, "--temperature", "1.5", "--top-k", 50, "--top-p", "0.9"]
    one = run(*seeded, "--seed", 1)
    assert one == run(*seeded, "--seed", 1) != run(*seeded, "--seed", 2)
    told = run("chat", model, "Hi", "--max-tokens", 4, "--stats", "--threads", 1, "--dtype", "float32")
    assert told.code == 0
    assert "TTFT" in told.err
    assert "tok/s" in told.err
    plain = run("chat", model, "Hi", "--max-tokens", 6).out
    stop = plain[1:3]
    assert (
        run("chat", model, "Hi", "--max-tokens", 6, "--stop", stop).out == plain[: plain.index(stop)] + "\n"
    )
    for changed in (["--thinking"], ["--system", "Be brief."], ["--repetition-penalty", "50"]):
        assert run("chat", model, "Hi", "--max-tokens", 12, *changed).code == 0


def test_a_conversation_through_a_pipe(run, model, demo_files, answers):
    typed = f"Hello\n\n/help\n/image {demo_files.image}\n/reset\nHello\n/quit\nnever asked\n"
    result = run("chat", model, "--max-tokens", 6, typed=typed)
    assert result.code == 0
    assert result.err == ""
    assert result.out == f"{answers['text']}\n{cli.CHAT_HELP}\n{answers['text']}\n"
    shown = run("chat", model, "--max-tokens", 6, "--image", demo_files.image, typed="What?")
    assert shown.out == f"{answers['image']}\n"
    later = run(
        "chat", model, "--max-tokens", 6, "--stats", typed=f"Hello\n/audio {demo_files.audio}\nWhat?\n"
    )
    prompts = [int(line.split()[1]) for line in later.err.splitlines()]
    assert prompts[1] > prompts[0] + 50, "the second turn holds the first and the recording"


def test_a_conversation_survives_mistakes(run, model, answers):
    typed = "/image /no/such.png\nWhat?\n/picture\n/video\n\udcff\nHello\n"
    result = run("chat", model, "--max-tokens", 6, typed=typed)
    assert result.out == f"{answers['text']}\n"
    assert result.code == 1, "a script must notice"
    missing, unknown, bare, surrogate = result.err.splitlines()
    assert missing == "ming-rt: image: no file '/no/such.png'"
    assert unknown.startswith("unknown command /picture")
    assert bare == "/video needs a path"
    assert "surrogate" in surrogate


def test_transcribe(run, model, demo_model, demo_files, answers):
    result = run("transcribe", model, demo_files.audio, "--max-tokens", 6)
    assert result == (0, answers["transcript"] + "\n", "")
    told = run(
        "transcribe",
        demo_model("flash"),
        demo_files.audio,
        "--language",
        "English",
        "--max-tokens",
        4,
        "--stats",
    )
    assert told.code == 0
    assert told.err.startswith("language English, prompt ")
    assert run("transcribe", model, demo_files.audio, "--context", "tea", "--max-tokens", 2).code == 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_info(run, demo_model, generation):
    text = run("info", demo_model(generation))
    assert (text.code, text.err) == (0, "")
    assert f"generation     {generation}:" in text.out
    for word in (
        "parts",
        "thinker",
        "vision",
        "parameters",
        "active per token",
        "on disk",
        "KV cache",
        "float32",
    ):
        assert word in text.out
    assert "problems       none" in text.out
    report = json.loads(run("info", f"demo:{generation}", "--json").out)
    assert report["generation"] == generation
    assert 0 < report["parameters_active"] < report["parameters_total"]
    assert report["disk_bytes"] > sum(part["nbytes"] for part in report["parts"] if part["used"]) > 0
    weights, cache = report["weight_bytes"], report["kv_bytes_per_token"]
    assert 1.5 < weights["float32"] / weights["bfloat16"] <= 2.0
    assert cache["float32"] == 2 * cache["bfloat16"] > 0
    assert {part["name"] for part in report["parts"]} >= {"thinker", "vision"}


def test_info_shows_the_devices(run, model, monkeypatch):
    monkeypatch.setattr("ming_rt.runtime.info.cuda_reason", lambda: "the driver is on holiday")
    for arguments in ([], [model]):
        text = run("info", *arguments)
        assert (text.code, text.err) == (0, "")
        assert re.search(r"^devices +cpu ", text.out, re.MULTILINE)
        assert "no GPU: the driver is on holiday\n" in text.out
        report = json.loads(run("info", *arguments, "--json").out)
        assert report["devices"][0]["device"] == "cpu"
        assert report["cuda_reason"] == "the driver is on holiday"
        assert ("generation" in report) == bool(arguments)


def test_device_options_reach_the_session(run, model, monkeypatch):
    asked = {}

    def load(path, **options):
        asked.update(options)
        raise ming_rt.UnsupportedError("enough")

    monkeypatch.setattr(ming_rt, "load", load, raising=False)
    options = ["--device", "cuda:1", "--dtype", "bfloat16", "--quant", "int4"]
    result = run("chat", model, "hi", *options, "--gpu-memory-utilization", "0.5")
    assert (result.code, result.err) == (1, "ming-rt: enough\n")
    assert asked.items() >= {
        ("device", "cuda:1"),
        ("dtype", "bfloat16"),
        ("quant", "int4"),
        ("gpu_memory_utilization", 0.5),
    }


@pytest.mark.parametrize("generation", GENERATIONS)
def test_demo(run, generation):
    result = run("demo", "--generation", generation, "--max-tokens", 3)
    assert (result.code, result.err) == (0, "")
    assert "RANDOM weights" in result.out
    assert "mean nothing" in result.out
    for word in ("[image]", "[audio]", "[video]", "loaded in", "encode", "TTFT", "tok/s"):
        assert word in result.out


def test_a_model_by_name(run, answers):
    assert run("chat", "demo", "Hello", "--max-tokens", 6).out == answers["text"] + "\n"
    assert run("chat", "demo:v1.5", "Hello", "--max-tokens", 6).out == answers["text"] + "\n"


# The terminal.


def test_a_terminal_of_another_encoding(model, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert cli.main(["chat", str(model), "--temperature", "5", "--seed", "1", "--max-tokens", "30"]) == 0
    assert len(out.buffer.getvalue()) > 20


def test_interrupted_in_process_is_130(run, model, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ming_rt, "load", interrupted, raising=False)
    assert run("chat", model, "hi") == (130, "", "\n")


def process(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "ming_rt.cli", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_ctrl_c_and_a_closed_pipe(model):
    """Real processes: an interrupt in the middle of an answer, and a reader that goes away."""
    endless = ["chat", model, "Hi", "--max-tokens", 100_000, "--temperature", 1, "--seed", 1]
    with (
        process(*endless, stdout=subprocess.PIPE) as first,
        process(*endless, stdout=subprocess.PIPE) as second,
    ):
        for each in (first, second):
            assert each.stdout.read(1)
        first.send_signal(signal.SIGINT)
        second.stdout.close()
        assert first.wait(30) == 130
        assert second.wait(30) == 1
        assert first.stderr.read() == "\n"
        assert second.stderr.read() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_1(model):
    with open("/dev/full", "w") as full, process("info", model, stdout=full) as done:
        assert one_line(done.stderr.read())
        assert done.wait() == 1
