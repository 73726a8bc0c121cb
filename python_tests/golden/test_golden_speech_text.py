"""Recorded text handling, talker prompts, chunk schedules and noise of the speech output of v1 and v1.5."""

from __future__ import annotations

import torch
from golden_cases import golden_cases
from tolerances import assert_close

from ming_rt import ops
from ming_rt.inputs.sentences import cut, pieces, split_sentences
from ming_rt.inputs.speech_text import han_count, normalise
from ming_rt.models.flow_noise import FRAMES, fixed_noise
from ming_rt.models.talker_prompt import TalkerIds, talker_prompt
from ming_rt.models.talker_sampling import TOP_K, ban_end
from ming_rt.pipelines.speech_stream import HOP, LOOKAHEAD, OVERLAP, ChunkSchedule, SpeechJoiner, crossfade

# The special tokens of the released talkers.
RELEASED = TalkerIds(
    prompt_start=151671,
    prompt_end=151672,
    thinker_start=151673,
    thinker_end=151674,
    speaker_start=151675,
    speaker_end=151676,
    audio_bos=151665,
    audio_eos=151666,
    audio_pad=151667,
    text_eos=151669,
    text_pad=151670,
    first_audio=151677,
)


def records(case):
    """What a case's cases.json holds, if anything."""
    return case.json("cases.json") if case.has("cases.json") else None


def has_records(*keys):
    """Whether the records, or the first of a list of them, have these keys."""

    def wanted(case):
        data = records(case)
        first = data[0] if isinstance(data, list) and data else data
        return isinstance(first, dict) and first.keys() >= set(keys)

    return wanted


def has_tensors(config, *names):
    def wanted(case):
        return config in case.config and {**case.inputs, **case.outputs}.keys() >= set(names)

    return wanted


def generation_of(name):
    return {"v15": "v1.5"}.get(name, name)


@golden_cases(has_records("normalize", "cut_text"))
def test_normalised_text(case):
    data = records(case)
    assert [normalise(r["input"]) for r in data["normalize"]] == [r["output"] for r in data["normalize"]]
    assert [han_count(r["input"]) for r in data["text_length"]] == [r["length"] for r in data["text_length"]]
    for record in data["cut_text"]:
        assert cut(record["input"], record["max_length"]) == record["output"]


@golden_cases(has_records("prepared", "jobs"))
def test_sentences(case):
    for record in records(case):
        jobs = [
            [piece.text, record["stream"] and piece.group == 0]
            for piece in split_sentences(record["text"], record["max_length"])
        ]
        assert jobs == record["jobs"]


def unspoken(ids, stream):
    """A recorded stream of ids without its head."""
    return stream[stream.index(ids.speaker_end) + 1 :]


def spread(positions, prompt):
    """One recorded position stands for all of them."""
    return positions * len(prompt.positions) if len(positions) == 1 else positions


@golden_cases(has_records("generation", "generate_calls"))
def test_prompt_layout(case):
    data = records(case)
    spoken = {
        r["tts_text"]: unspoken(RELEASED, call["talker_text_prefix"]) + call["talker_text_input_part"][:-2]
        for r in data
        if r["generation"] == "preview"
        for call in r["generate_calls"]
    }
    for record in data:
        generation = generation_of(record["generation"])
        text = spoken[record["tts_text"]]
        for call in record["generate_calls"]:
            words = unspoken(RELEASED, call["talker_text_prefix"]) + call["talker_text_input_part"]
            words = words[: words.index(RELEASED.text_eos)]
            assert words[len(words) - len(text) :] == text
            audio = call.get("prompt_wav_token") or unspoken(RELEASED, call["talker_audio_prefix"])[1:]
            prompt = talker_prompt(
                generation,
                RELEASED,
                text,
                thinker_length=record["thinker_length"],
                prompt_text=words[: len(words) - len(text)],
                prompt_audio=[token - RELEASED.first_audio for token in audio],
            )
            assert prompt.audio_ids.tolist() == call["talker_audio_prefix"]
            assert prompt.text_ids.tolist() == call["talker_text_prefix"]
            assert list(prompt.later_text) == call["talker_text_input_part"]
            assert prompt.positions.tolist() == spread(call["position_ids"], prompt)
            assert [prompt.speaker_row] == call["vp_insert_loc"]
            rows = prompt.thinker_rows
            assert [rows.stop - rows.start] == call["thinker_reply_length"]
            assert call["thinker_prefix_insert_loc"] in (None, [rows.start])
            assert list(prompt.forced) == call.get("prompt_wav_token", [])


