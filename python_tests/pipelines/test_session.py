"""Sessions over the random demo checkpoints: the whole path from messages to text, in every generation."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import ming_rt
from ming_rt.config import GENERATIONS
from ming_rt.demo import demo_media, make_checkpoint
from ming_rt.errors import (
    CapacityError,
    ConfigError,
    EngineClosedError,
    InvalidMediaError,
    InvalidRequestError,
    MingError,
    UnsupportedError,
)
from ming_rt.inputs.chat_template import ASR_PROMPT
from ming_rt.pipelines.events import Done, TextDelta, Timings, Usage

TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a generation's demo checkpoint, made once."""
    made = {}

    def directory(generation: str):
        if generation not in made:
            made[generation] = make_checkpoint(tmp_path_factory.mktemp("demo") / "model", generation)
        return made[generation]

    return directory


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return demo_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def session(checkpoint):
    with ming_rt.load(checkpoint("v1.5"), dtype="float32", kv_bytes=64 << 20) as loaded:
        yield loaded


def load(directory, **options):
    return ming_rt.load(directory, **{"dtype": "float32", "kv_bytes": 64 << 20, **options})


def user(text: str, **media) -> list[dict]:
    parts = [{"type": kind, kind: str(value)} for kind, value in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def questions(media) -> list[list[dict]]:
    return [
        user("Hello"),
        user("What is this?", image=media.image),
        user("What do you hear?", audio=media.audio),
        user("A longer question that has nothing to look at, but many words to read."),
        user("What is this?", image=media.image),
    ]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_every_generation_answers_about_every_medium(checkpoint, media, generation, kind):
    with load(checkpoint(generation)) as session:
        events = list(session.chat(user("What?", **{kind: getattr(media, kind)}), stream=True, max_tokens=4))
        *deltas, done = events
        assert all(isinstance(d, TextDelta) for d in deltas)
        assert isinstance(done, Done)
        assert "".join(d.text for d in deltas) == done.text
        assert done.usage.completion_tokens >= 1
        assert session.info.generation == generation
        assert session.stats().kv_pages_used == 0


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_do_not_depend_on_batch_chunks_or_prefix_hits(checkpoint, media, generation, dtype):
    directory, asked = checkpoint(generation), questions(media)
    with load(directory, dtype=dtype) as session:
        alone = [session.chat(q, max_tokens=TOKENS).token_ids for q in asked]
        again = [session.chat(q, max_tokens=TOKENS) for q in asked]
        assert [d.token_ids for d in again] == alone
        assert all(d.usage.cached_tokens > 0 for d in again if d.usage.prompt_tokens > 32)
        assert session.stats().media_cache_hits >= 4
    for sizes in ({}, {"max_num_batched_tokens": 24, "max_num_seqs": 3}):
        with load(directory, dtype=dtype, **sizes) as session:
            streams = [session.chat(q, stream=True, max_tokens=TOKENS) for q in asked]
            assert [s.result().token_ids for s in streams] == alone


def test_preemption_does_not_change_answers(checkpoint):
    directory = checkpoint("v1.5")
    asked = [user(f"Question {i}: " + "tell me more " * 6) for i in range(4)]
    with load(directory) as session:
        alone = [session.chat(q, max_tokens=60).token_ids for q in asked]
        info = session.info
    page = info.kv_bytes // info.kv_tokens * 32
    with load(directory, kv_bytes=12 * page) as session:
        streams = [session.chat(q, stream=True, max_tokens=60) for q in asked]
        assert [s.result().token_ids for s in streams] == alone
        assert session.stats().preemptions > 0
        assert session.stats().kv_pages_used == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_turn_reuses_media_and_cache(checkpoint, media, dtype):
    first = user("What is this?", image=media.image)
    with load(checkpoint("v1.5"), dtype=dtype) as session:
        done = session.chat(first, max_tokens=70)
        more = [*first, {"role": "assistant", "content": done.text}, *user("And this?", image=media.image)]
        later = session.chat(more, max_tokens=TOKENS)
        assert session.stats().media_cache_hits == 2, "the picture of the first turn, and the same once more"
    assert later.usage.cached_tokens >= done.usage.prompt_tokens - 64
    assert later.usage.prompt_tokens > 2 * done.usage.prompt_tokens
    with load(checkpoint("v1.5"), dtype=dtype) as cold:
        assert cold.chat(more, max_tokens=TOKENS).token_ids == later.token_ids


def test_hidden_states_are_those_of_the_model(session, media):
    asked = user("What is this?", image=media.image)
    done = session.chat(asked, max_tokens=2, return_hidden=True)
    s, h = done.usage.prompt_tokens, session._config.thinker.hidden_size
    assert done.hidden.input.shape == done.hidden.last.shape == (s, h)
    prompt = session._processor(asked)
    model = session._engine._worker.model
    with torch.inference_mode():
        media_rows = model.encode(prompt)
    expected = model.thinker.embed[torch.from_numpy(prompt.input_ids)].clone()
    expected[torch.from_numpy(media_rows.rows)] = media_rows.feats
    assert torch.equal(done.hidden.input, expected)
    assert torch.isfinite(done.hidden.last).all()
    # The first token follows from the last hidden state of the last prompt token.
    logits = ming_rt.ops.linear(done.hidden.last[-1:], model.thinker.head)
    assert int(logits.argmax()) == done.token_ids[0]


def test_sampling_options_reach_the_sampler(session):
    def tokens(**options):
        return session.chat(user("Hi"), max_tokens=TOKENS, **options).token_ids

    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)
    assert tokens(temperature=1.0, seed=1, top_k=1) == tokens()
    text = session.chat(user("Hi"), max_tokens=TOKENS).text
    if len(text) > 2:
        stopped = session.chat(user("Hi"), max_tokens=TOKENS, stop=text[1:3])
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[1:3])], "stop")
    logprobs = session.chat(user("Hi"), max_tokens=3, logprobs=4).logprobs
    assert all(r.top[0][0] == r.token_id and r.logprob <= 0 for r in logprobs)


