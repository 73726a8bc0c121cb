"""The vocoder: against a plain composition, spellings of its weights, pieces, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tolerances import assert_close

from ming_rt import ops
from ming_rt.bench.ops.vocoder import CONFIG as V15
from ming_rt.config.speech import VocoderConfig
from ming_rt.errors import WeightsError
from ming_rt.models.vocoder import Vocoder
from ming_rt.runtime.weights import Checkpoint, PlanSource, RandomSource, RecordingSource, load

V1 = replace(
    V15,
    sampling_rate=22050,
    upsample_rates=(8, 8),
    upsample_kernel_sizes=(16, 16),
    source_resblock_kernel_sizes=(7, 11),
    source_resblock_dilation_sizes=((1, 3, 5),) * 2,
)
TINY = {
    "v1.5": replace(V15, base_channels=16, f0_channels=12),
    "v1": replace(V1, base_channels=16, f0_channels=12),
    "one stage": replace(
        V1,
        base_channels=12,
        f0_channels=4,
        nb_harmonics=0,
        upsample_rates=(4,),
        upsample_kernel_sizes=(6,),
        n_fft=12,
        hop_len=3,
        resblock_kernel_sizes=(5,),
        resblock_dilation_sizes=((2,),),
        source_resblock_kernel_sizes=(3,),
        source_resblock_dilation_sizes=((1, 4),),
    ),
}


def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Means and deviations of weights that make a voiced and a quiet sound of noise."""
    if name == "f0_predictor.classifier.bias":
        return 60.0, 0.0
    if name.startswith("f0_predictor.classifier"):
        return 0.0, 30.0
    if name.endswith("weight_g"):
        return 0.7, 0.1
    if name.endswith("alpha"):
        return 1.0, 0.3
    return 0.0, 0.1


def source(device: torch.device | str = "cpu") -> RandomSource:
    return RandomSource(dtype=torch.float32, scale=scale, device=torch.device(device))


