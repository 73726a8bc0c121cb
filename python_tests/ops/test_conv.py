"""conv_frames against its composition; with a matrix product it is every convolution torch knows."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from ming_rt import ops
from ming_rt.layers.conv import Conv1d, ConvTranspose1d


class Given:
    """A weight source of given tensors."""

    rank, world, quant, dtype = 0, 1, None, torch.float32

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {f"c.{name}": tensor for name, tensor in tensors.items()}

    def tensor(self, name, shape, dtype=None, shard=None):
        assert self.tensors[name].shape == tuple(shape)
        return self.tensors[name]


@pytest.mark.parametrize("channels", [1, 4, 18, 67])
@pytest.mark.parametrize("act", [None, "leaky", "snake"])
@pytest.mark.parametrize(
    ("inputs", "frames", "pad", "dilation"),
    [(1, 7, (0, 0), 1), (3, 1, (3, 3), 1), (2, 10, (5, 5), 5), (3, 11, (2, 0), 3), (1, 0, (1, 1), 2)],
)
def test_matches_composition(backend, rng, channels, act, inputs, frames, pad, dilation):
    x = [torch.randn(1, frames, channels, generator=rng) * 3 for _ in range(inputs)]
    options = {"act": act, "slope": 0.1, "scale": 1 / inputs, "pad": pad, "dilation": dilation}
    if act == "snake":
        options["alpha"] = torch.rand(channels, generator=rng) * 4 + 0.01
    actual = ops.conv_frames(x, **options)
    assert actual.shape == (dilation, -(-(frames + sum(pad)) // dilation), channels)
    assert_close(actual, ops.conv_frames_torch(x, **options))


def test_reads_phases_and_strided_frames(backend, rng):
    """Frames in phases, in the midst of memory that must not be read."""
    wide = torch.full((5, 9, 12), float("nan"))
    wide[1:4, :4, 3:11] = torch.randn(3, 4, 8, generator=rng)
    x = wide[1:4, :4, 3:11]
    in_order = x.transpose(0, 1).flatten(0, 1)[:11]
    for options in ({"pad": (1, 2)}, {"act": "leaky", "slope": 0.5, "dilation": 2}):
        actual = ops.conv_frames(x, 11, **options)
        assert_close(actual, ops.conv_frames_torch(in_order[None], **options))


def test_large_snakes(backend):
    """Angles of hundreds of radians, against float64."""
    x = torch.linspace(-300, 300, 4096).view(1, 64, 64)
    alpha = torch.linspace(0.5, 3, 64)
    wave = (x * alpha).double()  # the product is rounded to fp32 in the contract's order too
    expected = x + wave.sin().square() / (alpha.double() + 1e-9)
    assert_close(ops.conv_frames(x, act="snake", alpha=alpha), expected.float())


def test_not_a_number_stays(backend):
    x = torch.full((1, 1, 4), float("nan"))
    for act in (None, "leaky", "snake"):
        alpha = torch.ones(4) if act == "snake" else None
        assert ops.conv_frames(x, act=act, alpha=alpha, slope=0.1).isnan().all()


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (7, 1), (3, 3), (11, 5), (1, 1)])
@pytest.mark.parametrize("frames", [1, 4, 29])
def test_dilated_convolution(backend, rng, kernel, dilation, frames):
    x, residual = torch.randn(1, frames, 12, generator=rng), torch.randn(1, frames, 20, generator=rng)
    weight, bias = torch.randn(20, 12, kernel, generator=rng) * 0.1, torch.randn(20, generator=rng)
    conv = Conv1d(Given(weight=weight, bias=bias), "c", 12, 20, kernel)
    pad = tuple(dilation * side for side in conv.pad)
    phases = conv(ops.conv_frames(x, pad=pad, dilation=dilation), padded=True)
    actual = ops.conv_frames(phases, frames)
    expected = torch.nn.functional.conv1d(x.mT, weight, bias, padding=pad[0], dilation=dilation).mT
    assert_close(actual, expected)
    if dilation == 1:
        assert_close(conv(x, residual=residual), expected + residual)


@pytest.mark.parametrize(("kernel", "stride"), [(16, 8), (11, 5), (7, 3), (4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_transposed_convolution(backend, rng, kernel, stride, batch):
    x = torch.randn(batch, 6, 8, generator=rng)
    weight, bias = torch.randn(8, 5, kernel, generator=rng) * 0.1, torch.randn(5, generator=rng)
    conv = ConvTranspose1d(Given(weight=weight, bias=bias), "c", 8, 5, stride, kernel)
    expected = torch.nn.functional.conv_transpose1d(
        x.mT, weight, bias, stride=stride, padding=(kernel - stride) // 2
    ).mT
    assert_close(conv(x), expected)
    assert conv(x).shape == (batch, 6 * stride, 5)
    if batch == 1:
        assert torch.equal(conv(ops.conv_frames(x, pad=conv.pad), padded=True), conv(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "tanh"}, "expected act None, 'leaky' or 'snake', got 'tanh'"),
        ({"act": "snake"}, "alpha belongs to snake"),
        ({"alpha": torch.ones(4)}, "alpha belongs to snake"),
        ({"act": "snake", "alpha": torch.ones(3)}, "alpha: expected shape"),
        ({"pad": (-1, 0)}, "padding of 0 or more"),
        ({"dilation": 0}, "a dilation of 1 or more"),
        ({"frames": 3}, "expected at most the 2 frames of x, got 3"),
        ({"frames": -1}, "expected at most the 2 frames of x, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ops.conv_frames(torch.zeros(1, 2, 4), **options)


def test_bad_inputs():
    x = torch.zeros(1, 2, 4)
    for inputs, message in [
        ([], "expected tensors"),
        ([x] * 4, "expected 1 to 3 tensors, got 4"),
        ([x, torch.zeros(1, 3, 4)], "x: expected shape"),
        ([x, torch.zeros(1, 2, 8)[:, :, :4]], "inputs of the same strides"),
        ([x.bfloat16()], "x: expected float32"),
        ([x[0]], "expected tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.conv_frames(inputs)
