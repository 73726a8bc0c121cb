"""The thinker's promises to the engine: however work is cut, packed or split, an answer does not change."""

from __future__ import annotations

import math

import pytest
import torch
from thinker_harness import Runner
from tiny import FAMILIES, random_prompt, run_ranks, tiny_config
from tolerances import assert_close

from ming_rt import ops
from ming_rt.config import ThinkerConfig
from ming_rt.errors import UnsupportedError
from ming_rt.models.thinker import Thinker
from ming_rt.runtime.weights import PlanSource, RandomSource

LENGTHS = (5, 23, 12)

families = pytest.mark.parametrize("family", FAMILIES)


def make_runner(family: str, dtype: torch.dtype = torch.float32, lengths=LENGTHS, **changes) -> Runner:
    config = tiny_config(family)
    thinker = Thinker(config, RandomSource(3, dtype))
    prompts = [random_prompt(length, config.hidden_size, length) for length in lengths]
    return Runner(thinker, prompts, dtype=dtype, **{"page_size": 4, "capacity": 40, **changes})


def answer(runner: Runner, steps: int = 3) -> torch.Tensor:
    """Logits ``[1 + steps, B, V]`` of the last prompt tokens and of greedy decoding."""
    logits = [runner.prefill().logits]
    for _ in range(steps):
        tokens = logits[-1].argmax(-1).tolist()
        logits.append(runner.step([runner.token(i, token) for i, token in enumerate(tokens)]).logits)
    return torch.stack(logits)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_alone_equals_batch(family, dtype):
    """Bit for bit, prompts of different lengths with media, prefill and decode."""
    together = answer(make_runner(family, dtype))
    for index, length in enumerate(LENGTHS):
        alone = answer(make_runner(family, dtype, lengths=(length,)))
        assert torch.equal(alone[:, 0], together[:, index])


@families
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_chunked_equals_whole(family, cut):
    """A prompt prefilled in chunks, packed with a decode step of another request, gives the same bits."""
    whole = make_runner(family)
    expected = whole.prefill(all_logits=True)
    runner = make_runner(family)
    neighbour = runner.step([runner.chunk(0, 0, LENGTHS[0])]).logits.argmax(-1).item()
    logits, hidden = [], []
    for begin in range(0, LENGTHS[1], cut):
        end = min(begin + cut, LENGTHS[1])
        chunks = [runner.chunk(1, begin, end)]
        if begin == cut:
            chunks.append(runner.token(0, neighbour))
        out = runner.step(chunks, all_logits=True)
        logits.append(out.logits[: end - begin])
        hidden.append(out.hidden_last[: end - begin])
    mine = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    assert torch.equal(torch.cat(logits), expected.logits[mine])
    assert torch.equal(torch.cat(hidden), expected.hidden_last[mine])
    for layer in range(len(whole.thinker.layers)):
        for actual, wanted in zip(runner.cached(layer, 1), whole.cached(layer, 1), strict=True):
            assert torch.equal(actual, wanted)


@families
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_paged_equals_contiguous(family, page_size):
    """Pages of any size, scattered over the pool, against one page per sequence."""
    contiguous = answer(make_runner(family, page_size=40))
    assert torch.equal(answer(make_runner(family, page_size=page_size)), contiguous)


