"""The thinker of every generation against recorded runs of the original implementation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from golden_cases import GoldenCase, golden_cases
from thinker_harness import Prompt, Runner, load_case
from tolerances import RELATIVE_BF16, SAME_EXPERTS_BF16, assert_close, row_errors

from ming_rt import ops
from ming_rt.config import RopeConfig, ThinkerConfig
from ming_rt.models.fusion import AUDIO, IMAGE, router_modality, scatter
from ming_rt.models.positions import position_ids
from ming_rt.models.thinker import Thinker


def is_model(case: GoldenCase) -> bool:
    return case.has("weights.safetensors") and any(key.endswith("prefill.logits") for key in case.outputs)


def has_unit(given: str, result: str):
    """Cases without weights, in which some sub-case has the input and the output of these names."""

    def accepts(case: GoldenCase) -> bool:
        units = [] if case.has("weights.safetensors") else sub_cases(case, given)
        return any(f"{prefix}{result}" in case.outputs for prefix in units)

    return accepts


def sub_cases(case: GoldenCase, suffix: str) -> list[str]:
    """Prefixes of the sub-cases that hold a tensor called ``suffix``."""
    return sorted(key[: -len(suffix)] for key in case.inputs if key.endswith(suffix))


class Recorded:
    """One recorded run of a whole-model case: its padded inputs and its outputs, by name without prefix."""

    def __init__(self, case: GoldenCase, prefix: str) -> None:
        self.inputs = {k[len(prefix) :]: v for k, v in case.inputs.items() if k.startswith(prefix)}
        self.outputs = {k[len(prefix) :]: v for k, v in case.outputs.items() if k.startswith(prefix)}
        self.config = ThinkerConfig.from_dict(case.config)
        self.ids = self.inputs["input_ids"].numpy()
        self.mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"])).numpy() != 0
        self.grids = {
            key: self.inputs[key].numpy()
            for key in ("image_grid_thw", "video_grid_thw")
            if key in self.inputs
        }

    def prompts(self) -> list[Prompt]:
        """The rows without their pads, with their media."""
        positions, delta = position_ids(self.config, self.ids, self.mask, **self.grids)
        prompts = []
        for row, valid in enumerate(self.mask):
            media, modality = place_media(self.config, self.inputs, row, self.ids[row])
            if media is not None:
                media = replace(media, rows=(np.cumsum(valid) - 1)[media.rows])
            moved = int(delta[row]) + np.count_nonzero(~valid)  # the cache holds no pads
            prompts.append(
                Prompt(self.ids[row, valid], positions[:, row, valid], moved, modality[valid], media)
            )
        return prompts

    def valid(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows ``[N, ...]`` of the valid tokens of ``[b, S, ...]``."""
        return tensor[torch.from_numpy(self.mask)]


def place_media(config: ThinkerConfig, inputs: dict[str, torch.Tensor], row: int, ids: np.ndarray):
    """Media and routers of one row of a recorded batch; visual features are in batch order."""

    def visual(patch: int, *names: str) -> torch.Tensor | None:
        for name in names:
            if name in inputs:
                before = int((inputs["input_ids"][:row] == patch).sum())
                return inputs[name][before : before + int((ids == patch).sum())]
        return None

    images = visual(config.image_patch_token, "image_embeds", "vision_embeds")
    videos = visual(config.video_patch_token, "video_embeds")
    audios, spans = [], None
    if "audio_embeds" in inputs:
        spans = inputs["audio_placeholder_loc_lens"][row].numpy()
        lengths = inputs["audio_embeds_lengths"][row].tolist()
        audios = list(inputs["audio_embeds"][row][: sum(lengths)].split(lengths))
    media = scatter(config, ids, images, videos, audios, spans)
    has_vision = images is not None or videos is not None
    return media, router_modality(config, ids, has_vision, spans)


@golden_cases(is_model)
def test_model(case: GoldenCase, tmp_path, device):
    """Prefill and greedy decode: every recorded intermediate, token and cache entry."""
    for prefix in sub_cases(case, "input_ids"):
        run = Recorded(case, prefix)
        thinker = load_case(case, tmp_path, partial(Thinker, run.config), device=device)
        if (head := run.outputs.get("lm_head_normalised")) is not None:
            assert_close(thinker.head.unpack(), head, "golden_weight")
        steps = len(run.outputs.get("decode.input_ids", ()))
        runner = Runner(thinker, run.prompts(), capacity=run.ids.shape[1] + steps)
        out = runner.prefill(all_logits=True)
        check_prefill(run, runner, out)
        last = np.cumsum(run.mask.sum(axis=1)) - 1
        tokens = out.logits[last].argmax(-1)
        for name in ("prefill.next_ids", "prefill.next_ids_at_last_valid"):
            if name in run.outputs and (run.mask[:, -1].all() or name.endswith("valid")):
                assert tokens.tolist() == run.outputs[name].tolist()
        for step in range(steps):
            assert tokens.tolist() == run.outputs["decode.input_ids"][step].tolist()
            chunks = [runner.token(i, int(token)) for i, token in enumerate(tokens)]
            check_decode_positions(run, step, chunks)
            out = runner.step(chunks)
            assert_close(out.logits, run.outputs["decode.logits"][step], "golden_logits")
            assert_close(out.hidden_last, run.outputs["decode.hidden_last"][step], "golden_logits")
            check_routing(
                runner.taps, {k: v[step] for k, v in run.outputs.items() if k.startswith("decode.")}
            )
            tokens = out.logits.argmax(-1)
            assert tokens.tolist() == run.outputs["decode.next_ids"][step].tolist()
        check_cache(run, runner, steps)