def test_answer_prefix_ends_the_prompt(session):
    plain = session.chat(user("Hi"), max_tokens=1)
    led = session.chat(user("Hi"), max_tokens=1, answer_prefix="Well, ")
    assert led.usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": 1}, "'temprature': no such option"),
        ({"temperature": "hot"}, "^temperature: expected a number"),
        ({"max_tokens": 0}, "^max_tokens: expected an integer"),
        ({"thinking": "yes"}, "^thinking: found 'yes', expected true or false"),
        ({"answer_prefix": 5}, "^answer_prefix: found 5, expected a string"),
        ({"system_template": 5}, "^system_template: found 5, expected a string or None"),
        ({"use_whisper_encoder": 1}, "^use_whisper_encoder: found 1, expected true or false or None"),
    ],
)
def test_wrong_options_are_named(session, options, match):
    with pytest.raises(InvalidRequestError, match=match):
        session.chat(user("Hi"), **options)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("Hi", InvalidRequestError),
        ([], InvalidRequestError),
        ([{"role": "user", "content": [{"type": "image", "image": b"not a picture"}]}], InvalidMediaError),
        (user("x", image="/no/such/file.png"), MingError),
        (user("a " * 40000), CapacityError),
    ],
)
def test_bad_messages_leave_the_engine_running(checkpoint, messages, error):
    with load(checkpoint("v1.5"), max_model_len=2048) as session:
        other = session.chat(user("Hi"), stream=True, max_tokens=30)
        with pytest.raises(error):
            session.chat(messages)
        assert other.result().finish_reason in ("stop", "length")
        assert session.stats().kv_pages_used == 0


def test_async_twins(session, media):
    expected = [session.chat(q, max_tokens=TOKENS).token_ids for q in questions(media)]

    async def stream(question) -> tuple[int, ...]:
        async for event in await session.achat(question, stream=True, max_tokens=TOKENS):
            if isinstance(event, Done):
                return event.token_ids
        raise AssertionError("no Done")

    async def main() -> None:
        assert await asyncio.gather(*map(stream, questions(media))) == expected
        done = await session.achat(user("Hello"), max_tokens=TOKENS)
        assert done.token_ids == expected[0]
        transcript = await session.atranscribe(str(media.audio), max_tokens=TOKENS)
        assert transcript == replace(
            session.transcribe(str(media.audio), max_tokens=TOKENS),
            timings=transcript.timings,
            usage=transcript.usage,
        )

    asyncio.run(main())


def test_threads_share_a_session(session, media):
    expected = [session.chat(q, max_tokens=TOKENS).token_ids for q in questions(media)]
    got = [None] * len(expected)

    def ask(i: int) -> None:
        got[i] = session.chat(questions(media)[i], max_tokens=TOKENS).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_several_sessions_live_side_by_side(checkpoint, session):
    with load(checkpoint("flash")) as other:
        one, two = (s.chat(user("Hi"), stream=True, max_tokens=TOKENS) for s in (session, other))
        assert one.result().text != two.result().text
    assert session.chat(user("Hi"), max_tokens=1)
    with pytest.raises(EngineClosedError):
        other.chat(user("Hi"))
    other.close()


def test_closing_ends_running_requests(checkpoint, monkeypatch):
    session = load(checkpoint("v1.5"))
    thinker = session._engine._worker.model.thinker
    forward = thinker.forward

    def slow(*arguments):
        time.sleep(0.01)  # on a busy machine the answer could otherwise be over before the close
        return forward(*arguments)

    monkeypatch.setattr(thinker, "forward", slow)
    stream = session.chat(user("Hi"), stream=True, max_tokens=2000)
    next(stream)
    session.close()
    with pytest.raises(EngineClosedError):
        stream.result()


class Asked(Exception):
    """Carries what a transcription asked the model."""


