"""Recordings: decoding, 16 kHz mono, log-mel and filter-bank features, and how many tokens they become."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from ming_rt.errors import ConfigError, InvalidMediaError, shown
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.source import as_numpy, check_options, resolve
from ming_rt.ops import spectral as ops

SAMPLE_RATE = ops.SAMPLE_RATE
MIN_RATE, MAX_RATE = 1000, 384000
_BLOCK = 1 << 20  # samples of all channels decoded at a time
_MAX_CMVN_BYTES = 1 << 20
_MAX_CHUNKS = 1000  # of a WAV file before its samples
_STREAMED_WAV = 0x7FFF0000  # data lengths from here on are placeholders of writers that could not seek


def load_audio(
    obj: object,
    *,
    sample_rate: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    **unknown: Any,
) -> np.ndarray:
    """One recording as 16 kHz mono.

    Channel 0 is taken, channels are not averaged. Integer samples are divided by 2^7, 2^15, 2^31 or 2^63.

    Args:
        obj: path, ``file://`` URL, bytes, ``data:audio/...;base64,`` URL (any format of libsndfile), a numpy
            or torch array [samples] or [channels, samples], or a pair (array, sample rate).
        sample_rate: of an array; default 16000. A file has its own.
        limits: the length is compared with ``max_audio_seconds`` before more than that is decoded.

    Returns:
        float32 [n] at 16 kHz.

    Raises:
        InvalidMediaError: malformed, truncated, empty, too long, of an odd rate, or with samples that are not
            finite.
        InvalidRequestError: an unknown option.
        UnsupportedError: an http(s) URL.
    """
    check_options(unknown, (), "audio")
    if isinstance(obj, (tuple, list)):
        if len(obj) != 2 or not isinstance(obj[0], (np.ndarray, torch.Tensor)):
            raise InvalidMediaError("audio: expected a pair (array, sample rate), a path, bytes or an array")
        obj, sample_rate = obj
    obj = as_numpy(obj, "audio")
    if isinstance(obj, np.ndarray):
        rate = _check_rate(SAMPLE_RATE if sample_rate is None else sample_rate)
        wave = _from_array(obj, rate, limits)
    else:
        source = resolve(obj, "audio", limits)
        if source is None:
            raise InvalidMediaError(
                f"audio: found {type(obj).__name__}, expected a path, bytes, data URL or array"
            )
        wave, rate = _decode(source, limits)
        if sample_rate is not None and _check_rate(sample_rate) != rate:
            raise InvalidMediaError(f"audio: found a file of {rate} Hz, expected {sample_rate} Hz as given")
    if not len(wave):
        raise InvalidMediaError("audio: found no samples")
    if not np.isfinite(wave).all():
        raise InvalidMediaError("audio: found samples that are NaN or infinite")
    return ops.resample(torch.from_numpy(wave), rate).numpy()


def _check_rate(rate: object) -> int:
    if (
        isinstance(rate, bool)
        or not isinstance(rate, (int, float, np.integer, np.floating))
        or not MIN_RATE <= rate <= MAX_RATE
        or rate != int(rate)
    ):
        raise InvalidMediaError(
            f"audio: found sample rate {shown(rate)}, expected a whole number from {MIN_RATE} to {MAX_RATE}"
        )
    return int(rate)


def _too_long(limits: Limits) -> InvalidMediaError:
    return InvalidMediaError(f"audio: expected at most {limits.max_audio_seconds:g} s")


def _from_array(array: np.ndarray, rate: int, limits: Limits) -> np.ndarray:
    if array.ndim < 1 or 0 in array.shape:
        raise InvalidMediaError(
            f"audio: found shape {list(array.shape)}, expected [samples] or [channels, samples]"
        )
    while array.ndim > 1:
        array = array[0]
    if len(array) > limits.max_audio_seconds * rate:
        raise _too_long(limits)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return np.ascontiguousarray(array, np.float32)
    if array.dtype.kind != "i":
        raise InvalidMediaError(f"audio: found {array.dtype} samples, expected floats or signed integers")
    return array.astype(np.float32) / np.float32(2.0 ** (8 * array.dtype.itemsize - 1))


class _Bytes(io.BytesIO):
    """Damaged files make libsndfile seek before the start, from where an exception could not be caught."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(max(offset, 0) if whence == io.SEEK_SET else offset, whence)