def inputs(config: VocoderConfig, frames: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Mel and noise; those of fewer frames are their beginning."""
    generator = torch.Generator().manual_seed(5)
    mel = torch.randn(40, config.in_channels, generator=generator)
    noise = torch.randn(40 * config.hop, config.nb_harmonics + 1, generator=generator)
    return mel[:frames].to(device), noise[: frames * config.hop].t().contiguous().to(device)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("frames", [1, 5])
def test_against_a_plain_composition(kind, frames, device):
    plain = pytest.importorskip(
        "ming_rt.bench.torch_vocoder", reason="the bench is part of the installed package"
    )
    config = TINY[kind]
    mel, noise = inputs(config, frames, device.torch)
    phase = torch.linspace(0, 3, config.nb_harmonics + 1, device=device.torch)
    expected, excitation = plain.TorchVocoder(config, source(device.torch))(mel, noise, phase)
    wave, actual = Vocoder(config, source(device.torch))(mel, noise, phase=phase)
    assert wave.shape == actual.shape == (frames * config.hop,)
    assert wave.abs().max() > 0.01
    assert_close(actual, excitation, "golden_source")
    assert_close(wave, expected, "golden_vocoder")


@pytest.mark.parametrize(("config", "parameters"), [(V1, 20.46e6), (V15, 20.82e6)], ids=["v1", "v1.5"])
def test_real_sizes(config, parameters):
    plan = PlanSource(dtype=torch.float32)
    Vocoder(config, plan)
    assert plan.parameters == pytest.approx(parameters, rel=1e-3)
    assert config.hop == {22050: 256, 24000: 480}[config.sampling_rate]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a vocoder's weights in one of torch's spellings."""
    recorded = RecordingSource(source(), lambda _: torch.float32)
    Vocoder(TINY["v1.5"], recorded)

    def directory(newer: bool, **changes: torch.Tensor | None):
        tensors = {**recorded.tensors, **changes}
        path = tmp_path_factory.mktemp("vocoder")
        for old, new in ((".weight_g", "original0"), (".weight_v", "original1")):
            for name in [name for name in tensors if newer and name.endswith(old)]:
                tensors[name.replace(old, f".parametrizations.weight.{new}")] = tensors.pop(name)
        save_file(
            {n: t.contiguous() for n, t in tensors.items() if t is not None}, path / "model.safetensors"
        )
        return Checkpoint(path)

    return directory


def test_both_spellings_of_weight_norm(checkpoint):
    mel, noise = inputs(TINY["v1.5"], 3)
    waves = [
        load(lambda src: Vocoder(TINY["v1.5"], src), checkpoint(newer), torch.float32)(mel, noise)[0]
        for newer in (False, True)
    ]
    assert torch.equal(*waves)
    assert torch.equal(waves[0], Vocoder(TINY["v1.5"], source())(mel, noise)[0])


def test_weights_are_checked(checkpoint):
    for changes, message in [
        ({"ups.1.weight_g": None}, "ups.1.weight_g: missing"),
        ({"conv_pre.weight_v": torch.zeros(16, 80, 5)}, r"conv_pre.weight_v: shape \[16, 80, 5\], expected"),
        ({"conv_pre.weight": torch.zeros(16, 80, 7)}, "conv_pre.weight: unexpected"),
    ]:
        with pytest.raises(WeightsError, match=message):
            load(lambda src: Vocoder(TINY["v1.5"], src), checkpoint(False, **changes), torch.float32)


def test_a_gain_scales_its_rows():
    """Twice the gain of the last convolution: twice what stands before its bias."""

    class Doubled(RandomSource):
        def tensor(self, name, *args, **kwargs):
            return super().tensor(name, *args, **kwargs) * (2.0 if name == "conv_post.weight_g" else 1.0)

    mel, noise = inputs(TINY["v1.5"], 2)
    taps = [{}, {}]
    for made, tap in zip((source(), Doubled(dtype=torch.float32, scale=scale)), taps, strict=True):
        vocoder = Vocoder(TINY["v1.5"], made)
        vocoder(mel, noise, tap=tap.__setitem__)
    single, doubled = (tap["conv_post"] - vocoder.conv_post.bias for tap in taps)
    assert_close(doubled, 2 * single)


def test_a_cached_source_takes_the_first_samples():
    config = TINY["v1.5"]
    vocoder = Vocoder(config, source())
    mel, noise = inputs(config, 6)
    wave, excitation = vocoder(mel, noise)
    again, same = vocoder(mel, noise, cached_source=excitation[: 2 * config.hop])
    assert torch.equal(wave, again)
    assert torch.equal(excitation, same)
    other = torch.zeros(2 * config.hop)
    changed, mixed = vocoder(mel, noise, cached_source=other)
    assert torch.equal(mixed, torch.cat([other, excitation[2 * config.hop :]]))
    assert not torch.equal(changed[: 2 * config.hop], wave[: 2 * config.hop])
    assert torch.equal(changed, vocoder.decode(mel, mixed))


def test_tapping_changes_nothing():
    vocoder, taps = Vocoder(TINY["v1.5"], source()), {}
    mel, noise = inputs(TINY["v1.5"], 3)
    assert torch.equal(vocoder(mel, noise)[0], vocoder(mel, noise, tap=taps.__setitem__)[0])
    assert {"f0", "sine_waves", "source", "ups_2", "resblocks_8", "conv_post", "wav"} <= taps.keys()


def test_threads_change_nothing(isa):
    mel, noise = inputs(TINY["v1.5"], 7)
    vocoder, before = Vocoder(TINY["v1.5"], source()), ops.num_threads()
    try:
        waves = []
        for threads in (1, 3):
            ops.set_num_threads(threads)
            waves.append(vocoder(mel, noise)[0])
    finally:
        ops.set_num_threads(before)
    assert torch.equal(*waves)


def test_what_is_refused():
    config = TINY["v1.5"]
    vocoder = Vocoder(config, source())
    mel, noise = inputs(config, 2)
    for arguments, message in [
        ((mel[:0], noise[:, :0]), "expected frames and noise of shape"),
        ((mel, noise[:, 1:]), r"noise of shape \[9, 960\], got 2 and \[9, 959\]"),
        ((mel, noise[1:]), r"noise of shape \[9, 960\], got 2 and \[8, 960\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            vocoder(*arguments)
    with pytest.raises(ValueError, match="a cached source of at most 960 samples, got 961"):
        vocoder(mel, noise, cached_source=torch.zeros(961))
    with pytest.raises(ValueError, match=r"expected weights in float32, got a source of torch\.bfloat16"):
        Vocoder(config, RandomSource(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="stft: expected an even size"):
        Vocoder(replace(config, hop_len=1), source())
