"""Whole sessions on the emulated CUDA kernels answer as on the CPU. Short, for the emulation is slow."""

from __future__ import annotations

import pytest
from conftest import using

import ming_rt
from ming_rt import ops

TOKENS = 3


def answers(model, **options) -> list[tuple[int, ...]]:
    """Two questions one after the other, then at once with the prompts cut into chunks: the same answers."""
    questions = [[{"role": "user", "content": text}] for text in ("Hello", "Why?")]
    options = {"dtype": "float32", "kv_bytes": 8 << 20, "max_num_batched_tokens": 24, **options}
    with ming_rt.load(model, **options) as session:
        alone = [session.chat(q, max_tokens=TOKENS).token_ids for q in questions]
        streams = [session.chat(q, stream=True, max_tokens=TOKENS) for q in questions]
        assert [s.result().token_ids for s in streams] == alone
        assert session.info.device == options["device"]
    return alone


def test_answers_are_those_of_the_cpu(demo_model):
    expected = answers(demo_model("v1.5"), device="cpu")
    with using("emu"):
        assert answers(demo_model("v1.5"), device="emu") == expected
        assert ops.is_emulating(), "as the session found it"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_weights_answer(demo_model, quant):
    with using("emu"), ming_rt.load(demo_model("preview"), device="emu", quant=quant) as session:
        done = session.chat([{"role": "user", "content": "Hello"}], max_tokens=2)
        assert done.usage.completion_tokens == 2
