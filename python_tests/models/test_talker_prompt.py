"""Talker prompts that do not fit, the ban of the end with ties, and the noise table against torch."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from tolerances import assert_close

from ming_rt.errors import InvalidRequestError
from ming_rt.models.flow_noise import FRAMES, fixed_noise
from ming_rt.models.talker_prompt import TalkerIds, talker_prompt
from ming_rt.models.talker_sampling import TOP_K, ban_end

IDS = TalkerIds(**{field.name: 100 + i for i, field in enumerate(fields(TalkerIds))})


@pytest.mark.parametrize("generation", ["preview", "v1", "v1.5"])
def test_empty_text(generation):
    with pytest.raises(InvalidRequestError, match="nothing to be spoken"):
        talker_prompt(generation, IDS, [])


def test_texts_have_to_fit_beside_the_voice_prompt():
    audio = list(range(9))
    prompt = talker_prompt("v1.5", IDS, [1] * 6, prompt_text=[2] * 3, prompt_audio=audio)
    assert len(prompt.audio_ids) == len(prompt.text_ids) == 7 + 10
    assert prompt.text_ids[-1] == IDS.text_eos
    with pytest.raises(InvalidRequestError, match=r"7 tokens and the 3 .* 9 audio tokens"):
        talker_prompt("v1.5", IDS, [1] * 7, prompt_text=[2] * 3, prompt_audio=audio)
    with pytest.raises(InvalidRequestError, match="do not fit"):
        talker_prompt("v1.5", IDS, [1])


def test_other_talkers():
    with pytest.raises(InvalidRequestError, match="got flash"):
        talker_prompt("flash", IDS, [1])
    with pytest.raises(InvalidRequestError, match="speaker vector only"):
        talker_prompt("preview", IDS, [1], prompt_audio=[1])


@pytest.mark.parametrize("generation", ["preview", "v1", "v1.5"])
@pytest.mark.parametrize("thinker_length", [0, 4])
def test_rows_to_be_replaced_are_padding(generation, thinker_length):
    voice = {} if generation == "preview" else {"prompt_text": [2], "prompt_audio": [3, 4, 5, 6, 7]}
    prompt = talker_prompt(generation, IDS, [1, 2], thinker_length=thinker_length, **voice)
    rows = [*range(prompt.thinker_rows.start, prompt.thinker_rows.stop), prompt.speaker_row]
    assert len(rows) == thinker_length + 1
    for stream in (prompt.audio_ids, prompt.text_ids):
        assert [i for i, token in enumerate(stream) if token == IDS.audio_pad] == rows


def test_text_runs_out_into_padding():
    prompt = talker_prompt("preview", IDS, [1, 2])
    assert [prompt.text_id(step) for step in range(5)] == [2, IDS.text_eos, *[IDS.text_pad] * 3]


@pytest.mark.parametrize("values", [7, 30, 2000])
def test_ban_of_the_end_keeps_the_others(rng, values):
    """Few values make many ties."""
    logits = torch.randint(values, (64, 200), generator=rng).float()
    end_id, banned = 37, torch.arange(64) % 2 == 0
    places = logits >= logits.sort(descending=True).values[:, TOP_K - 1 : TOP_K]
    places[banned, end_id] = False
    changed = logits.clone()
    top_k = ban_end(changed, banned, end_id)
    least = torch.stack(
        [row.sort(descending=True).values[k - 1] for row, k in zip(changed, top_k, strict=True)]
    )
    assert torch.equal(changed >= least[:, None], places)
    assert torch.equal(top_k[~banned], torch.full_like(top_k[~banned], TOP_K))
    changed[banned, end_id] = logits[banned, end_id]
    assert torch.equal(changed, logits)


@pytest.mark.parametrize("channels", [1, 2, 7, 80])
def test_noise_is_torch_s(channels):
    noise = fixed_noise(channels)
    expected = torch.randn(channels, FRAMES, generator=torch.Generator().manual_seed(0))
    assert_close(torch.tensor(noise), expected, "golden_noise")
    assert noise is fixed_noise(channels)
    with pytest.raises(ValueError, match="read-only"):
        np.multiply(noise, 2, out=noise)