def _decode(source: Path | bytes, limits: Limits) -> tuple[np.ndarray, int]:
    """Channel 0 of a file as float32 and its rate."""
    try:
        opened = _Bytes(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise InvalidMediaError(f"audio: the file cannot be read ({error.strerror})") from error
    with opened as stream:
        _check_riff(stream)
        try:
            with soundfile.SoundFile(stream if isinstance(source, bytes) else str(source)) as file:
                rate = _check_rate(file.samplerate)
                most = int(limits.max_audio_seconds * rate)
                if 0 < file.frames < 1 << 62 and file.frames > most:
                    raise _too_long(limits)
                parts, total = [], 0
                for block in file.blocks(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True):
                    parts.append(block[:, 0].copy())
                    if (total := total + len(block)) > most:
                        raise _too_long(limits)
                if total < file.frames < 1 << 62:
                    raise InvalidMediaError(f"audio: truncated file, found {total} of {file.frames} samples")
        except InvalidMediaError:
            raise
        except Exception as error:  # whatever a codec raises on hostile bytes
            raise InvalidMediaError("audio: malformed file, or of a format that is not supported") from error
    return np.concatenate(parts) if parts else np.empty(0, np.float32), rate


def _check_riff(stream: io.BufferedIOBase) -> None:
    """A WAV file must hold the samples its header declares; libsndfile would quietly return fewer."""
    head = stream.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        end = stream.seek(0, io.SEEK_END)
        at = 12
        for _ in range(_MAX_CHUNKS):
            stream.seek(at)
            if at + 8 > end:
                break
            chunk = stream.read(8)
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                if at + 8 + size > end and size < _STREAMED_WAV:
                    raise InvalidMediaError(f"audio: truncated file, found {end - at - 8} of {size} bytes")
                break
            at += 8 + size + (size & 1)
    stream.seek(0)


def log_mel_features(wave: np.ndarray, n_mels: int = 128) -> np.ndarray:
    """Whisper's log-mel spectrogram of a 16 kHz wave [n]: float32 [n // 160, n_mels].

    Raises InvalidMediaError for 200 samples (12.5 ms) or fewer.
    """
    if len(wave) <= ops.FRAME // 2:
        raise InvalidMediaError(
            f"audio: found {len(wave)} samples at 16 kHz, expected more than {ops.FRAME // 2}"
        )
    return ops.log_mel(torch.from_numpy(wave), n_mels).numpy()


def fbank_features(wave: np.ndarray, cmvn: np.ndarray, stack: int = 7, stride: int = 6) -> np.ndarray:
    """Stacked, normalised filter-bank frames of a 16 kHz wave [n]: float32 [ceil(frames / 6), 560].

    ``cmvn`` float32 [2, 560] comes from ``load_cmvn``. Raises InvalidMediaError for fewer than 400 samples.
    """
    if len(wave) < ops.FRAME:
        raise InvalidMediaError(f"audio: found {len(wave)} samples at 16 kHz, expected at least {ops.FRAME}")
    frames = ops.fbank(torch.from_numpy(wave))
    return ops.lfr_cmvn(frames, torch.from_numpy(cmvn), stack, stride).numpy()


def load_cmvn(path: str | Path, width: int = 560) -> np.ndarray:
    """Reads a normalisation file (Kaldi nnet text): float32 [2, width], the shift to add and the scale.

    Raises:
        ConfigError: missing, larger than 1 MiB, or not of that form.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_CMVN_BYTES:
            raise ConfigError(f"{path.name}: expected at most {_MAX_CMVN_BYTES} bytes")
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: cannot be read as text") from error
    rows = []
    for tag in ("<AddShift>", "<Rescale>"):
        at = [i for i, line in enumerate(lines) if line.split()[:1] == [tag]]
        if len(at) != 1 or lines[at[0]].split()[1:] != [str(width)] * 2 or at[0] + 1 >= len(lines):
            raise ConfigError(
                f"{path.name}: expected one line '{tag} {width} {width}' followed by its values"
            )
        tokens = lines[at[0] + 1].split()
        if tokens[:1] != ["<LearnRateCoef>"] or tokens[2:3] != ["["] or tokens[-1:] != ["]"]:
            raise ConfigError(f"{path.name}: expected '<LearnRateCoef> 0 [ ... ]' after {tag}")
        try:
            row = np.array([float(token) for token in tokens[3:-1]], np.float32)
        except ValueError as error:
            raise ConfigError(f"{path.name}: a value of {tag} is not a number") from error
        if len(row) != width or not np.isfinite(row).all():
            raise ConfigError(f"{path.name}: found {len(row)} values of {tag}, expected {width} finite ones")
        rows.append(row)
    return np.stack(rows)


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz of a recording of ``samples`` at ``rate`` Hz."""
    return -(-samples * SAMPLE_RATE // rate)


def mel_frames(samples: int) -> int:
    """Log-mel frames of ``samples`` at 16 kHz."""
    return samples // ops.HOP


def fbank_frames(samples: int) -> int:
    """Filter-bank frames of ``samples`` at 16 kHz, before stacking."""
    return max(0, 1 + (samples - ops.FRAME) // ops.HOP)


def lfr_frames(frames: int, stride: int = 6) -> int:
    """Stacked frames of ``frames`` filter-bank frames."""
    return math.ceil(frames / stride)


def projector_tokens(length: int, kernel: int, stride: int) -> int:
    """Tokens the audio projector's convolution makes of ``length`` encoder outputs."""
    return (length - kernel + 2 * (kernel // 2)) // stride + 1


def whisper_tokens(frames: int, kernel: int = 3, stride: int = 2) -> int:
    """Tokens of ``frames`` log-mel frames: the encoder's second convolution and the projector halve them."""
    return projector_tokens((frames - 1) // 2 + 1, kernel, stride)