@pytest.fixture
def asked(monkeypatch):
    """Calls ``transcribe``; returns its prompt text, its options, and the transcript of a made-up answer."""

    def transcribe(session, answer: str = "", **arguments):
        seen = []

        def chat(messages, **options):
            seen.extend((messages, options))
            timings = Timings(None, 0.0, None, 0.0, None)
            return Done("stop", answer, Usage(1, 1), timings)

        monkeypatch.setattr(session, "chat", chat)
        result = session.transcribe("a.wav", **arguments)
        (message,), options = seen
        text, audio = message["content"]
        assert audio == {"type": "audio", "audio": "a.wav"}
        return text["text"], options, result

    return transcribe


def test_transcription_asks_the_documented_question(checkpoint, asked):
    about = "This is an audio about tea."
    words = "This audio may contains the following words or phrases:oolong,kettle."
    with load(checkpoint("v1.5")) as session:
        for context, expected in (
            (None, ""),
            ("tea", about),
            (["oolong", "kettle"], words),
            ({"topic": "tea", "phrases": ("oolong", "kettle")}, about + words),
        ):
            text, options, _ = asked(session, context=context)
            assert text == ASR_PROMPT + expected
            assert options == {}
        assert asked(session, "a\tb")[2].text == "a\tb"
        assert asked(session, max_tokens=5)[1] == {"max_tokens": 5}
    with load(checkpoint("v1")) as session:
        assert asked(session)[1] == {"use_whisper_encoder": True}


def test_flash_names_or_is_told_the_language(checkpoint, asked):
    with load(checkpoint("flash")) as session:
        _, options, result = asked(session, "English\tone\ttwo")
        assert options == {}
        assert (result.language, result.text) == ("English", "one\ttwo")
        _, options, result = asked(session, "one\ttwo", language="上海")
        assert options == {"answer_prefix": "上海\t"}
        assert (result.language, result.text) == ("上海", "one\ttwo")
        assert asked(session, "no tab")[2].language is None


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_transcribes(checkpoint, media, generation):
    with load(checkpoint(generation)) as session:
        result = session.transcribe(str(media.audio), max_tokens=6)
        assert result.usage.prompt_tokens > 20
        wave = np.sin(np.arange(8000) / 20).astype(np.float32)
        assert session.transcribe((wave, 8000), max_tokens=2).usage.completion_tokens >= 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"language": "Chinese"}, UnsupportedError, "cannot be told the language"),
        ({"language": "a\tb"}, InvalidRequestError, "^language: found"),
        ({"language": 5}, InvalidRequestError, "^language: found"),
        ({"context": 5}, InvalidRequestError, "^context: found 5"),
        ({"context": [1]}, InvalidRequestError, "^context: found"),
        ({"context": {"about": "x"}}, InvalidRequestError, "^context: found keys"),
        ({"thinking": True}, InvalidRequestError, "'thinking': no such option"),
    ],
)
def test_wrong_transcription_arguments(session, arguments, error, match):
    with pytest.raises(error, match=match):
        session.transcribe("a.wav", **arguments)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device": "gpu"}, InvalidRequestError, "^device: found 'gpu', expected 'auto', 'cpu', 'cuda'"),
        ({"device": "cuda:999"}, UnsupportedError, "^device: found 'cuda:999', "),
        ({"tp": 2}, UnsupportedError, "^tp: found 2, expected 1"),
        ({"quant": "int8", "device": "cpu"}, UnsupportedError, "^quant: found 'int8', which needs a GPU"),
        ({"quant": "fp4"}, InvalidRequestError, "^quant: found 'fp4', expected None, int8 or int4"),
        ({"gpu_memory_utilization": 0}, InvalidRequestError, "^gpu_memory_utilization: expected a number"),
        ({"dtype": "float16"}, InvalidRequestError, "^dtype: found 'float16', expected auto"),
        ({"threads": 0}, InvalidRequestError, "^threads: expected a positive integer"),
        ({"kv_bytes": 1.5}, InvalidRequestError, "^kv_bytes: expected"),
        ({"max_num_seqs": 0}, InvalidRequestError, "^max_num_seqs: expected"),
        ({"max_model_len": 4096, "kv_bytes": 1000}, CapacityError, "^max_model_len: 4096 tokens need"),
    ],
)
def test_wrong_load_options(checkpoint, options, error, match):
    with pytest.raises(error, match=match):
        ming_rt.load(checkpoint("v1.5"), **options)


@pytest.mark.parametrize("path", ["/no/such/model", "demo:v7", ""])
def test_wrong_paths(path):
    with pytest.raises(ConfigError):
        ming_rt.load(path)


def test_an_unknown_load_option_is_refused(checkpoint):
    with pytest.raises(TypeError, match="max_seqs"):
        ming_rt.load(checkpoint("v1.5"), max_seqs=3)


def test_demo_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ming_rt.load("demo:v1.5") as session:
        assert session.info.dtype == "bfloat16"
        assert session.info.parts == ("thinker", "vision", "whisper")
        assert session.info.max_model_len <= session.info.kv_tokens
        assert str(session.info.path).startswith(str(tmp_path))
