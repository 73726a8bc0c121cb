"""The ``ming-rt`` command.

Exit codes: 0 success, 1 an error the user can act on (one line on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ming_rt import __version__
from ming_rt.config import GENERATIONS
from ming_rt.errors import MingError
from ming_rt.pipelines.events import Done

if TYPE_CHECKING:
    from ming_rt.pipelines.events import Transcript
    from ming_rt.pipelines.session import Session

CHAT_HELP = """\
/image PATH   add a picture to the next message     /reset   forget the conversation
/audio PATH   add sound to the next message         /quit    leave (or Ctrl-D)
/video PATH   add a video to the next message       /help    this text"""


# Names spelled out, most options on one line.
_STYLE: dict[str, Any] = {
    "allow_abbrev": False,
    "formatter_class": functools.partial(argparse.HelpFormatter, max_help_position=32),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show or read is replaced
            stream.reconfigure(errors="replace")
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except MingError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; what is still buffered must not be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a cache folder that cannot be written
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)


def _fail(problem: object) -> int:
    print(f"ming-rt: {problem}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="ming-rt", description="Run inclusionAI's Ming omni-modal models.", **_STYLE
    )
    parser.add_argument("--version", action="version", version=f"ming-rt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    chat = _command(commands, "chat", run_chat, "ask a model about text, pictures, sound and video")
    _add_model_options(chat)
    chat.add_argument("prompt", nargs="?", help="one question; without it, an interactive conversation")
    for kind in ("image", "audio", "video"):
        chat.add_argument(
            f"--{kind}", action="append", default=[], metavar="PATH", help=f"{kind} to ask about"
        )
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--thinking", action="store_true", help="ask the model to reason before it answers")
    chat.add_argument(
        "--use-whisper-encoder", action="store_true", help="v1: hear through Whisper instead of SANM"
    )
    _add_sampling_options(chat)

    transcribe = _command(commands, "transcribe", run_transcribe, "write down what is said in a recording")
    _add_model_options(transcribe)
    transcribe.add_argument("audio", help="sound file")
    transcribe.add_argument("--language", help="language that is spoken (default: the model decides)")
    transcribe.add_argument("--context", help="topic or words the recording may contain")
    transcribe.add_argument("--max-tokens", type=int, metavar="N", help="longest transcript (default 512)")

    info = _command(commands, "info", run_info, "show the devices, and what a checkpoint holds and needs")
    _add_model(info, nargs="?")
    info.add_argument("--json", action="store_true", help="machine-readable")

    demo = _command(commands, "demo", run_demo, "make a tiny random model and let it see, hear and answer")
    demo.add_argument(
        "--generation", choices=GENERATIONS, default="v1.5", help="model generation (default v1.5)"
    )
    demo.add_argument("--max-tokens", type=int, default=48, metavar="N", help="answer length (default 48)")

    convert = _command(commands, "convert", run_convert, "write a checkpoint's .pt files as safetensors")
    convert.add_argument("source", metavar="DIR", help="checkpoint directory, or one .pt file")
    convert.add_argument(
        "-o", "--out", metavar="OUT", help="folder to write to (default: beside the .pt files)"
    )
    convert.add_argument("--force", action="store_true", help="replace files that are there already")

    bench = _command(commands, "bench", run_bench, "measure kernels, thinker and loading against torch")
    bench.add_argument("parts", nargs="*", metavar="PART", help="ops, thinker, load (default: all)")
    bench.add_argument(
        "--only", default="", metavar="TEXT", help="only rows whose 'op shape dtype' holds TEXT"
    )
    bench.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda or cuda:N")
    bench.add_argument("--threads", type=int, default=2, metavar="N", help="for both sides (default 2)")
    bench.add_argument("--seconds", type=float, metavar="S", help="per row (default 0.5, on a GPU 0.1)")
    bench.add_argument("--budget", type=float, metavar="S", help="begin no row after S seconds (on a GPU)")
    bench.add_argument("--out", default="bench-results", metavar="DIR", help="folder of table and plot")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=description, **_STYLE)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, **options: Any) -> None:
    text = "checkpoint directory, or demo[:GENERATION] for the random demo model"
    parser.add_argument("model", help=text, **options)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype"
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--quant", choices=("int8", "int4"), help="pack the weights smaller, on GPUs")
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="U",
        help="share of the GPU's memory to fill (default 0.9)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument("--stats", action="store_true", help="print timings to stderr")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: greedy)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 = greedy; higher is more random")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="choose among tokens of total probability P")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids earlier words")
    group.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="never repeat N tokens in a row")
    group.add_argument("--seed", type=int, metavar="N", help="makes random answers repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default 512)")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options given, checked: a mistake in them should not cost loading a model."""
    from ming_rt.runtime.request import SamplingParams

    given = {field.name: getattr(arguments, field.name, None) for field in fields(SamplingParams)}
    options = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**options)
    return options


