"""The vocoder's excitation (contract: csrc/ops/sine_source/sine_source.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ming_rt.ops._native import kernels, on_device


def sine_source(
    f0: Tensor,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor,
    rate: int,
    *,
    amplitude: float,
    sigma: float,
    threshold: float,
    interpolated: bool,
    phase: Tensor | None = None,
    return_sines: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``tanh(bias + sum of weight * sine)`` over the harmonics of a fundamental that is given per frame.

    Frames above ``threshold`` are voiced: sines of ``amplitude`` with noise of ``sigma``; in the others there
    is noise of ``amplitude / 3`` alone.

    Args:
        f0: Hz of each frame, float32 [T].
        noise: standard normal, float32 [H, samples], samples a multiple of T; harmonic h has frequency
            ``(h + 1) * f0``.
        weight, bias: float32 [H] and [1].
        rate: samples per second.
        interpolated: the phase is interpolated between the middles of the frames (v1.5); otherwise each
            sample adds its frame's frequency (preview, v1).
        phase: radians at the beginning, float32 [H]; None: 0.
        return_sines: also give the weighted sum's terms.

    Returns:
        The source, float32 [samples], and the sines with their noise, [H, samples], or None.

    Raises:
        ValueError: wrong dtype or shape, samples that do not divide into the frames.
    """
    source = torch.empty(noise.shape[-1], dtype=torch.float32, device=f0.device)
    sines = torch.empty_like(noise) if return_sines else None
    workspace = None
    if on_device(f0):
        workspace = torch.empty(8 * f0.numel() * noise.shape[0], dtype=torch.uint8, device=f0.device)
    kernels(f0).sine_source(
        f0,
        noise,
        phase,
        weight,
        bias,
        rate,
        amplitude,
        sigma,
        threshold,
        interpolated,
        source,
        sines,
        workspace,
    )
    return source, sines


def sine_source_torch(
    f0: Tensor,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor,
    rate: int,
    *,
    amplitude: float,
    sigma: float,
    threshold: float,
    interpolated: bool,
    phase: Tensor | None = None,
    return_sines: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``sine_source`` as a plain torch composition."""
    harmonics, samples = noise.shape
    hop = samples // len(f0)
    multiples = torch.arange(1, harmonics + 1, device=f0.device)[:, None]
    steps = (f0 * multiples / rate).double()
    if interpolated:
        ends = hop * steps.cumsum(1)[None]
        turns = torch.nn.functional.interpolate(ends, scale_factor=hop, mode="linear")[0]
    else:
        turns = steps.repeat_interleave(hop, 1).cumsum(1)
    angles = (turns % 1).float() * (2 * math.pi)
    if phase is not None:
        angles = angles + phase[:, None]
    voiced = (f0 > threshold).repeat_interleave(hop).float()
    gain = sigma * voiced + amplitude / 3 * (1 - voiced)
    sines = amplitude * angles.sin() * voiced + gain * noise
    source = torch.tanh(bias + weight @ sines)
    return source, sines if return_sines else None
