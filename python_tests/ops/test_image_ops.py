"""Resizers and patch extraction: every instruction set against the torch compositions."""

from __future__ import annotations

import pytest
import torch
from tolerances import FRAME_LEVELS, FRAME_SHARE, assert_close

from ming_rt import ops
from ming_rt.ops import image

KINDS = ("bicubic", "bilinear")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# (H, W, C) -> (height, width)
RESIZES = [
    ((91, 137, 3), (84, 140)),  # one axis down, one up
    ((91, 137, 3), (91, 140)),  # one pass only
    ((91, 137, 3), (84, 137)),
    ((300, 40, 3), (28, 308)),
    ((230, 331, 3), (84, 112)),
    ((7, 5, 3), (28, 28)),
    ((64, 64, 3), (3, 2)),  # rows shorter than a vector
    ((1, 1, 3), (28, 56)),
    ((33, 17, 1), (50, 61)),
    ((33, 17, 2), (5, 6)),
    ((17, 50, 4), (40, 33)),
]


def pixels(rng, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "size"), RESIZES)
def test_resize_u8_equals_the_composition(isa, rng, shape, size, kind):
    for picture in (
        pixels(rng, *shape),
        pixels(rng, *shape) // 128 * 255,
    ):  # the second over- and undershoots
        assert torch.equal(image.resize_u8(picture, *size, kind), image.resize_u8_torch(picture, *size, kind))


def test_resize_u8_keeps_a_picture_of_that_size(rng):
    picture = pixels(rng, 28, 56, 3)
    assert ops.resize_u8(picture, 28, 56) is picture


def test_resize_u8_of_one_colour_is_that_colour(isa):
    for level in (0, 1, 127, 255):
        picture = torch.full((37, 53, 3), level, dtype=torch.uint8)
        assert (ops.resize_u8(picture, 84, 28) == level).all()


def test_resize_u8_goes_horizontally_first_and_rounds_in_between(isa, rng):
    picture = pixels(rng, 60, 80, 3)
    both = ops.resize_u8(picture, 28, 56)
    assert torch.equal(both, ops.resize_u8(ops.resize_u8(picture, 60, 56), 28, 56))
    assert not torch.equal(both, ops.resize_u8(ops.resize_u8(picture, 28, 80), 28, 56))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_uint8", [False, True])
@pytest.mark.parametrize(("shape", "size"), RESIZES)
def test_resize_frames_matches_torch(isa, rng, shape, size, kind, to_uint8):
    frames = pixels(rng, 3, *shape)
    for x in (frames, frames.float() * 0.99 + 0.3):
        actual = ops.resize_frames(x, *size, kind, to_uint8=to_uint8)
        expected = ops.resize_frames_torch(x, *size, kind, to_uint8=to_uint8)
        if not to_uint8:
            assert_close(actual, expected, "resize_frames")
            continue
        assert actual.dtype == torch.uint8
        difference = (actual.int() - expected.int()).abs()
        assert difference.max() <= FRAME_LEVELS
        assert (difference > 0).float().mean() <= FRAME_SHARE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(40, 56), (62, 84), (1080, 560), (100, 33), (28, 28), (3, 50)])
def test_float_weights_are_torch_s(kind, sizes):
    """Interpolating the identity shows torch's own weights."""
    n_in, n_out = sizes
    expected = torch.nn.functional.interpolate(
        torch.eye(n_in)[None, None], (n_in, n_out), mode=kind, antialias=True
    )[0, 0].T
    start, weights = image._float_table(n_in, n_out, kind)
    dense = torch.zeros(n_out, n_in)
    dense.scatter_(1, start.long()[:, None] + torch.arange(weights.shape[1]), weights)
    assert torch.equal(dense, expected)


def test_frames_do_not_depend_on_each_other_or_on_threads(isa, rng, monkeypatch):
    frames = pixels(rng, 5, 45, 70, 3)
    before = ops.num_threads()
    whole = ops.resize_frames(frames, 28, 56)
    try:
        ops.set_num_threads(1)
        assert torch.equal(ops.resize_frames(frames, 28, 56), whole)
    finally:
        ops.set_num_threads(before)
    monkeypatch.setattr(image, "_CHUNK_BYTES", 1)
    assert torch.equal(ops.resize_frames(frames, 28, 56), whole)
    assert torch.equal(torch.cat([ops.resize_frames(f[None], 28, 56) for f in frames]), whole)


def test_strided_pictures(isa, rng):
    wide = pixels(rng, 60, 80, 3)
    part = wide[10:50, 5:75]
    assert torch.equal(ops.resize_u8(part, 28, 56), ops.resize_u8(part.clone(), 28, 56))
    assert torch.equal(ops.resize_frames(part[None], 28, 56), ops.resize_frames(part.clone()[None], 28, 56))


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 56, 84), (2, 28, 56), (6, 56, 28)])
def test_patchify_equals_the_composition(backend, rng, shape):
    frames = pixels(rng, *shape, 3)
    for x in (frames, frames.float() + 0.3):
        rows, grid = ops.patchify(x, MEAN, STD)
        expected, expected_grid = ops.patchify_torch(x, MEAN, STD)
        assert grid == expected_grid == (-(-shape[0] // 2), shape[1] // 14, shape[2] // 14)
        assert torch.equal(rows, expected)


def test_patchify_order(backend):
    """One bright pixel lands where the layout says: unit (row, column), block, channel, time, y, x."""
    frames = torch.zeros(2, 56, 84, 3)
    frames[1, 28 + 14 + 3, 56 + 5, 2] = 255.0
    rows, _ = ops.patchify(frames, (0.0,) * 3, (1.0,) * 3)
    ((row, value),) = rows.nonzero().tolist()
    unit, block = divmod(row, 4)
    assert (unit, block) == (1 * 3 + 2, 2)
    assert value == 2 * 392 + 196 + 3 * 14 + 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.resize_u8(torch.zeros(4, 4, 3), 2, 2), "resize_u8: image: expected uint8"),
        (lambda: ops.resize_u8(torch.zeros(4, 4, 5, dtype=torch.uint8), 2, 2), "1 to 4 channels"),
        (lambda: ops.resize_u8(torch.zeros(4, 4, 3, dtype=torch.uint8), 0, 2), "positive height"),
        (lambda: ops.resize_u8(torch.zeros(4, 4, 3, dtype=torch.uint8), 2, 2, "nearest"), "nearest"),
        (lambda: ops.resize_frames(torch.zeros(1, 4, 4, 3).half(), 2, 2), "resize_frames: frames: expected"),
        (lambda: ops.patchify(torch.zeros(3, 28, 28, 3), MEAN, STD), "even T"),
        (lambda: ops.patchify(torch.zeros(1, 28, 30, 3), MEAN, STD), "multiple of 28"),
        (lambda: ops.patchify(torch.zeros(1, 28, 28, 4), MEAN, STD), "3"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