def _check_files(parts: list[dict[str, str]]) -> None:
    """Refuse missing files before the model is loaded."""
    from ming_rt.inputs.limits import DEFAULT_LIMITS
    from ming_rt.inputs.source import resolve

    for part in parts:
        kind = part["type"]
        resolve(part[kind], kind, DEFAULT_LIMITS)


def _load(arguments: argparse.Namespace) -> Session:
    import ming_rt

    return ming_rt.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        quant=arguments.quant,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        threads=arguments.threads,
        progress=sys.stderr.isatty(),
    )


def _stream(session: Session, messages: list[dict], options: dict[str, Any]) -> Done:
    """Print an answer as it comes."""
    for event in session.chat(messages, stream=True, **options):
        if isinstance(event, Done):
            print(flush=True)
            return event
        print(event.text, end="", flush=True)
    raise AssertionError("a stream ends with Done")


def _stats(done: Done | Transcript) -> str:
    t, u = done.timings, done.usage
    rate = f"{t.decode_tokens_per_second:.1f} tok/s" if t.decode_tokens_per_second else "-"
    ttft = f"{1e3 * t.ttft:.0f} ms" if t.ttft is not None else "-"
    return (
        f"prompt {u.prompt_tokens} tokens ({u.cached_tokens} cached), answer {u.completion_tokens} tokens, "
        f"encode {1e3 * t.encode:.0f} ms, TTFT {ttft}, decode {rate}, {done.finish_reason}"
    )


def run_chat(arguments: argparse.Namespace) -> int:
    """``ming-rt chat``: one question, or a conversation read from the terminal."""
    options = _sampling(arguments)
    options |= {name: True for name in ("thinking", "use_whisper_encoder") if getattr(arguments, name)}
    start = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    parts = [
        {"type": kind, kind: path}
        for kind in ("image", "audio", "video")
        for path in getattr(arguments, kind)
    ]
    _check_files(parts)
    with _load(arguments) as session:
        if arguments.prompt is not None:
            content = [*parts, {"type": "text", "text": arguments.prompt}]
            done = _stream(session, [*start, {"role": "user", "content": content}], options)
            if arguments.stats:
                print(_stats(done), file=sys.stderr)
            return 0
        return _converse(session, start, parts, options, arguments.stats)


