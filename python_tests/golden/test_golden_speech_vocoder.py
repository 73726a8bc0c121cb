"""The vocoder against recorded runs: every stage of both generations, and the transforms by themselves."""

from __future__ import annotations

import torch
from golden_cases import GoldenCase, golden_cases
from thinker_harness import load_case
from tolerances import WAVE_RMS, assert_close

from ming_rt import ops
from ming_rt.config.speech import VocoderConfig, read_detokenizer
from ming_rt.models.vocoder import MAGNITUDE_LIMIT, Vocoder


def has_vocoder(case: GoldenCase) -> bool:
    return case.has("weights.safetensors") and {"mel", "sine_noise"} <= case.inputs.keys()


def has_transforms(case: GoldenCase) -> bool:
    return {"magnitude", "phase", "signal"} <= case.inputs.keys()


class Taps(dict):
    """Collects intermediates by name."""

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        self[name] = tensor.cpu().clone()


def config_of(case: GoldenCase) -> VocoderConfig:
    return read_detokenizer(case.path / case.config["config_file"])[1]


def arguments(case: GoldenCase, device) -> dict[str, torch.Tensor]:
    """Mel, noise and phases as the model takes them: frames and harmonics first."""
    inputs = case.inputs_on(device.torch)
    noise, phase = inputs["sine_noise"][0], None
    if "phase_uniform" in inputs:
        phase = inputs["phase_uniform"].flatten().clone()
        phase[0] = 0
    if noise.shape[0] > noise.shape[1]:
        noise = noise.t()
    return {"mel": inputs["mel"][0].t().contiguous(), "noise": noise.contiguous(), "phase": phase}


def row_of(name: str, config: VocoderConfig) -> str:
    """The tolerances of an intermediate: of v1.5, whose recorded phases are rounded, and of the others."""
    if name in ("f0", "conv_pre", "ups_0", "f0_condnet"):
        return "golden_f0"
    if name in ("source", "sine_waves") and not config.frame_phase:
        return "golden_source"
    return "golden_vocoder"


@golden_cases(has_vocoder)
def test_vocoder(case: GoldenCase, tmp_path, device):
    """Every recorded intermediate and the wave; recorded tensors are channels first, or flat."""
    config = config_of(case)
    vocoder = load_case(case, tmp_path, lambda src: Vocoder(config, src), device=device)
    given, taps = arguments(case, device), Taps()
    vocoder(**given, tap=taps)
    magnitude, phase = taps["conv_post"].chunk(2, dim=1)
    taps |= {"magnitude": magnitude.exp(), "phase": phase.sin()}
    taps["uv"] = (taps["f0"] > config.nsf_voiced_threshold).repeat_interleave(config.hop).float()
    cached = {"source_cached", "wav_cached"} & case.outputs.keys()
    if cached:
        cache = case.inputs_on(device.torch)["cache_source"].flatten()
        wave, source = vocoder(**given, cached_source=cache)
        taps |= {"source_cached": source.cpu(), "wav_cached": wave.cpu()}
    assert case.outputs.keys() <= taps.keys()
    for name, expected in case.outputs.items():
        actual, expected = taps[name].float().squeeze(), expected.squeeze()
        if actual.shape != expected.shape:
            actual = actual.t()
        if name.startswith("wav") and config.frame_phase:
            assert_close(actual, expected, "golden_wave")
            assert (actual - expected).square().mean().sqrt() <= WAVE_RMS
        else:
            assert_close(actual, expected, row_of(name, config))


@golden_cases(has_transforms)
def test_transforms(case: GoldenCase, backend):
    inputs = case.inputs_on(torch.empty(0).device)
    plan = ops.Stft.make(case.config["n_fft"], case.config["hop_len"], inputs["signal"].device)
    assert_close(plan.window, case.outputs["window"], "golden_transform")
    real, imaginary = ops.stft(inputs["signal"][0], plan).t().chunk(2)
    assert_close(real, case.outputs["stft_real"][0], "golden_transform")
    assert_close(imaginary, case.outputs["stft_imag"][0], "golden_transform")
    polar = torch.cat([inputs["magnitude"], inputs["phase"]], dim=1)[0].t()
    assert inputs["magnitude"].max() > MAGNITUDE_LIMIT
    wave = ops.istft(polar, plan, limit=MAGNITUDE_LIMIT)
    assert_close(wave, case.outputs["wav"][0], "golden_transform")