@families
def test_two_ranks_equal_one(family):
    """Two ranks with half of the heads and of every expert's width give the same logits, alike on both."""
    config = tiny_config(family)
    expected = answer(make_runner(family))

    def rank_answer(comm):
        thinker = Thinker(config, RandomSource(3, torch.float32, rank=comm.rank, world=comm.world), comm)
        assert thinker.layers[0].attention.qkv.heads == config.num_attention_heads // comm.world
        prompts = [random_prompt(length, config.hidden_size, length) for length in LENGTHS]
        return answer(Runner(thinker, prompts, page_size=4, capacity=40))

    first, second = run_ranks(2, rank_answer)
    assert torch.equal(first, second)
    assert_close(first, expected, "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "query heads: 3"),
        ({"num_key_value_heads": 1}, "key/value heads: 1"),
        ({"moe_intermediate_size": 33}, "width: 33"),
        ({"vocab_size": 113}, "lm_head rows: 113"),
    ],
)
def test_ranks_that_do_not_divide(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        Thinker(tiny_config("v1", **changes), RandomSource(0, torch.float32, rank=0, world=2))


def test_dynamic_rope_is_refused():
    config = tiny_config("v1", rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedError, match="dynamic"):
        Thinker(config, RandomSource(0, torch.float32))


@families
def test_planned_tensors(family):
    """Names and shapes follow from the config alone, and each is asked for once."""
    config = tiny_config(family)
    plan = PlanSource()
    Thinker(config, plan)
    assert plan.shapes == expected_shapes(config)
    assert plan.parameters == sum(math.prod(shape) for shape in plan.shapes.values())


def expected_shapes(config: ThinkerConfig) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors, written out a second time."""
    hidden, dim, width = config.hidden_size, config.head_dim, config.moe_intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = {
        "model.model.word_embeddings.weight": (config.vocab_size, hidden),
        "model.model.norm.weight": (hidden,),
        "model.lm_head.weight": (config.vocab_size, hidden),
    }

    def gated(name: str, inner: int) -> None:
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (inner, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, inner)

    for index in range(config.num_hidden_layers):
        layer = f"model.model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.attention.query_key_value.weight"] = ((heads + 2 * kv_heads) * dim, hidden)
        shapes[f"{layer}.attention.dense.weight"] = (hidden, heads * dim)
        if config.use_qkv_bias:
            shapes[f"{layer}.attention.query_key_value.bias"] = ((heads + 2 * kv_heads) * dim,)
        if config.use_bias:
            shapes[f"{layer}.attention.dense.bias"] = (hidden,)
        if config.arch == "moe_v2":
            shapes[f"{layer}.attention.q_norm.weight"] = shapes[f"{layer}.attention.k_norm.weight"] = (dim,)
        if index < config.first_k_dense_replace:
            gated(f"{layer}.mlp", config.intermediate_size)
            continue
        for gate in ("gate", "image_gate", "audio_gate") if config.multi_gate else ("gate",):
            shapes[f"{layer}.mlp.{gate}.weight"] = (config.num_experts, hidden)
            if config.arch == "moe_v2":
                shapes[f"{layer}.mlp.{gate}.expert_bias"] = (config.num_experts,)
        for expert in range(config.num_experts):
            gated(f"{layer}.mlp.experts.{expert}", width)
        if config.num_shared_experts:
            gated(f"{layer}.mlp.shared_experts", width * config.num_shared_experts)
    return shapes


def test_hidden_states_on_request():
    runner = make_runner("v1.5")
    out = runner.prefill()
    assert torch.equal(out.hidden0, runner.taps["hidden.0"])
    assert torch.equal(out.hidden_last, runner.taps["hidden.3"])
    assert out.logits.shape == (len(LENGTHS), 112)
    assert out.logits.dtype == torch.float32


def test_ids_outside_the_vocabulary_are_clipped():
    runner = make_runner("v1", lengths=(3,))
    runner.prompts[0].ids[:] = [-5, 3, 10**6]
    runner.prompts[0].media = None
    out = runner.prefill()
    assert torch.equal(out.hidden0, runner.thinker.embed[[0, 3, 111]])


@families
def test_kernels_agree_with_compositions(family, monkeypatch):
    """Awkward sizes: the model on kernels against the same model on the plain torch compositions."""
    sizes = {"hidden_size": 44, "moe_intermediate_size": 20, "intermediate_size": 36, "vocab_size": 131}
    config = tiny_config(family, **sizes)

    def logits():
        thinker = Thinker(config, RandomSource(5, torch.float32))
        prompts = [random_prompt(length, config.hidden_size, length) for length in (1, 19)]
        return answer(Runner(thinker, prompts, page_size=5, capacity=40))

    kernels = logits()
    faces = [name for name in dir(ops) if hasattr(ops, f"{name}_torch") and not name.startswith("pack")]
    assert {"linear", "rms_norm", "attention_paged", "moe_route", "rope_append"} <= set(faces)
    for name in faces:
        monkeypatch.setattr(ops, name, getattr(ops, f"{name}_torch"))
    assert_close(kernels, logits(), "model")
