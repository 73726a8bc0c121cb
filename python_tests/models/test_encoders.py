"""Encoders: independence of companions where there must be some, dependence where the original has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import assert_close

from ming_rt.config import SanmConfig, VisionConfig, WhisperConfig
from ming_rt.errors import InvalidMediaError
from ming_rt.layers.conv import Conv1d, ConvTranspose1d, DepthwiseConv1d, windowed_sum
from ming_rt.models.omni import AudioEncoder, VisionEncoder
from ming_rt.models.projector import l2_normalize
from ming_rt.models.vision import layout
from ming_rt.runtime.weights import RandomSource

VISION = VisionConfig.from_dict(
    {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 40,
    }
)
WHISPER = WhisperConfig("audio", "linear_proj_audio", 80, 30, 32, 2, 2, 3, 2, True)
SANM = SanmConfig("audio", "linear_proj_audio", 40, 32, 2, 48, 3, 11, 1, 1, True)


def patches(grid: list[list[int]], seed: int = 0) -> torch.Tensor:
    count = sum(int(np.prod(item)) for item in grid)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 1176), dtype=np.float32))


def frames(length: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((length, width), dtype=np.float32))


@pytest.mark.parametrize("grid", [[1, 8, 8], [1, 2, 2], [1, 4, 18], [3, 10, 6]])
def test_layout_covers_every_unit_once(grid):
    where = layout(VISION, np.array([grid]))
    time, height, width = grid
    units = time * height * width // 4
    assert sorted(where.units.tolist()) == list(range(units))
    assert where.windows[-1] == where.slices[-1] == time * height * width
    lengths = where.windows.diff()
    assert (lengths > 0).all()
    assert (lengths <= 64).all()
    assert where.slices.diff().tolist() == [height * width] * time
    for begin, end in zip(where.windows // 4, where.windows[1:] // 4, strict=False):
        inside = where.units[begin:end] % (height * width // 4)
        rows, columns = inside // (width // 2), inside % (width // 2)
        assert len((rows // 4).unique()) == len((columns // 4).unique()) == 1  # one window of 4 x 4 units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pictures_do_not_see_each_other(dtype):
    vision = VisionEncoder(VISION, RandomSource(0, dtype), 24, 2)
    grids = [[1, 4, 6], [2, 12, 10], [1, 2, 2]]
    together = vision(patches(grids), np.array(grids))
    assert together.shape == (6 + 60 + 1, 24)
    assert together.dtype == dtype
    first_patch = first_unit = 0
    for grid in grids:
        count = int(np.prod(grid))
        alone = vision(patches(grids)[first_patch : first_patch + count], np.array([grid]))
        assert torch.equal(alone, together[first_unit : first_unit + count // 4])
        first_patch, first_unit = first_patch + count, first_unit + count // 4


def test_flash_rounds_the_norm_once():
    assert VisionConfig.from_dict(
        {"model_type": "bailingmm_moe_v2_lite", "vision_config": {**vars_of(VISION)}}
    ).norm_weight_in_fp32


def vars_of(config: VisionConfig) -> dict:
    """The upstream keys of a configuration."""
    keys = ("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size")
    keys += ("spatial_merge_size", "window_size", "out_hidden_size")
    return {key: getattr(config, key) for key in keys} | {"fullatt_block_indexes": [1]}


def test_whisper_hears_the_padding_of_longer_companions():
    """There is no mask upstream: zero frames are attended to, so a segment changes beside a longer one."""
    audio = AudioEncoder(WHISPER, RandomSource(1, torch.float32), 24, 2)
    short, long = frames(21, 80), frames(40, 80, seed=1)
    beside, other = audio([short, long])
    assert torch.equal(other, audio([long])[0])
    alone = audio([short])[0]
    assert beside.shape == alone.shape == (6, 24)
    assert (beside - alone).abs().max() > 1e-3
    padded = audio([torch.nn.functional.pad(short, (0, 0, 0, 19))])[0]
    assert torch.equal(beside, padded[:6])


def test_whisper_length_limit():
    audio = AudioEncoder(WHISPER, RandomSource(1, torch.float32), 24, 2)
    assert audio([frames(60, 80)])[0].shape == (15, 24)
    with pytest.raises(InvalidMediaError, match="too long, expected at most 60 frames"):
        audio([frames(61, 80)])


def test_sanm_segments_are_independent():
    audio = AudioEncoder(SANM, RandomSource(2, torch.float32), 24, 2)
    segments = [frames(7, 40), frames(1, 40, seed=1), frames(19, 40, seed=2)]
    together = audio(segments)
    assert [len(rows) for rows in together] == [7, 1, 19]
    for segment, rows in zip(segments, together, strict=True):
        assert torch.equal(audio([segment])[0], rows)


@pytest.mark.parametrize("audio", [WHISPER, SANM], ids=["whisper", "sanm"])
def test_rows_have_unit_length_where_configured(audio):
    width = audio.n_mels if isinstance(audio, WhisperConfig) else audio.input_size
    rows = AudioEncoder(audio, RandomSource(3, torch.float32), 24, 3)([frames(12, width)])[0]
    assert_close(rows.norm(dim=-1), torch.ones(len(rows)))


def test_normalising_nothing_gives_nothing():
    assert not l2_normalize(torch.zeros(2, 4)).any()


@pytest.mark.parametrize(
    ("kernel", "stride", "length"), [(1, 1, 5), (3, 1, 1), (3, 2, 6), (3, 2, 7), (5, 3, 9)]
)
def test_conv1d_matches_torch(kernel, stride, length):
    src = RandomSource(4, torch.float32)
    conv = Conv1d(src, "conv", 6, 10, kernel, stride)
    x = frames(2 * length, 6).view(2, length, 6)
    weight, bias = src.tensor("conv.weight", (10, 6, kernel)), src.tensor("conv.bias", (10,))
    expected = torch.nn.functional.conv1d(x.mT, weight, bias, stride, kernel // 2).mT
    assert conv.length(length) == expected.shape[1]
    assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [(3, 1, (2, 0)), (4, 1, (0, 0)), (3, 2, (1, 1)), (3, 3, (0, 1))]
)
def test_conv1d_pads_each_item_of_a_batch(kernel, stride, pad):
    src = RandomSource(4, torch.float32)
    conv = Conv1d(src, "conv", 6, 10, kernel, stride, pad=pad)
    weight, bias = src.tensor("conv.weight", (10, 6, kernel)), src.tensor("conv.bias", (10,))
    for length in range(4, 9):
        x = frames(3 * length, 6).view(3, length, 6)
        padded = torch.nn.functional.pad(x, (0, 0, *pad))
        expected = torch.nn.functional.conv1d(padded.mT, weight, bias, stride).mT
        assert conv.length(length) == expected.shape[1]
        assert_close(conv(x), expected)
        assert torch.equal(conv(padded, padded=True), conv(x))
        assert torch.equal(conv(x)[1:2], conv(x[1:2]))


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_conv_transpose1d_matches_torch(stride):
    src = RandomSource(4, torch.float32)
    conv, x = ConvTranspose1d(src, "up", 6, 5, stride), frames(14, 6).view(2, 7, 6)
    weight, bias = src.tensor("up.weight", (6, 5, 2 * stride)), src.tensor("up.bias", (5,))
    expected = torch.nn.functional.conv_transpose1d(x.mT, weight, bias, stride, stride // 2).mT
    assert_close(conv(x), expected)


def test_depthwise_conv_pads_each_segment_with_zeros():
    src = RandomSource(5, torch.float32)
    conv, x = DepthwiseConv1d(src, "fsmn", 4, 3), frames(5, 4)
    weight = src.tensor("fsmn.weight", (4, 1, 3))[:, 0]
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    expected = sum(padded[tap : tap + 5] * weight[:, tap] for tap in range(3))
    assert_close(conv(x), expected)
    assert_close(windowed_sum(x, weight), expected)


def test_depthwise_conv_of_a_gpu_is_that_of_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        conv, x = DepthwiseConv1d(RandomSource(5, dtype), "fsmn", 24, 11), frames(40, 24).to(dtype)
        assert_close(windowed_sum(x, conv.weight[:, 0]), conv(x))
        assert windowed_sum(x, conv.weight[:, 0]).dtype == dtype
