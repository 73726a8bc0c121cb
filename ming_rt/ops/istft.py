"""Short-time Fourier transforms with few bins (contract: csrc/ops/spectral/istft.h)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ming_rt.ops._native import kernels
from ming_rt.ops.gemm import linear
from ming_rt.ops.packed import PackedWeight, pack_weight

MAX_SIZE = 64  # of the transform: both directions are matrix products


@dataclass(frozen=True, eq=False)
class Stft:
    """A transform of ``size`` samples every ``hop``, with a periodic Hann window, on one device.

    ``forward`` is ``[2 bins, size]`` (real rows, then imaginary), ``basis`` its inverse ``[size, 2 bins]``,
    both with the window.
    """

    size: int
    hop: int
    window: Tensor
    basis: Tensor
    forward: PackedWeight

    @classmethod
    def make(cls, size: int, hop: int, device: torch.device | str = "cpu") -> Stft:
        """The tables on ``device`` (meta: sizes only).

        Raises:
            ValueError: a size other than an even number of 2..64, a hop other than an eighth to a half of it.
        """
        if size % 2 or not 2 <= size <= MAX_SIZE or not size <= 8 * hop <= 4 * size:
            raise ValueError(
                f"stft: expected an even size of 2..{MAX_SIZE} and a hop of an eighth to a half of it, got "
                f"{size} and {hop}"
            )
        samples, bins = np.arange(size), np.arange(size // 2 + 1)
        angle = 2 * np.pi / size * (samples[:, None] * bins % size)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * samples / size)
        transform = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1) * window[:, None]
        share = np.where((bins == 0) | (bins == size // 2), 1, 2) / size  # of a bin and its mirror image

        def tensor(values: np.ndarray) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        forward = pack_weight(tensor(np.ascontiguousarray(transform.T)), torch.float32)
        return cls(size, hop, tensor(window), tensor(transform * np.concatenate([share, share])), forward)


def stft(wave: Tensor, plan: Stft) -> Tensor:
    """Spectra of the frames around every ``hop``-th sample; the wave is reflected at its ends.

    Args:
        wave: float32 [L], L > size / 2.

    Returns:
        [L // hop + 1, 2 bins] float32: real parts, then imaginary parts.
    """
    half = plan.size // 2
    padded = torch.nn.functional.pad(wave[None], (half, half), mode="reflect")[0]
    frames = len(wave) // plan.hop + 1
    return linear(padded.as_strided((frames, plan.size), (plan.hop, 1)), plan.forward)


def stft_torch(wave: Tensor, plan: Stft) -> Tensor:
    """``stft`` as a plain torch composition."""
    spectrum = torch.stft(wave, plan.size, plan.hop, window=plan.window, return_complex=True)
    return torch.cat([spectrum.real, spectrum.imag]).t().contiguous()


def istft(
    x: Tensor, plan: Stft, *, limit: float, bound: float = float("inf"), log_sine: bool = False
) -> Tensor:
    """The wave whose frames have the given magnitudes, at most ``limit``, and phases.

    Args:
        x: float32 [F, 2 bins]: magnitudes, then phases in radians; ``log_sine``: logarithms of the
            magnitudes, then values whose sines are the phases.
        bound: the wave is cut off at plus and minus this.

    Returns:
        [(F - 1) * hop] float32.

    Raises:
        ValueError: wrong dtype or shape.
    """
    wave = torch.empty(max(0, len(x) - 1) * plan.hop, dtype=torch.float32, device=x.device)
    kernels(x).istft(x.contiguous(), plan.basis, plan.window, plan.hop, limit, bound, log_sine, wave)
    return wave


def istft_torch(
    x: Tensor, plan: Stft, *, limit: float, bound: float = float("inf"), log_sine: bool = False
) -> Tensor:
    """``istft`` as a plain torch composition."""
    magnitude, phase = x.t().chunk(2)
    if log_sine:
        magnitude, phase = magnitude.exp(), phase.sin()
    spectrum = torch.polar(magnitude.clamp(max=limit), phase)
    return torch.istft(spectrum, plan.size, plan.hop, window=plan.window).clamp(-bound, bound)