def has_runs(case):
    folder = case.path / case.config.get("talker_dir", "")
    return "runs" in case.config and (folder / "added_tokens.json").is_file()


@golden_cases(has_runs)
def test_script_of_steps(case):
    config, outputs = case.config, case.outputs
    tokens = case.json(f"{config['talker_dir']}/added_tokens.json")
    ids = TalkerIds.find(tokens.__getitem__, config["talker_config"]["text_vocab_size"])
    assert ids.audio_eos == config["audio_eos_id"]
    singles = {name: run for name, run in config["runs"].items() if "thinker" in run}
    for name, run in singles.items():
        generation = "v1" if "pieces" in run else "v1.5" if "piece" in run else "preview"
        if generation != "preview":
            assert pieces(run["tts_text"]) == run.get("pieces", [run.get("piece")])
        prompt = talker_prompt(
            generation,
            ids,
            run["text_ids"],
            thinker_length=case.inputs["thinker_reply_part"].shape[1] if run["thinker"] else 0,
            prompt_text=run.get("prompt_text_ids", ()),
            prompt_audio=run.get("prompt_bpe_ids", ()),
        )
        recorded = {
            key.removeprefix(f"{name}."): tensor.tolist()
            for key, tensor in outputs.items()
            if key.startswith(f"{name}.") and tensor.dim() == 1
        }
        assert prompt.audio_ids.tolist() == recorded["prefill_audio_ids"]
        assert prompt.text_ids.tolist() == recorded["prefill_text_ids"]
        assert prompt.positions.tolist() == spread(recorded["prefill_position_ids"], prompt)
        chosen = recorded["step_chosen_ids"]
        fed = list(prompt.forced) + chosen[len(prompt.forced) :]
        steps = range(len(recorded["decode_audio_ids"]))
        assert fed[: len(steps)] == recorded["decode_audio_ids"]
        assert [prompt.text_id(step) for step in steps] == recorded["decode_text_ids"]
        assert [prompt.position(step) for step in steps] == recorded["decode_position_ids"]
        banned = recorded["step_eos_banned"]
        assert [int(step < prompt.ban_steps) for step in range(len(banned))] == banned
    for name in config["runs"].keys() - singles.keys():  # v1, several pieces
        run, position = config["runs"][name], None
        voice = singles["textonly"]["prompt_text_ids"], singles["textonly"]["prompt_bpe_ids"]
        assert pieces(run["tts_text"], run["max_length"]) == run["pieces"]
        for index, text in enumerate(run["text_ids"]):
            prompt = talker_prompt(
                "v1", ids, text, prompt_text=voice[0], prompt_audio=voice[1], position=position
            )
            first, last = outputs[f"{name}.{index}.first_last_position"].tolist()
            assert prompt.positions.tolist() == spread([first], prompt)
            chosen, banned = (
                outputs[f"{name}.{index}.{key}"].tolist() for key in ("step_chosen_ids", "step_eos_banned")
            )
            assert [int(step < prompt.ban_steps) for step in range(len(banned))] == banned
            position = prompt.position(len(chosen) - (chosen[-1] == ids.audio_eos) - 1)
            assert position == last


def schedule(prompt_tokens, tokens, *, done_late, hurried):
    """[tokens, offset, last] of each chunk; the end is known from the start, or after all other chunks."""
    chunks, plan = [], ChunkSchedule(prompt_tokens, hurried=hurried)
    done = not done_late
    while not plan.finished:
        chunk = plan.next(tokens, done)
        if chunk is None:
            done = True
        else:
            chunks.append([chunk.tokens, chunk.offset, int(chunk.is_last)])
    return chunks


@golden_cases(has_records("token_hop_len", "pre_lookahead_len"))
def test_chunk_schedule(case):
    data = records(case)
    assert [data["token_hop_len"], data["pre_lookahead_len"]] == [HOP, LOOKAHEAD]
    for row in data["rows"]:
        sizes = row["prompt_tokens"], row["n_tokens"]
        late, early = row["end_flag_after_all_chunks"], row["all_tokens_before_first_poll"]
        assert schedule(*sizes, done_late=True, hurried=True) == late
        assert schedule(*sizes, done_late=False, hurried=True) == early
        assert schedule(*sizes, done_late=True, hurried=False) == late
        assert schedule(*sizes, done_late=False, hurried=False) == late