def _converse(session: Session, start: list[dict], parts: list[dict], options: dict, stats: bool) -> int:
    """Turns until the end of the input; from a pipe, the exit code tells whether one of them failed."""
    messages, code = list(start), 0
    terminal = sys.stdin.isatty()
    if terminal:
        print(CHAT_HELP)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return code
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return code
        if command == "/help":
            print(CHAT_HELP)
        elif command == "/reset":
            messages, parts = list(start), []
        elif command in ("/image", "/audio", "/video"):
            if rest:
                parts.append({"type": command[1:], command[1:]: rest.strip()})
            else:
                print(f"{command} needs a path", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {command}; /help lists them", file=sys.stderr)
        elif line:
            turn = {"role": "user", "content": [*parts, {"type": "text", "text": line}]}
            try:
                done = _stream(session, [*messages, turn], options)
            except MingError as error:
                # The conversation goes on as if the turn had not been said.
                code = 0 if terminal else 1
                _fail(error)
                continue
            finally:
                parts = []
            messages += [turn, {"role": "assistant", "content": done.text}]
            if stats:
                print(_stats(done), file=sys.stderr)


def run_transcribe(arguments: argparse.Namespace) -> int:
    """``ming-rt transcribe``: text to stdout, language and timings to stderr on request."""
    options = _sampling(arguments)
    _check_files([{"type": "audio", "audio": arguments.audio}])
    with _load(arguments) as session:
        result = session.transcribe(
            arguments.audio, language=arguments.language, context=arguments.context, **options
        )
    print(result.text)
    if arguments.stats:
        print(f"language {result.language or '-'}, {_stats(result)}", file=sys.stderr)
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    """``ming-rt info``: devices, and a checkpoint's parts, sizes and needs; 1 if that has problems."""
    from ming_rt.pipelines.session import model_directory
    from ming_rt.runtime.info import checkpoint_info, devices_info

    model = None if arguments.model is None else checkpoint_info(model_directory(arguments.model))
    reports = [model, devices_info()] if model else [devices_info()]
    if arguments.json:
        print(json.dumps({key: value for r in reports for key, value in r.as_dict().items()}, indent=1))
    else:
        print("\n".join(report.render() for report in reports))
    return 1 if model and model.problems else 0


def run_demo(arguments: argparse.Namespace) -> int:
    """``ming-rt demo``: the whole path once, on a model that costs seconds to make."""
    import time

    import ming_rt
    from ming_rt import demo

    _sampling(arguments)
    directory = demo.default_checkpoint(arguments.generation)
    media = demo.demo_media(directory.parent / "media")
    print(
        f"A tiny Ming {arguments.generation} model with RANDOM weights: it sees, hears and answers for real,"
    )
    print(f"but its words mean nothing. Checkpoint: {directory}")
    begin = time.perf_counter()
    with ming_rt.load(directory) as session:
        print(f"loaded in {1e3 * (time.perf_counter() - begin):.0f} ms")
        for kind, question in (
            ("image", "What is in this picture?"),
            ("audio", "What do you hear?"),
            ("video", "What happens in this video?"),
        ):
            path = getattr(media, kind)
            print(f"\n[{kind}] {path.name}: {question}\n")
            content = [{"type": kind, kind: str(path)}, {"type": "text", "text": question}]
            done = _stream(
                session, [{"role": "user", "content": content}], {"max_tokens": arguments.max_tokens}
            )
            print(f"\n{_stats(done)}")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """``ming-rt convert``: one line per file written."""
    from ming_rt.runtime.convert import convert

    for file in convert(arguments.source, arguments.out, force=arguments.force):
        print(f"wrote {file.target}: {file.tensors} tensors")
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """``ming-rt bench``: rows to stderr as they come, then table, data and picture into ``--out``."""
    from ming_rt.bench import gpu_run, run

    gpu = arguments.device != "cpu"
    parts = gpu_run.PARTS if gpu else run.PARTS
    seconds = arguments.seconds if arguments.seconds is not None else 0.1 if gpu else 0.5
    problem = None
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", arguments.device):
        problem = f"--device: expected cpu, cuda or cuda:N, got {arguments.device!r}"
    elif unknown := sorted(set(arguments.parts) - set(parts)):
        problem = f"unknown part {unknown[0]!r}; expected {', '.join(parts)}"
    elif not 1 <= arguments.threads <= 1024:
        problem = f"--threads: expected 1 to 1024, got {arguments.threads}"
    elif not 0 < seconds <= 3600:
        problem = f"--seconds: expected above 0 and at most 3600, got {seconds:g}"
    elif arguments.budget is not None and not (gpu and arguments.budget > 0):
        problem = "--budget: expected a number above 0, with --device cuda"
    if problem:
        print(f"ming-rt bench: {problem}", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)  # before minutes are spent measuring
    chosen = tuple(arguments.parts) or parts
    if gpu:
        budget = float("inf") if arguments.budget is None else arguments.budget
        report = gpu_run.run(chosen, arguments.device, arguments.only, seconds, budget, out)
    else:
        report = run.run(chosen, arguments.threads, arguments.only, seconds)
    if not report.rows:
        why = "every row failed" if report.failed else f"no row matches {arguments.only!r}"
        print(f"ming-rt bench: {why}", file=sys.stderr)
        return 1
    print(report.markdown())
    written = report.write(out)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if written[-1].suffix != ".png":
        print("no picture: matplotlib is not installed (pip install 'ming_rt[bench]')", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
