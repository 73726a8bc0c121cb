"""A loaded model ready for use: chat and transcription, from any thread or event loop."""

from __future__ import annotations

import asyncio
import functools
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch

from ming_rt import ops
from ming_rt.config import GENERATIONS, Generation, OmniConfig
from ming_rt.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    UnsupportedError,
    shown,
)
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.processor import Processor, Prompt
from ming_rt.inputs.tokenizer import Tokenizer
from ming_rt.models.omni import Omni
from ming_rt.ops.packed import Quant
from ming_rt.pipelines.asr import Context, asr_request, transcript
from ming_rt.pipelines.events import Done, Transcript
from ming_rt.runtime import weights
from ming_rt.runtime.checkpoint import Checkpoint
from ming_rt.runtime.device import Device, cuda_reason, resolve
from ming_rt.runtime.engine import Engine, EngineOptions, EngineStats
from ming_rt.runtime.handle import Handle
from ming_rt.runtime.planner import memory_plan, page_bytes, with_pages
from ming_rt.runtime.progress import ProgressBar
from ming_rt.runtime.request import SamplingParams

Dtype = Literal["auto", "float32", "bfloat16"]

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
QUANTS = get_args(Quant)
PAGE_SIZE = 32
BATCHED_TOKENS = {"cpu": 512, "emu": 512, "cuda": 4096}
MAX_THREADS = 1024  # of the kernels' thread pool
# On the CPU:

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
# Options of a prompt and their types; None = not given.
_PROMPT: dict[str, type | tuple[type, ...]] = {
    "thinking": bool,
    "use_whisper_encoder": (bool, type(None)),
    "answer_prefix": str,
    "trust_special": bool,
    "system_template": (str, type(None)),
    "add_generation_prompt": bool,
    "use_cot_system_prompt": bool,
    "sys_prompt_exp": (str, type(None)),
}


@dataclass(frozen=True)
class SessionInfo:
    """What is loaded and how much it can hold."""

    path: Path
    generation: Generation
    device: str
    """cpu, cuda:N or emu."""
    dtype: str
    parts: tuple[str, ...]
    """thinker, and those of vision, whisper, sanm that the checkpoint has."""
    max_model_len: int
    """Longest prompt + answer in tokens."""
    kv_tokens: int
    """Tokens the KV cache holds over all requests."""
    kv_bytes: int


def load(path: str | Path, **options: Any) -> Session:
    """Load a checkpoint and return the session; the arguments are those of ``Session``."""
    return Session(path, **options)


