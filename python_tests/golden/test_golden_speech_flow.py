"""Recorded flow models of v1 and v1.5: encoder, estimator, solver, and the mels of whole speeches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import BACKENDS
from golden_cases import GoldenCase, golden_cases
from thinker_harness import load_case
from tolerances import assert_close

from ming_rt.config.speech import read_detokenizer
from ming_rt.models.flow import Flow


def has_flow(case: GoldenCase) -> bool:
    return "estimator.x" in case.inputs and case.has("weights.safetensors")


def has_speech(case: GoldenCase) -> bool:
    weights = case.config.get("weights") if isinstance(case.config, dict) else None
    return isinstance(weights, dict) and "flow" in weights and case.has(weights["flow"])


# Ten steps take the emulation minutes, and are made of calls that the other tests look at.
not_emulated = pytest.mark.parametrize("device", [b for b in BACKENDS if b != "emu"], indirect=True)


class Taps(dict):
    """Collects intermediates by name."""

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        self[name] = tensor.clone()


def load_flow(case: GoldenCase, directory, device=None) -> Flow:
    config, _ = read_detokenizer(case.path / case.config["config_file"])
    weights = GoldenCase((case.path / case.config.get("weights", {}).get("flow", "here")).parent)
    return load_case(weights, directory, lambda src: Flow(config, src), device=device)


def compare(
    case: GoldenCase, prefix: str, taps: dict[str, torch.Tensor], row: str = "golden_flow"
) -> set[str]:
    """Checks the taps that were recorded under ``prefix``, frames or channels first; returns their names."""
    found = {f"{prefix}{name}": tensor for name, tensor in taps.items() if f"{prefix}{name}" in case.outputs}
    assert found, prefix
    for name, actual in found.items():
        expected = case.outputs[name]
        if actual.dim() > 1 and actual.shape[-2:] == expected.shape[-2:][::-1]:
            actual = actual.mT
        assert_close(actual.reshape(expected.shape).cpu(), expected, row)
    return found.keys()


def recorded(case: GoldenCase, *prefixes: str) -> set[str]:
    return {name for name in case.outputs if name.startswith(prefixes)}


@golden_cases(has_flow)
def test_estimator(case: GoldenCase, tmp_path, device):
    """One call, of v1.5 in both attention modes, with and without condition as a batch."""
    flow, inputs = load_flow(case, tmp_path, device), case.inputs_on(device.torch)
    estimator, x = flow.estimator, inputs["estimator.x"]
    speaker = inputs["estimator.spks"][:, :, None].expand(-1, -1, x.shape[2])
    x = torch.cat([x, inputs["estimator.mu"], speaker, inputs["estimator.cond"]], dim=1).mT.contiguous()
    seen = set()
    for mode in ("full.", "stream.") if flow.config.causal else ("",):
        taps = Taps()
        (shifts,) = estimator.times(inputs["estimator.t"][:1], taps)
        levels = estimator.layout(*x.shape[:2], mode == "stream.")
        taps["output"] = estimator(x, shifts, levels, taps)
        first = estimator.down[0]
        taps["down_0_block_0_attention"] = first.blocks[0].out(taps["down_0_block_0_attention_values"])
        taps["down_0_block1"] = first.resnet.block1(x)
        for name in ("time_sinusoid", "time_mlp"):
            taps[name] = taps[name].expand(len(x), -1)
        seen |= compare(case, f"estimator.{mode}", taps)
    assert seen == recorded(case, "estimator.")


def encoder_calls(case: GoldenCase, causal: bool):
    """Name, tokens, context and mode of the recorded encoder calls."""
    tokens = torch.cat([case.inputs["flow.prompt_token"][0], case.inputs["flow.token"][0]]).long()
    if not causal:
        return [("", tokens, 0, False)]
    prefix = case.config["encoder_stream_prefix_len"] + 3
    return [
        ("full.", tokens, 0, False),
        ("stream_ctx.", tokens, 3, True),
        ("stream_final.", tokens, 0, True),
        ("stream_prefix.", tokens[:prefix], 3, True),
    ]


@golden_cases(has_flow)
def test_encoder(case: GoldenCase, tmp_path, device):
    """Every stage; of v1.5 with and without look-ahead and chunks."""
    flow, seen = load_flow(case, tmp_path, device), set()
    for name, tokens, context, chunked in encoder_calls(case, flow.config.causal):
        taps = Taps()
        taps["mu"] = flow.condition(tokens.to(device.torch), context, chunked=chunked, tap=taps)
        first = (flow.encoder.before if flow.config.causal else flow.encoder.blocks).blocks[0]
        taps["encoder_layer_0_attention"] = first.attn.out(taps["encoder_layer_0_attention_values"])
        taps["spk"] = flow.speaker(case.inputs["flow.embedding"][0].to(device.torch))
        taps["feat_len"] = torch.tensor([len(taps["mu"])])
        seen |= compare(case, f"encoder.{name}", taps)
        if name == "full.":
            del taps["mu"]
            seen |= compare(case, "encoder.", taps)
    assert seen == recorded(case, "encoder.")


@golden_cases(has_flow)
@not_emulated
def test_solve(case: GoldenCase, tmp_path, device):
    """All steps from noise to mel, of v1.5 streamed and whole, with and without prompt."""
    flow, inputs = load_flow(case, tmp_path, device), {name: x[0] for name, x in case.inputs.items()}
    prompt = {
        "prompt_tokens": inputs["flow.prompt_token"].long(),
        "prompt_mel": inputs.get("flow.prompt_feat"),
    }
    if not flow.config.causal:
        prompt["prompt_mel"] = torch.zeros(int(inputs["flow.prompt_feat_len"]), flow.config.output_size)
    tokens, seen = inputs["flow.token"].long(), set()
    streamed = {"final": False, "chunked": True}
    calls = {
        "full.": (len(tokens), prompt),
        "stream.": (len(tokens), prompt | streamed),
        "stream_prefix.": (18, prompt | streamed),
        "noprompt.": (len(tokens), {}),
    }
    for name, (count, options) in calls.items() if flow.config.causal else [("", (len(tokens), prompt))]:
        before = len(options.get("prompt_tokens", ()))
        frames = flow.frames(count + before - (0 if options.get("final", True) else 3))
        noise, taps = inputs["flow.noise"].mT[:frames], Taps()
        taps["feat"] = flow(tokens[:count], inputs["flow.embedding"], noise, tap=taps, **options)
        taps["spks"] = taps["spk"]
        for step in range(flow.config.steps):
            taps[f"v_cond_step_{step}"], taps[f"v_uncond_step_{step}"] = taps[f"v_step_{step}"]
        seen |= compare(case, f"cfm.{name}", taps, "golden_flow_solved")
        seen |= compare(case, "cfm.", {"t_steps": taps["t_steps"]})
    assert seen == recorded(case, "cfm.")


def speeches(case: GoldenCase, flow: Flow):
    """Arguments of the flow and recorded mel of every call that made a part of a speech."""
    inputs = {name: tensor[0] for name, tensor in case.inputs.items()}
    voice = {"prompt_mel": inputs["spk.prompt_speech_feat"]}
    if not flow.config.causal:
        voice["prompt_tokens"] = inputs["spk.prompt_speech_token"].long()
        for piece in range(sum(name.startswith("mel_") for name in case.outputs)):
            arguments = {"noise": inputs[f"cfm_noise_{piece}"].mT, "embedding": inputs["spk.vp_emb"]}
            tokens = inputs[f"audio_tokens_{piece}"].long()
            yield {"tokens": tokens, **arguments, **voice}, case.outputs[f"mel_{piece}"]
        return
    voice |= {"prompt_tokens": inputs["spk.flow_prompt_speech_token"].long()}
    voice |= {"embedding": inputs["spk.flow_embedding"]}
    tokens, before = inputs["tokens"].long(), len(voice["prompt_tokens"])
    noise = flow.noise(before + len(tokens))
    yield {"tokens": tokens, "noise": noise, **voice}, case.outputs["nonstream.mel"]
    cloned = {"tokens": inputs["tokens_zeroshot"].long(), "embedding": inputs["spk.vp_emb"]}
    yield {**cloned, "noise": noise[: len(cloned["tokens"])]}, case.outputs["zeroshot.mel"]
    for index, call in enumerate(case.config["stream_calls"]):
        mel = case.outputs[f"stream.vocoder_mel_{index}"]
        if index:  # the frames before it once more
            mel = mel[:, :, case.config["mel_cache_len"] :]
        count, final = call["n_tokens"], call["finalize"]
        part = {"tokens": tokens[:count], "final": final, "chunked": call["stream"], **voice}
        part["noise"] = noise[: before + count - (0 if final else flow.config.pre_lookahead_len)]
        yield part, mel


@golden_cases(has_speech)
@not_emulated
def test_mels_of_speeches(case: GoldenCase, tmp_path, device):
    """Pieces, a preset and a cloned voice, and the chunks of a streamed sentence."""
    flow = load_flow(case, tmp_path, device)
    for arguments, expected in speeches(case, flow):
        mel = flow(**arguments)[-expected.shape[2] :].cpu()
        assert_close(mel.mT[None], expected, "golden_flow_solved")


@golden_cases(lambda case: has_speech(case) and "stream_calls" in case.config)
def test_streamed_chunks_stay(case: GoldenCase, tmp_path):
    """What a chunk gave, the next call, which knows more tokens, gives again."""
    flow = load_flow(case, tmp_path)
    streamed = [arguments for arguments, _ in speeches(case, flow) if arguments.get("chunked")]
    for earlier, later in pairwise(streamed):
        first = flow(**earlier)
        assert_close(flow(**later)[: len(first)], first, "golden_flow_solved")
