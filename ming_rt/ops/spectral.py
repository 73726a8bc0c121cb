"""Audio front-ends: resampling and the two mel spectrograms (contract: csrc/ops/spectral/spectral.h)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from ming_rt.ops._native import cpu

SAMPLE_RATE = 16000
FRAME = 400  # samples of one analysis frame: 25 ms
HOP = 160  # samples between frames: 10 ms
MEL_FLOOR = 1e-10
FBANK_FLOOR = 1.1920928955078125e-07
_PRE_EMPHASIS = 0.97
_SINC_WIDTH = 6  # zero crossings of the resampler's sinc
_ROLLOFF = 0.99


def _ratio(rate: int, new_rate: int) -> tuple[int, int, float]:
    """Input step o, output phases n and the low-pass frequency b of a rate change."""
    if rate < 1 or new_rate < 1:
        raise ValueError(f"resample: expected positive rates, got {rate} and {new_rate}")
    g = math.gcd(rate, new_rate)
    o, n = rate // g, new_rate // g
    return o, n, _ROLLOFF * min(o, n)


def _sinc_window(t: np.ndarray) -> np.ndarray:
    """Hann-windowed sinc at t in units of its zero crossings; 0 from 6 on."""
    t = np.clip(t, -_SINC_WIDTH, _SINC_WIDTH)
    return np.sinc(t) * np.cos(np.pi * t / (2 * _SINC_WIDTH)) ** 2


def _phases(n: int) -> np.ndarray:
    """Positions p/n of the output phases, which the original implementation rounds to float32."""
    return (np.arange(n) / n).astype(np.float32).astype(np.float64)


@lru_cache(maxsize=4)
def _polyphase(rate: int, new_rate: int) -> tuple[Tensor, Tensor, int]:
    """First input index int32 [n] (may be negative), float32 weights [n, taps] and the step."""
    o, n, b = _ratio(rate, new_rate)
    reach = _SINC_WIDTH * o / b
    centre = _phases(n) * o
    first = np.ceil(centre - reach).astype(np.int64)
    taps = -(-(int(2 * reach) + 1) // 16) * 16
    t = (first[:, None] + np.arange(taps) - centre[:, None]) * (b / o)
    weight = np.where(np.abs(t) < _SINC_WIDTH, _sinc_window(t) * (b / o), 0.0)
    return torch.from_numpy(first.astype(np.int32)), torch.from_numpy(weight.astype(np.float32)), o


def resample(wave: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Changes the sample rate with a Hann-windowed sinc (6 zero crossings, roll-off 0.99).

    Args:
        wave: [n] float32.
        rate, new_rate: Hz.

    Returns:
        [ceil(n * new_rate / rate)] float32; the wave itself when the rates are equal.
    """
    if rate == new_rate:
        return wave
    first, weight, step = _polyphase(rate, new_rate)
    phases, taps = weight.shape
    count = -(-len(wave) * phases // step)
    left = max(0, -int(first.min()))
    right = (count - 1) // phases * step + int(first.max()) + taps - len(wave)
    y = torch.empty(count)
    if count:
        # In numpy: torch would wake its own threads for this copy, and they spin on a core for milliseconds.
        padded = np.pad(wave.numpy(), (left, max(0, right)))
        cpu.resample(torch.from_numpy(padded), y, first + left, weight, step)
    return y


def resample_torch(wave: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """``resample`` as a plain torch composition: a strided convolution with one output channel per phase."""
    if rate == new_rate:
        return wave
    o, n, b = _ratio(rate, new_rate)
    width = math.ceil(_SINC_WIDTH * o / b)
    k = np.arange(-width, width + o) / o
    kernel = _sinc_window((k - _phases(n)[:, None]) * b) * (b / o)
    weight = torch.from_numpy(kernel.astype(np.float32))[:, None]
    y = conv1d(pad(wave, (width, width + o))[None, None], weight, stride=o)
    return y[0].T.reshape(-1)[: -(-len(wave) * n // o)]


def hz_to_mel(f: np.ndarray | float) -> np.ndarray:
    """The Slaney mel scale: linear below 1 kHz, logarithmic above."""
    f = np.asarray(f, np.float64)
    return np.where(f < 1000, f * 3 / 200, 15 + 27 * np.log(np.maximum(f, 1000) / 1000) / np.log(6.4))


def mel_to_hz(m: np.ndarray) -> np.ndarray:
    """Inverse of ``hz_to_mel``."""
    return np.where(m < 15, m * 200 / 3, 1000 * np.exp((np.maximum(m, 15) - 15) * np.log(6.4) / 27))


@lru_cache(maxsize=8)
def mel_filters(n_mels: int = 128) -> Tensor:
    """Slaney mel filters [n_mels, 201] float32 of a 400-point DFT at 16 kHz, each of unit area."""
    edges = mel_to_hz(np.linspace(0, hz_to_mel(SAMPLE_RATE / 2), n_mels + 2))
    f = np.arange(FRAME // 2 + 1) * SAMPLE_RATE / FRAME
    rise = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(np.minimum(rise, fall), 0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters.astype(np.float32))


@lru_cache(maxsize=8)
def fbank_filters(n_mels: int = 80) -> Tensor:
    """Kaldi mel filters [n_mels, 257] float32 of a 512-point DFT at 16 kHz: triangles in mel, 20..8000 Hz.

    Mel values are rounded to float32 as in the original, which moves narrow filters by up to 3e-4.
    """
    low, high = (1127 * math.log(1 + f / 700) for f in (20, SAMPLE_RATE / 2))
    step = (high - low) / (n_mels + 1)
    left = low + torch.arange(n_mels, dtype=torch.float32)[:, None] * step
    centre, right = (
        low + (torch.arange(n_mels, dtype=torch.float32)[:, None] + k) * step for k in (1.0, 2.0)
    )
    mel = 1127 * (1 + torch.arange(256, dtype=torch.float32) * (SAMPLE_RATE / 512) / 700).log()
    filters = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return pad(filters, (0, 1)).contiguous()


@lru_cache(maxsize=4)
def _window(kind: str) -> Tensor:
    i = np.arange(FRAME)
    if kind == "hann":  # periodic
        w = 0.5 - 0.5 * np.cos(2 * np.pi * i / FRAME)
    else:  # Hamming, symmetric
        w = 0.54 - 0.46 * np.cos(2 * np.pi * i / (FRAME - 1))
    return torch.from_numpy(w.astype(np.float32))


def _check_wave(op: str, wave: Tensor, least: int) -> None:
    if wave.dim() != 1 or wave.dtype != torch.float32 or len(wave) < least:
        raise ValueError(f"{op}: wave: expected float32 [n >= {least}], got {wave.dtype} {list(wave.shape)}")


def log_mel(wave: Tensor, n_mels: int = 128) -> Tensor:
    """Whisper's log-mel spectrogram.

    Args:
        wave: [n] float32 at 16 kHz, n > 200.
        n_mels: number of mel bands.

    Returns:
        [n // 160, n_mels] float32; values depend on the loudest one of the whole wave.
    """
    _check_wave("log_mel", wave, FRAME // 2 + 1)
    out = torch.empty(len(wave) // HOP, n_mels)
    cpu.log_mel(wave.contiguous(), out, _window("hann"), mel_filters(n_mels), MEL_FLOOR)
    return out


def log_mel_torch(wave: Tensor, n_mels: int = 128) -> Tensor:
    """``log_mel`` as a plain torch composition."""
    _check_wave("log_mel", wave, FRAME // 2 + 1)
    spectrum = torch.stft(wave, FRAME, HOP, window=_window("hann"), return_complex=True)[:, :-1]
    energy = mel_filters(n_mels) @ spectrum.abs().square()
    m = energy.clamp(min=MEL_FLOOR).log10()
    m = m.clamp(min=m.max() - 8)
    return ((m + 4) / 4).T.contiguous()


def fbank(wave: Tensor, n_mels: int = 80) -> Tensor:
    """Kaldi's log mel filter bank (Hamming window, no dither, no energy column).

    Args:
        wave: [n] float32 at 16 kHz in -1..1, n >= 400.
        n_mels: number of mel bands.

    Returns:
        [1 + (n - 400) // 160, n_mels] float32.
    """
    _check_wave("fbank", wave, FRAME)
    out = torch.empty(1 + (len(wave) - FRAME) // HOP, n_mels)
    cpu.fbank(wave.contiguous(), out, _window("hamming"), fbank_filters(n_mels), FBANK_FLOOR)
    return out


def fbank_torch(wave: Tensor, n_mels: int = 80) -> Tensor:
    """``fbank`` as a plain torch composition."""
    _check_wave("fbank", wave, FRAME)
    x = (wave * 32768).unfold(0, FRAME, HOP)
    x = x - x.mean(1, keepdim=True)
    x = x - _PRE_EMPHASIS * torch.cat([x[:, :1], x[:, :-1]], 1)
    spectrum = torch.fft.rfft(x * _window("hamming"), 512)
    return (spectrum.abs().square() @ fbank_filters(n_mels).T).clamp(min=FBANK_FLOOR).log()


def _lfr_rows(frames: Tensor, cmvn: Tensor, stack: int, stride: int) -> int:
    if frames.dim() != 2 or not len(frames) or cmvn.shape != (2, stack * frames.shape[1]):
        raise ValueError(
            f"lfr_cmvn: expected frames [T >= 1, D] and cmvn [2, {stack} * D], "
            f"got {list(frames.shape)} and {list(cmvn.shape)}"
        )
    return -(-len(frames) // stride)


def lfr_cmvn(frames: Tensor, cmvn: Tensor, stack: int = 7, stride: int = 6) -> Tensor:
    """Stacks ``stack`` frames every ``stride`` frames (edges repeated) and normalises the result.

    Args:
        frames: [T, D] float32.
        cmvn: [2, stack * D] float32: the shift to add, then the scale to multiply by.

    Returns:
        [ceil(T / stride), stack * D] float32.
    """
    rows = _lfr_rows(frames, cmvn, stack, stride)
    out = torch.empty(rows, cmvn.shape[1])
    cpu.lfr_cmvn(frames.contiguous(), cmvn[0].contiguous(), cmvn[1].contiguous(), out, stack, stride)
    return out


def lfr_cmvn_torch(frames: Tensor, cmvn: Tensor, stack: int = 7, stride: int = 6) -> Tensor:
    """``lfr_cmvn`` as a plain torch composition."""
    rows = _lfr_rows(frames, cmvn, stack, stride)
    index = torch.arange(rows)[:, None] * stride + torch.arange(stack) - (stack - 1) // 2
    stacked = frames[index.clamp(0, len(frames) - 1)].reshape(rows, -1)
    return (stacked + cmvn[0]) * cmvn[1]