class Session:
    """One loaded model with its engine; close it, use it as a context manager, or drop it.

    Args:
        path: checkpoint directory in upstream's layout, or ``"demo"`` / ``"demo:GENERATION"`` for the tiny
            random model.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: a GPU if one can be used, else the CPU.
            (``"emu"`` emulates the CUDA kernels on the CPU, for their development: very slow.)
        dtype: compute dtype; ``"auto"`` is bfloat16, in which the original runs its models.
        tp: tensor-parallel ranks; 1.
        quant: ``"int8"`` or ``"int4"``: the thinker's weights take a half or a quarter of the memory, on GPUs
            only; None = as computed with.
        threads: CPU threads of the kernels, for the whole process; None leaves them as they are.
        progress: draw a progress bar while a big checkpoint loads.
        kv_bytes: memory of the KV cache; None = on the CPU a quarter of the free memory, at most what four
            sequences of full length need; on a GPU what the rest leaves, at most ``max_num_seqs`` of those.
        max_model_len: longest prompt + answer in tokens; None = what the model was trained for, or what the
            cache holds if that is less.
        max_num_seqs: requests that run at the same time; more wait.
        max_num_batched_tokens: tokens computed in one step; longer prompts are cut into several steps. None =
            512, on a GPU 4096: enough to be bound by arithmetic, few enough not to hold up other requests.
        gpu_memory_utilization: share of a GPU's memory, above 0 to 1, that may be full in the end: with what
            others use, weights, activations and KV cache.
        limits: caps on what one request may bring.

    Raises:
        InvalidRequestError, UnsupportedError: an option is wrong or not available in this build.
        ConfigError, TokenizerError, WeightsError: the checkpoint is malformed.
        CapacityError: the weights or the KV cache do not fit into the memory, or ``kv_bytes`` does not hold
            ``max_model_len`` tokens.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        tp: int = 1,
        quant: Quant | None = None,
        threads: int | None = None,
        progress: bool = False,
        kv_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        place, compute = _check_build(device, dtype, tp, quant)
        share = gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InvalidRequestError(
                f"gpu_memory_utilization: expected a number above 0 and up to 1, got {shown(share)}"
            )
        given = {"kv_bytes": kv_bytes, "max_model_len": max_model_len, "threads": threads}
        for name, value in given.items():
            most = MAX_THREADS if name == "threads" else 1 << 48
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise InvalidRequestError(
                    f"{name}: expected a positive integer of at most {most}, or None, got {shown(value)}"
                )
        if not isinstance(limits, Limits):
            raise InvalidRequestError(f"limits: expected Limits, got {shown(limits)}")
        if max_num_batched_tokens is None:
            max_num_batched_tokens = BATCHED_TOKENS[place.kind]
        options = EngineOptions(
            page_size=PAGE_SIZE, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        directory = model_directory(path)
        config = OmniConfig.from_dir(directory)
        thinker = config.thinker
        tokenizer = Tokenizer.from_dir(directory, thinker.vocab_size)
        self._processor = Processor(config, tokenizer, directory, limits)
        if threads is not None:
            ops.set_num_threads(threads)
        release = place.hold()
        try:
            with place.current():
                build = functools.partial(Omni, config)
                checkpoint = Checkpoint(directory)
                planned = weights.plan(build, checkpoint, compute, device=place, quant=quant)
                if place.kind == "cuda":
                    memory = memory_plan(place, share, planned.nbytes, config, compute, options)
                    options = with_pages(options, thinker, compute, kv_bytes, max_model_len, memory)
                bar = ProgressBar("loading") if progress else None
                model = weights.load(
                    build, checkpoint, compute, device=place, quant=quant, progress=bar, planned=planned
                )
                if place.kind != "cuda":
                    options = with_pages(options, thinker, compute, kv_bytes, max_model_len)
                self._engine = Engine(
                    model, tokenizer, tokenizer.stop_ids(config.generation), compute, options, place
                )
        except BaseException:
            release()
            raise
        # The engine may outlive the session in the handle of a stream; the model lives as long as the engine.
        self._release = weakref.finalize(model, release)
        self._release.atexit = False
        self._config = config
        self._closed = False
        self.info = SessionInfo(
            path=directory,
            generation=config.generation,
            device=str(place),
            dtype=str(compute).removeprefix("torch."),
            parts=("thinker", *(["vision"] if config.vision else []), *sorted(config.audio)),
            max_model_len=self._engine.max_model_len,
            kv_tokens=options.num_pages * PAGE_SIZE,
            kv_bytes=options.num_pages * page_bytes(thinker, compute, PAGE_SIZE),
        )

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> Done: ...

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> Handle: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        return_hidden: bool = False,
        **options: Any,
    ) -> Done | Handle:
        """Answer a conversation.

        Args:
            messages: list of ``{"role": "user" | "assistant" | "system", "content": text or parts}``; a part
                is ``{"type": "text" | "image" | "video" | "audio", <type>: value}``. Earlier media have to be
                repeated in every turn (what was computed from them is reused).
            stream: return the running request, an iterator of ``TextDelta`` and a final ``Done``; cancel it
                by ``cancel()``, by leaving its ``with`` block or by dropping it.
            return_hidden: add the hidden states of the prompt to ``Done``.
            options: fields of ``SamplingParams``, and ``thinking``, ``answer_prefix`` (text the answer begins
                with, not repeated in the result), ``use_whisper_encoder`` (v1), ``trust_special``,
                ``system_template``, ``add_generation_prompt``, ``use_cot_system_prompt``, ``sys_prompt_exp``.

        Raises:
            InvalidRequestError: an option or message is wrong; InvalidMediaError: a medium cannot be read.
            CapacityError: the prompt is too long.
        """
        _check_stream(stream)
        handle = self._engine.submit(*self._prepare(messages, options), return_hidden=return_hidden)
        return handle if stream else handle.result()

    @overload
    async def achat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> Done: ...

    @overload
    async def achat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> Handle: ...

    async def achat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        return_hidden: bool = False,
        **options: Any,
    ) -> Done | Handle:
        """``chat`` for event loops: media are read on a thread, a stream is used with ``async for``.

        Cancelling the task that waits cancels the request.
        """
        _check_stream(stream)
        prepared = await asyncio.to_thread(self._prepare, messages, options)
        handle = self._engine.submit(*prepared, return_hidden=return_hidden)
        return handle if stream else await handle.aresult()

    def transcribe(
        self, audio: Any, language: str | None = None, context: Context | None = None, **sampling: Any
    ) -> Transcript:
        """Write down what is said in a recording, with the prompt the models were trained on for this.

        Args:
            audio: path, bytes, data URL, or ``(samples, sample_rate)``.
            language: flash only: language or dialect name the answer is made to use, e.g. ``"Chinese"``; None
                lets the model decide.
            context: what the recording is about (a string), words that may occur in it (a list of strings),
                or ``{"topic": ..., "phrases": [...]}``.
            sampling: fields of ``SamplingParams``.

        Raises:
            UnsupportedError: this checkpoint has no fitting audio encoder, or cannot be told the language.
            InvalidRequestError, InvalidMediaError: an argument or the recording cannot be used.
        """
        messages, options = self._asr(audio, language, context, sampling)
        return transcript(self._config.generation, self.chat(messages, **options), language)

    async def atranscribe(
        self, audio: Any, language: str | None = None, context: Context | None = None, **sampling: Any
    ) -> Transcript:
        """``transcribe`` for event loops."""
        messages, options = self._asr(audio, language, context, sampling)
        return transcript(self._config.generation, await self.achat(messages, **options), language)

    def stats(self) -> EngineStats:
        """Queue lengths, KV usage and counters of the engine."""
        return self._engine.stats()

    def close(self) -> None:
        """End all requests (they fail with ``EngineClosedError``) and the engine's thread."""
        self._closed = True
        self._engine.close()
        self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> tuple[Prompt, SamplingParams]:
        """Check the options, then read the media: what is cheap to refuse is refused first."""
        if self._closed:
            raise EngineClosedError("the session is closed")
        _check_names(options, (*_SAMPLING, *_PROMPT))
        for name, value in options.items():
            if name in _PROMPT and not isinstance(value, _PROMPT[name]):
                raise InvalidRequestError(f"{name}: found {shown(value)}, expected {_types(_PROMPT[name])}")
        params = SamplingParams(**{name: options[name] for name in _SAMPLING if name in options})
        prompt = self._processor(messages, **{name: options[name] for name in _PROMPT if name in options})
        return prompt, params

    def _asr(
        self, audio: Any, language: str | None, context: Context | None, sampling: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages and all options of a transcription."""
        _check_names(sampling, _SAMPLING)
        messages, options = asr_request(self._config.generation, audio, language, context)
        return messages, {**sampling, **options}


def _check_build(device: str, dtype: str, tp: int, quant: str | None) -> tuple[Device, torch.dtype]:
    place = resolve(device)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidRequestError(f"dtype: found {shown(dtype)}, expected {', '.join(DTYPES)}")
    if type(tp) is not int or tp != 1:
        raise UnsupportedError(f"tp: found {shown(tp)}, expected 1 (one process is all a session uses)")
    if quant is not None and (not isinstance(quant, str) or quant not in QUANTS):
        raise InvalidRequestError(f"quant: found {shown(quant)}, expected None, {' or '.join(QUANTS)}")
    if quant is not None and place.kind == "cpu":
        reason = cuda_reason() if device == "auto" else f"device is {device!r}"
        raise UnsupportedError(f"quant: found {quant!r}, which needs a GPU, but {reason}")
    return place, DTYPES[dtype]


def _check_names(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise InvalidRequestError(f"{shown(name)}: no such option; expected one of {', '.join(known)}")


def _check_stream(stream: bool) -> None:
    if not isinstance(stream, bool):
        raise InvalidRequestError(f"stream: expected true or false, got {shown(stream)}")


def model_directory(path: str | Path) -> Path:
    """The checkpoint directory meant by ``path``, a directory or ``demo[:GENERATION]``.

    Raises:
        ConfigError: there is no such directory or generation.
        InvalidRequestError: not a path at all.
        OSError: the demo checkpoint cannot be written to the cache directory.
    """
    if not isinstance(path, (str, Path)):
        raise InvalidRequestError(f"path: expected a directory, got {type(path).__name__}")
    name, _, generation = str(path).partition(":")
    if name == "demo" and not os.path.exists(path):
        from ming_rt.demo import default_checkpoint

        generation = generation or "v1.5"
        if generation not in GENERATIONS:
            raise ConfigError(f"{path}: expected demo:GENERATION with one of {', '.join(GENERATIONS)}")
        return default_checkpoint(generation)
    directory = os.path.expanduser(path)
    if not os.path.isdir(directory):  # unlike Path.is_dir, False for any name
        raise ConfigError(f"{path}: no such directory; expected a checkpoint directory or demo[:GENERATION]")
    return Path(directory)


def _types(kinds: type | tuple[type, ...]) -> str:
    names = {bool: "true or false", str: "a string", type(None): "None"}
    return " or ".join(names[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