@golden_cases(is_model)
def test_model_bf16(case: GoldenCase, tmp_path):
    """In bf16 every token whose experts are the recorded ones has nearly the recorded logits."""
    for prefix in sub_cases(case, "input_ids"):
        run = Recorded(case, prefix)
        thinker = load_case(case, tmp_path, partial(Thinker, run.config), torch.bfloat16)
        runner = Runner(thinker, run.prompts(), capacity=run.ids.shape[1], dtype=torch.bfloat16)
        out = runner.prefill(all_logits=True)
        chosen = [name for name in run.outputs if name.startswith("prefill.") and name.endswith("topk_idx")]
        same = torch.stack(
            [
                (
                    runner.taps[name[len("prefill.") :]].sort(dim=-1).values == run.valid(run.outputs[name])
                ).all(-1)
                for name in chosen
            ]
        ).all(0)
        assert same.float().mean() >= SAME_EXPERTS_BF16
        errors = row_errors(out.logits, run.valid(run.outputs["prefill.logits"]))
        assert errors[same].max() <= RELATIVE_BF16["logits"]


def check_prefill(run: Recorded, runner: Runner, out) -> None:
    prefill = {k[len("prefill.") :]: v for k, v in run.outputs.items() if k.startswith("prefill.")}
    assert_close(out.logits, run.valid(prefill.pop("logits")), "golden_logits")
    assert_close(out.hidden0, run.valid(prefill["hidden.0"]), "golden_copy")
    assert_close(out.hidden_last, run.valid(prefill[f"hidden.{len(runner.thinker.layers)}"]), "golden_logits")
    check_routing(runner.taps, {f"prefill.{k}": run.valid(v) for k, v in prefill.items() if "topk" in k})
    compared = 0
    for name, expected in prefill.items():
        if name.endswith((".q_rope", ".k_rope")):  # [b, heads, S, D]
            layer = int(name.split(".")[0].removeprefix("layer"))
            keys = torch.cat([runner.cached(layer, i)[0] for i in range(len(run.mask))], dim=1)
            actual = runner.taps[name] if name.endswith("q_rope") else keys.transpose(0, 1)
            assert_close(actual, run.valid(expected.transpose(1, 2)), "golden_logits")
        elif name.startswith("hidden.") or name.endswith((".attn_out", ".mlp_out", ".out", ".router_logits")):
            assert_close(runner.taps[name], run.valid(expected), "golden_logits")
        else:
            continue
        compared += 1
    assert compared


def check_routing(taps: dict[str, torch.Tensor], recorded: dict[str, torch.Tensor]) -> None:
    """Chosen experts exactly, their weights within tolerance; the recording lists ids in ascending order."""
    for name, expected in recorded.items():
        if not name.endswith(".topk_idx"):
            continue
        layer = name.split(".")[1]
        ids, order = taps[f"{layer}.topk_idx"].long().sort(dim=-1)
        assert torch.equal(ids, expected), name
        weights = taps[f"{layer}.topk_weight"].gather(-1, order)
        assert_close(weights, recorded[name.replace("topk_idx", "topk_weight")], "golden_weight")


def check_decode_positions(run: Recorded, step: int, chunks) -> None:
    expected = run.outputs["decode.position_ids"][step]  # [b] or [3, b]
    actual = np.concatenate([chunk.positions for chunk in chunks], axis=1)
    assert (actual == np.broadcast_to(expected.numpy(), actual.shape)).all()


def check_cache(run: Recorded, runner: Runner, steps: int) -> None:
    """Keys (after rotation) and values of every valid token, prompt and generated."""
    valid = np.concatenate([run.mask, np.ones((len(run.mask), steps), bool)], axis=1)
    for name, expected in run.outputs.items():
        if name.startswith("cache.layer"):
            layer, which = name.removeprefix("cache.layer").split(".")
            for row, columns in enumerate(valid):
                actual = runner.cached(int(layer), row)["kv".index(which)]
                assert_close(actual, expected[row][:, torch.from_numpy(columns)], "golden_logits")