@golden_cases(has_tensors("stream_calls", "tokens", "stream.chunk_0", "spk.flow_prompt_speech_token"))
def test_chunks_of_a_whole_run(case):
    sizes = case.inputs["spk.flow_prompt_speech_token"].shape[1], case.inputs["tokens"].shape[1]
    calls = [[c["n_tokens"], c["token_offset"], int(c["finalize"])] for c in case.config["stream_calls"]]
    assert schedule(*sizes, done_late=False, hurried=False) == calls
    joiner = SpeechJoiner()
    for call in case.config["stream_calls"]:
        made = call["n_samples"] + OVERLAP * (not call["finalize"])
        assert joiner.push(torch.zeros(1, made), call["finalize"]).shape[-1] == call["n_samples"]


@golden_cases(has_tensors("source_cache_len", "cached_speech", "new_speech", "faded"))
def test_crossfade(case):
    assert case.config["source_cache_len"] == OVERLAP
    inputs, outputs = case.inputs, case.outputs
    faded = crossfade(inputs["new_speech"], inputs["cached_speech"])
    assert_close(faded, outputs["faded"], "golden_crossfade")
    one = torch.ones(1, OVERLAP, dtype=torch.float64)
    rising = crossfade(one, 0 * one)[0, : len(outputs["window_first_16"])]
    assert_close(rising, outputs["window_first_16"], "golden_crossfade")
    step = OVERLAP // len(outputs["window_sum_64"])
    assert_close(crossfade(one, one)[0, ::step], outputs["window_sum_64"], "golden_crossfade")


@golden_cases(has_tensors("sum_sq", "flat_index", "flat_value", "first_columns"))
def test_fixed_noise(case):
    outputs = case.outputs
    noise = torch.tensor(fixed_noise())[None]
    assert list(noise.shape) == case.config["shape"]
    assert noise.shape[2] == FRAMES
    first = outputs["first_columns"]
    assert_close(noise[:, :, : first.shape[2]], first, "golden_noise")
    assert_close(noise.flatten()[outputs["flat_index"]], outputs["flat_value"], "golden_noise")
    sums = torch.stack([noise.double().sum(), noise.double().square().sum()]) / noise.numel()
    recorded = torch.tensor([case.config["sum"], case.config["sum_sq"]], dtype=torch.float64) / noise.numel()
    assert_close(sums, recorded, "golden_noise")


@golden_cases(has_tensors("eos_id", "logits", "eos_banned", "n_kept", "probs"))
def test_choice_of_the_next_audio_token(case, device):
    assert case.config["top_k"] == TOP_K
    inputs, probs = case.inputs_on(device.torch), case.outputs["probs"]
    logits = inputs["logits"].clone()
    top_k = ban_end(logits, inputs["eos_banned"].bool(), case.config["eos_id"])
    for row, expected in enumerate(probs):
        kept = expected.nonzero()[:, 0]
        assert len(kept) == case.outputs["n_kept"][row]
        # The middle of each kept token's share leads to that token.
        uniforms = (expected.cumsum(0) - expected / 2)[kept].to(device.torch)
        rows = len(kept)
        chosen = ops.sample(
            logits[row].expand(rows, -1).contiguous(),
            temperature=torch.ones(rows, device=device.torch),
            top_k=top_k[row].expand(rows).contiguous(),
            top_p=torch.ones(rows, device=device.torch),
            repetition_penalty=torch.ones(rows, device=device.torch),
            no_repeat_ngram_size=torch.zeros(rows, dtype=torch.int32, device=device.torch),
            history=torch.zeros(0, dtype=torch.int64, device=device.torch),
            history_bounds=torch.zeros(rows, 2, dtype=torch.int64, device=device.torch),
            uniforms=uniforms,
        )[0]
        assert chosen.cpu().tolist() == kept.tolist()
        shares = logits[row].double().softmax(-1).cpu()[kept]
        assert_close((shares / shares.sum()).float(), expected[kept], "golden_shares")
