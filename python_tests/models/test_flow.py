"""The flow model with random weights: lengths, chunks, guidance as a batch, positions, bad calls."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tolerances import assert_close

from ming_rt.config.speech import FlowConfig, FlowEncoderConfig, FlowEstimatorConfig
from ming_rt.models.flow import Flow, time_grid
from ming_rt.models.flow_encoder import ROWS, Blocks
from ming_rt.models.flow_estimator import FlowEstimator
from ming_rt.runtime.weights import RandomSource

ENCODER = FlowEncoderConfig(24, 32, 2, 48, 2, 1e-5, num_up_blocks=1, static_chunk_size=6)
ESTIMATOR = FlowEstimatorConfig(320, 80, (32, 16), 8, 1, 2, 2)
V1 = FlowConfig(False, 40, 24, 80, 12, 50, 22050, 3, 0.7, ENCODER, ESTIMATOR)
V15 = replace(
    V1,
    causal=True,
    sample_rate=24000,
    encoder=replace(ENCODER, norm_eps=1e-12),
    estimator=replace(ESTIMATOR, channels=(16,), causal=True, static_chunk_size=6),
)
VOICE = torch.linspace(-1, 1, 12)


def flow(config: FlowConfig, seed: int = 0) -> Flow:
    return Flow(config, RandomSource(seed, torch.float32))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (count,), generator=torch.Generator().manual_seed(seed))


def doubled(config: FlowConfig) -> FlowConfig:
    """The sibling whose tokens become two frames each."""
    chunk = replace(config.estimator, static_chunk_size=2 * config.estimator.static_chunk_size)
    return replace(config, encoder=replace(config.encoder, up_stride=2), estimator=chunk)


@pytest.mark.parametrize("config", [V1, V15, doubled(V15)], ids=["v1", "v1.5", "doubled"])
@pytest.mark.parametrize(("prompt", "count"), [(0, 1), (0, 2), (5, 14), (7, 16)])
def test_shapes_and_repetition(isa, config, prompt, count):
    model = flow(config)
    frames = model.frames(prompt + count)
    options = {}
    if prompt:
        mel = torch.randn(model.frames(prompt), 80, generator=torch.Generator().manual_seed(1))
        options = {"prompt_tokens": tokens(prompt, 1), "prompt_mel": mel}
    noise = model.noise(frames, torch.Generator().manual_seed(2))
    mel = model(tokens(count), VOICE, noise, **options)
    assert mel.shape == (frames - (model.frames(prompt) if prompt else 0), 80)
    assert mel.isfinite().all()
    assert torch.equal(model(tokens(count), VOICE, noise, **options), mel)
    if prompt:
        other = model(tokens(count), VOICE, noise, **options | {"prompt_mel": options["prompt_mel"] + 1})
        assert torch.equal(other, mel) != config.causal  # v1 only counts its frames


def test_frames_of_v1():
    """Fractions are cut in float32, which for pieces of up to 80 seconds is what they are."""
    model = flow(V1)
    assert [model.frames(count) for count in range(4001)] == [n * 441 // 256 for n in range(4001)]


@pytest.mark.parametrize("config", [V15, doubled(V15)], ids=["v1.5", "doubled"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_finished_chunks_stay(isa, config, chunks):
    """Given the tokens it looks ahead at, a chunk does not change when more follow."""
    model, ids = flow(config), tokens(25)
    end, stride = 6 * chunks, config.encoder.up_stride
    noise = model.noise(22 * stride)
    options = {"prompt_tokens": tokens(4, 1), "final": False, "chunked": True}
    whole = model(ids[: 25 - 4], VOICE, noise, **options)
    part = model(ids[: end - 4 + 3], VOICE, noise[: end * stride], **options)
    assert_close(part, whole[: end * stride], "model")
    # Without chunks everything hears everything.
    loose = options | {"chunked": False}
    part = model(ids[: end - 4 + 3], VOICE, noise[: end * stride], **loose)
    assert (part - model(ids[: 25 - 4], VOICE, noise, **loose)[: end * stride]).abs().max() > 1e-3


def test_one_chunk_is_full_attention(isa):
    model, ids = flow(V15), tokens(6)
    noise = model.noise(6)
    assert_close(model(ids, VOICE, noise, chunked=True), model(ids, VOICE, noise), "model")


@pytest.mark.parametrize("config", [V1, V15], ids=["v1", "v1.5"])
@pytest.mark.parametrize("frames", [1, 9, 14])
def test_rows_of_a_batch_are_those_alone(isa, config, frames):
    estimator = FlowEstimator(config.estimator, RandomSource(0, torch.float32))
    x = torch.randn(2, frames, 320, generator=torch.Generator().manual_seed(0))
    (shifts,) = estimator.times(torch.tensor([0.3]))
    for chunked in {False, config.causal}:
        both = estimator(x, shifts, estimator.layout(2, frames, chunked))
        for row in range(2):
            alone = estimator(x[row : row + 1], shifts, estimator.layout(1, frames, chunked))
            assert torch.equal(alone[0], both[row])


@pytest.mark.parametrize("frames", [1, 40, ROWS + 44])
@pytest.mark.parametrize("chunk", [None, 50])
def test_positions_are_distances(frames, chunk):
    """The first block's attention written out: every pair's distance, its sines and cosines in turn."""
    src = RandomSource(0, torch.float32)
    blocks = Blocks(ENCODER, src, "embed", "encoders", 24, 1)
    x = torch.randn(frames, 32, generator=torch.Generator().manual_seed(0))
    taps = {}
    blocks(x, chunk, taps.__setitem__)

    def part(name, *shape):
        return src.tensor(f"encoders.0.{name}", shape).double()

    h = torch.nn.functional.layer_norm(
        x.double(), (32,), part("norm_mha.weight", 32), part("norm_mha.bias", 32), 1e-5
    )
    q, k, v = (
        (h @ part(f"self_attn.linear_{n}.weight", 32, 32).T + part(f"self_attn.linear_{n}.bias", 32)).view(
            frames, 2, 16
        )
        for n in "qkv"
    )
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).double()
    angles = distance[..., None] * 10000 ** (-torch.arange(0, 32, 2).double() / 32)
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
    p = (waves @ part("self_attn.linear_pos.weight", 32, 32).T).view(frames, frames, 2, 16)
    u, w = part("self_attn.pos_bias_u", 2, 16), part("self_attn.pos_bias_v", 2, 16)
    scores = torch.einsum("ihd,jhd->hij", q + u, k) + torch.einsum("ihd,ijhd->hij", q + w, p)
    if chunk:
        seen = torch.arange(frames) < (torch.arange(frames)[:, None] // chunk + 1) * chunk
        scores = scores.masked_fill(~seen, -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", (scores / 4).softmax(-1), v).flatten(1)
    assert_close(taps["encoder_layer_0_attention_values"], expected.float(), "model")


def test_time_grid():
    times, lengths = time_grid(8)
    assert times[0] == 0
    assert_close(torch.tensor(lengths).sum(), torch.tensor(1.0))
    assert all(a < b for a, b in pairwise(lengths))  # dense near 0


def test_regulator_takes_the_nearest_token(isa):
    """With convolutions that pass their middle frame on, only the choice of tokens is left."""
    model = flow(V1)
    taken = []
    model.regulator.convs[0] = _Recorder(model.regulator.convs[0], taken)
    model.regulator(torch.arange(10.0)[:, None].expand(-1, 80), 17)
    assert taken[0][0, 1:-1, 0].tolist() == [frame * 10 // 17 for frame in range(17)]


class _Recorder:
    """Keeps what a convolution is given."""

    def __init__(self, conv, taken: list) -> None:
        self.conv, self.pad, self.taken = conv, conv.pad, taken

    def __call__(self, x: torch.Tensor, **options):
        self.taken.append(x)
        return self.conv(x, **options)


def test_noise():
    assert torch.equal(flow(V15).noise(30)[:20], flow(V15).noise(20))  # one table
    with pytest.raises(ValueError, match="expected at most 15000 mel frames, got 15001"):
        flow(V15).noise(15001)
    fresh = [flow(V1).noise(20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.zeros(9, 80)}, r"expected noise of shape \[10, 80\], got \[9, 80\]"),
        ({"final": False}, r"expected noise of shape \[7, 80\], got \[10, 80\]"),
        ({"prompt_mel": torch.zeros(10, 80)}, "expected tokens of more than 10 mel frames, got 10"),
        ({"tokens": tokens(3), "final": False}, "expected tokens of more than 0 mel frames, got 0"),
        ({"tokens": tokens(2), "final": False}, "expected tokens of more than 0 mel frames, got -1"),
    ],
)
def test_bad_calls(arguments, message):
    good = {"tokens": tokens(10), "embedding": VOICE, "noise": torch.zeros(10, 80)}
    with pytest.raises(ValueError, match=f"flow: {message}"):
        flow(V15)(**good | arguments)