@golden_cases(is_model)
def test_prompt_layout(case: GoldenCase):
    """Positions with pads, deltas, placed embeddings and router masks."""
    for prefix in sub_cases(case, "input_ids"):
        run = Recorded(case, prefix)
        positions, delta = position_ids(run.config, run.ids, run.mask, **run.grids)
        if (expected := run.outputs.get("prefill.position_ids")) is not None:
            assert (positions == np.broadcast_to(expected.numpy(), positions.shape)).all()
        if (expected := run.outputs.get("rope_deltas")) is not None:
            assert delta.tolist() == expected.flatten().tolist()
        check_scatter(run.config, run.inputs, run.outputs, "scatter.", case.weights.get(EMBEDDINGS))


EMBEDDINGS = "model.model.word_embeddings.weight"


def check_scatter(config, inputs, outputs, prefix: str, embeddings: torch.Tensor) -> None:
    if f"{prefix}inputs_embeds" not in outputs:
        return
    for row, ids in enumerate(inputs["input_ids"].numpy()):
        media, modality = place_media(config, inputs, row, ids)
        embeds = embeddings.float()[torch.from_numpy(ids)]
        if media is not None:
            embeds[torch.from_numpy(media.rows)] = media.feats
        assert_close(embeds, outputs[f"{prefix}inputs_embeds"][row], "golden_copy")
        masks = {"image_mask": IMAGE, "vision_mask": IMAGE, "audio_mask": AUDIO}
        for name, router in masks.items():
            if (expected := outputs.get(prefix + name)) is not None:
                assert (modality == router).tolist() == expected[row].tolist(), name


def small_thinker(**changes) -> ThinkerConfig:
    """A valid configuration of the family that ``changes`` describe; the sizes do not matter here."""
    flash = "video_patch_token" in changes
    return ThinkerConfig.from_dict(
        {
            "model_type": "bailing_moe_v2" if flash else "bailing_moe",
            "vocab_size": 1 << 20,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "image_start_token": 1,
            "video_start_token": 2,
            **changes,
        }
    )


@golden_cases(has_unit("word_embeddings", "inputs_embeds"))
def test_scatter(case: GoldenCase):
    """Placing features: truncated, complete and (flash) short audios, several rows."""
    for prefix in sub_cases(case, "word_embeddings"):
        config = small_thinker(**case.config[prefix.rstrip(".")])
        inputs = {k[len(prefix) :]: v for k, v in case.inputs.items() if k.startswith(prefix)}
        outputs = {k[len(prefix) :]: v for k, v in case.outputs.items() if k.startswith(prefix)}
        check_scatter(config, inputs, outputs, "", inputs["word_embeddings"])


@golden_cases(has_unit("input_ids", "rope_deltas"))
def test_position_ids(case: GoldenCase):
    """Positions in isolation: pads on both sides, batches, seconds per grid, the shipped flash ids."""
    for prefix in sub_cases(case, "input_ids"):
        settings = case.config[prefix.rstrip(".")]
        tokens = settings["tokens"]
        # Only the centred form has a real-valued temporal scale; only flash has a video patch of its own.
        flash = tokens["img"] != tokens["vid"]
        rope_type = "video_rope" if "scale_factor" in settings else "3D"
        config = small_thinker(
            image_patch_token=tokens["img"],
            image_start_token=tokens["img_s"],
            video_start_token=tokens["vid_s"],
            rope_scaling={"type": rope_type, "factor": None},
            **({"video_patch_token": tokens["vid"]} if flash else {}),
        )
        optional = ("attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        arguments = {
            name: case.inputs[prefix + name].numpy() for name in optional if prefix + name in case.inputs
        }
        positions, delta = position_ids(config, case.inputs[f"{prefix}input_ids"].numpy(), **arguments)
        assert (positions == case.outputs[f"{prefix}position_ids"].numpy()).all(), prefix
        assert delta.tolist() == case.outputs[f"{prefix}rope_deltas"].flatten().tolist(), prefix


@golden_cases(has_unit("position_ids", "q_embed"))
def test_rope(case: GoldenCase, device):
    """Tables and rotation of every rope type, through the fused op that also writes the cache."""
    inputs = case.inputs_on(device.torch)
    for prefix in sub_cases(case, "position_ids"):
        settings = case.config[prefix.rstrip(".")]
        inv_freq, axis, scale = ops.rope_frequencies(RopeConfig.from_dict(settings), settings.get("seq_len"))
        if "bfloat16" in settings.get("inv_freq", ""):
            inv_freq = inv_freq.bfloat16().float()
        inv_freq, axis = inv_freq.to(device.torch), axis.to(device.torch)
        recorded = inputs[f"{prefix}position_ids"]
        positions = recorded.expand(3, *recorded.shape[-2:]).flatten(1).int().contiguous()
        q, k = (inputs[prefix + name].transpose(1, 2).flatten(0, 1) for name in ("q", "k"))
        tokens, kv_heads, dim = k.shape
        qkv = torch.cat([q, k, k], dim=1).flatten(1)
        pages = torch.zeros(2, 1, kv_heads, tokens, dim, device=device.torch)
        cos, sin = ops.rope_table(positions, inv_freq, axis, scale)
        rotated = ops.rope_append(
            qkv, cos, sin, *pages, torch.arange(tokens, device=device.torch), q.shape[1]
        )
        for actual, name in ((rotated, "q_embed"), (pages[0, 0].transpose(0, 1), "k_embed")):
            expected = case.outputs[prefix + name].transpose(1, 2).flatten(0, 1)
            assert_close(actual, expected, "golden_rope")
        for index, axis_positions in enumerate(recorded if recorded.dim() == 3 else [None]):
            lines = positions if axis_positions is None else axis_positions.flatten().int().expand(3, -1)
            tables = ops.rope_table(lines.contiguous(), inv_freq, axis, scale)
            for actual, name in zip(tables, ("cos", "sin"), strict=True):
                expected = case.outputs[prefix + name]
                expected = (expected if axis_positions is None else expected[index]).flatten(0, 1)
                assert_close(torch.cat([actual, actual], dim=1), expected, "golden_rope")


@golden_cases(has_unit("hidden", "topk_idx"))
def test_routers(case: GoldenCase, device):
    """Softmax and grouped sigmoid routers: logits, exact choices, weights."""
    inputs = case.inputs_on(device.torch)
    for prefix in sub_cases(case, "hidden"):
        settings = case.config[prefix.rstrip(".")]
        bias = inputs.get(f"{prefix}expert_bias")
        grouped = bias is not None
        routers = ops.RouterWeights(inputs[f"{prefix}weight"][None], bias[None] if grouped else None)
        ids, weights, logits = ops.moe_route(
            inputs[f"{prefix}hidden"].flatten(0, -2),
            routers,
            None,
            kind="grouped_sigmoid" if grouped else "softmax",
            top_k=settings["num_experts_per_tok"],
            norm_topk_prob=settings.get("norm_topk_prob", True),
            n_group=settings.get("n_group", 1),
            topk_group=settings.get("topk_group", 1),
            scaling=settings.get("routed_scaling_factor", 1.0),
        )
        assert_close(logits, case.outputs[f"{prefix}logits"], "golden_weight")
        ids, order = ids.long().sort(dim=-1)
        assert torch.equal(ids.cpu(), case.outputs[f"{prefix}topk_idx"]), prefix
        assert_close(weights.gather(-1, order), case.outputs[f"{prefix}topk_weight"], "golden_weight")


@golden_cases(has_unit("x_bf16", "y_bf16"))
def test_norms(case: GoldenCase, device):
    """RMSNorm in fp32 within tolerance, in bf16 bit for bit for the cast order."""
    inputs = case.inputs_on(device.torch)
    for prefix in sub_cases(case, "x_bf16"):
        settings = case.config[prefix.rstrip(".")]
        weight_in_fp32 = settings["order"].startswith("cast(weight")
        for suffix, out in (("", "y_f32"), ("_bf16", "y_bf16")):
            x, weight = inputs[f"{prefix}x{suffix}"], inputs[f"{prefix}weight{suffix}"]
            actual = ops.rms_norm(x, weight, settings["eps"], weight_in_fp32=weight_in_fp32)
            expected = case.outputs[prefix + out]
            if suffix:
                assert torch.equal(actual.cpu(), expected), prefix
            else:
                assert_close(actual, expected, "golden_norm")


@golden_cases(has_unit("input_ids", "banned"))
def test_no_repeat_ngram(case: GoldenCase, device):
    """Every id in turn gets the largest logit: it is chosen unless it would repeat an n-gram."""
    inputs = case.inputs_on(device.torch)
    for prefix in sub_cases(case, "input_ids"):
        settings = case.config[prefix.rstrip(".")]
        vocab = settings["vocab"]
        for history, banned in zip(
            inputs[f"{prefix}input_ids"], case.outputs[f"{prefix}banned"], strict=True
        ):
            ones = torch.ones(vocab, device=device.torch)
            chosen, *_ = ops.sample(
                torch.eye(vocab, device=device.torch),
                temperature=0 * ones,
                top_k=(0 * ones).int(),
                top_p=ones,
                repetition_penalty=ones,
                no_repeat_ngram_size=(settings["ngram_size"] * ones).int(),
                history=history,
                history_bounds=torch.tensor([[0, len(history)]] * vocab, device=device.torch),
                uniforms=0 * ones,
            )
            assert torch.equal(chosen.cpu() != torch.arange(vocab), banned), prefix
