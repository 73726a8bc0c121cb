"""Recordings: every accepted form and rate, features, lengths, the normalisation file, and hostile files."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile
import torch
from tolerances import assert_close

from ming_rt import ops
from ming_rt.errors import ConfigError, InvalidMediaError, InvalidRequestError, UnsupportedError
from ming_rt.inputs import audio
from ming_rt.inputs.limits import Limits


def sound(n=8000, channels=1, seed=0) -> np.ndarray:
    """[n, channels] of multiples of 1/32768, so that 16-bit files are exact."""
    return np.random.default_rng(seed).integers(-30000, 30000, (n, channels)).astype(np.float32) / 32768


def encoded(samples: np.ndarray, rate=16000, fmt="WAV", subtype=None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=fmt, subtype=subtype)
    return out.getvalue()


def test_every_form_gives_the_same_wave(tmp_path):
    wave = sound()[:, 0]
    data = encoded(sound())
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    forms = [
        path,
        str(path),
        f"file://{path}",
        data,
        "data:audio/wav;base64," + base64.b64encode(data).decode(),
        wave,
        wave.astype(np.float64),
        torch.from_numpy(wave),
        (wave, 16000),
        [torch.from_numpy(wave)[None], 16000.0],
    ]
    for form in forms:
        loaded = audio.load_audio(form)
        assert loaded.dtype == np.float32
        assert np.array_equal(loaded, wave)
    assert np.array_equal(audio.load_audio(wave, sample_rate=16000), wave)


@pytest.mark.parametrize(
    ("fmt", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")],
)
def test_lossless_files(fmt, subtype):
    assert np.array_equal(audio.load_audio(encoded(sound(), fmt=fmt, subtype=subtype)), sound()[:, 0])


def test_eight_bit_files_are_centred():
    data = encoded(np.round(sound() * 128) / 128, subtype="PCM_U8")
    raw = np.frombuffer(data[-8000:], np.uint8).astype(np.float32)
    assert np.array_equal(audio.load_audio(data), (raw - 128) / 128)


@pytest.mark.parametrize(("fmt", "subtype"), [("OGG", "VORBIS"), ("MP3", None)])
def test_lossy_files(fmt, subtype):
    t = np.arange(16000) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    loaded = audio.load_audio(encoded(tone, fmt=fmt, subtype=subtype))
    assert abs(np.abs(np.fft.rfft(loaded[:16000])).argmax() - 440) <= 1


@pytest.mark.parametrize(
    ("dtype", "full"), [(np.int8, 2**7), (np.int16, 2**15), (np.int32, 2**31), (np.int64, 2**63)]
)
def test_integer_arrays_are_scaled(dtype, full):
    values = np.array([-full, 0, full // 2], dtype).repeat(200)
    expected = np.array([-1.0, 0.0, 0.5], np.float32).repeat(200)
    assert np.array_equal(audio.load_audio(values), expected)
    assert np.array_equal(audio.load_audio(torch.from_numpy(values)), expected)


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channel_zero_is_taken(channels):
    samples = sound(channels=channels)
    assert np.array_equal(audio.load_audio(encoded(samples)), samples[:, 0])
    assert np.array_equal(audio.load_audio(samples.T), samples[:, 0])
    assert np.array_equal(audio.load_audio(samples.T[None]), samples[:, 0])


@pytest.mark.parametrize("rate", [1000, 8000, 22050, 44100, 48000, 96000, 192000, 384000])
def test_rates(rate):
    wave = sound(rate // 10)[:, 0]
    expected = ops.resample_torch(torch.from_numpy(wave), rate)
    for form in (encoded(wave, rate), (wave, rate)):
        loaded = torch.from_numpy(audio.load_audio(form))
        assert len(loaded) == audio.resampled_length(len(wave), rate) == 1600
        assert_close(loaded, expected, "resample")


@pytest.mark.parametrize("rate", [0, -16000, 999, 384001, 16000.5, float("nan"), float("inf"), "16000", True])
def test_unusable_rates(rate):
    with pytest.raises(InvalidMediaError, match="sample rate"):
        audio.load_audio((sound()[:, 0], rate))


def test_a_file_keeps_its_rate():
    data = encoded(sound(), 8000)
    assert np.array_equal(audio.load_audio(data, sample_rate=8000), audio.load_audio(data))
    with pytest.raises(InvalidMediaError, match="8000 Hz, expected 16000"):
        audio.load_audio(data, sample_rate=16000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(bad):
    wave = sound()[:, 0].copy()
    wave[777] = bad
    for form in (wave, encoded(wave, subtype="FLOAT")):
        with pytest.raises(InvalidMediaError, match="NaN or infinite"):
            audio.load_audio(form)


@pytest.mark.parametrize(("fmt", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_truncated_files(fmt, subtype, share):
    data = encoded(sound(), fmt=fmt, subtype=subtype)
    with pytest.raises(InvalidMediaError, match=r"^audio: "):
        audio.load_audio(data[: int(len(data) * share)])


def test_streamed_wav_without_a_length():
    data = bytearray(encoded(sound()))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    assert np.array_equal(audio.load_audio(bytes(data)), sound()[:, 0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"RIFF\0\0\0\0WAVE",
        b"RIFF" + b"\xff" * 100,
        b"fLaC" + b"\xff" * 100,
        b"OggS" + b"\0" * 99,
    ],
)
def test_malformed_files(data):
    with pytest.raises(InvalidMediaError, match=r"^audio: "):
        audio.load_audio(data)


def test_empty_recordings():
    for form in (np.zeros(0, np.float32), np.zeros((1, 0), np.float32), encoded(np.zeros((0, 1)))):
        with pytest.raises(InvalidMediaError):
            audio.load_audio(form)


def test_long_recordings_are_refused_from_their_header(monkeypatch):
    limits = Limits(max_audio_seconds=0.4)
    data = encoded(sound())
    with pytest.raises(InvalidMediaError, match=r"at most 0\.4 s"):
        audio.load_audio(sound()[:, 0], limits=limits)
    assert len(audio.load_audio(data, limits=Limits(max_audio_seconds=0.5))) == 8000

    def blocks(*_, **__):
        raise AssertionError("decoded before the length was checked")

    monkeypatch.setattr(soundfile.SoundFile, "blocks", blocks)
    with pytest.raises(InvalidMediaError, match=r"at most 0\.4 s"):
        audio.load_audio(data, limits=limits)


@pytest.mark.parametrize(
    ("obj", "error"),
    [
        ("https://example.com/a.wav", UnsupportedError),
        ("no/such/file.wav", InvalidMediaError),
        ("data:image/png;base64,AAAA", InvalidMediaError),
        (7, InvalidMediaError),
        ([1, 2, 3], InvalidMediaError),
        ((sound(), 16000, 1), InvalidMediaError),
        (np.float32(1), InvalidMediaError),
        (np.array(1.0), InvalidMediaError),
        (np.zeros(500, np.uint8), InvalidMediaError),
        (np.zeros(500, bool), InvalidMediaError),
        (np.zeros(500, np.complex64), InvalidMediaError),
    ],
)
def test_unusable_objects(obj, error):
    with pytest.raises(error, match=r"^audio: "):
        audio.load_audio(obj)


def test_unknown_options():
    with pytest.raises(InvalidRequestError, match="unknown option language"):
        audio.load_audio(sound()[:, 0], language="en")


@pytest.mark.parametrize(("n", "mel", "stacked"), [(200, 0, 0), (201, 1, 0), (399, 2, 0), (400, 2, 1)])
def test_short_recordings(n, mel, stacked):
    wave, cmvn = sound(n)[:, 0], np.ones((2, 560), np.float32)
    features = [
        (mel, lambda: audio.log_mel_features(wave)),
        (stacked, lambda: audio.fbank_features(wave, cmvn)),
    ]
    for frames, call in features:
        if frames:
            assert len(call()) == frames
        else:
            with pytest.raises(InvalidMediaError, match=f"found {n} samples"):
                call()


@pytest.mark.parametrize(
    ("samples", "mel", "tokens", "fbank", "stacked"),
    [(201, 1, 1, 0, 0), (560, 3, 1, 2, 1), (16160, 101, 26, 99, 17), (2400000, 15000, 3750, 14998, 2500)],
)
def test_lengths(samples, mel, tokens, fbank, stacked):
    assert audio.mel_frames(samples) == mel
    assert audio.whisper_tokens(mel) == tokens
    assert audio.fbank_frames(samples) == fbank
    assert audio.lfr_frames(fbank) == stacked
    assert audio.projector_tokens(stacked, 1, 1) == stacked


def cmvn_text(shift, scale, width=560) -> str:
    rows = [" ".join(f"{v:.6f}" for v in row) for row in (shift, scale)]
    return (
        f"<Nnet> \n<Splice> {width} {width}\n[ 0 ]\n"
        f"<AddShift> {width} {width} \n<LearnRateCoef> 0 [ {rows[0]} ]\n"
        f"<Rescale> {width} {width}\n<LearnRateCoef> 0 [ {rows[1]} ]\n</Nnet> \n"
    )


def test_normalisation_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 560)).round(6).astype(np.float32)
    path = tmp_path / "any.mvn"
    path.write_text(cmvn_text(*values))
    assert np.array_equal(audio.load_cmvn(path), values)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "",
        lambda text: text.replace("<Rescale>", "<Other>"),
        lambda text: text + "<AddShift> 560 560\n",
        lambda text: text.replace("560 560", "559 560"),
        lambda text: text.replace("1.000000", "nan", 1),
        lambda text: text.replace("1.000000", "one", 1),
        lambda text: text.replace("1.000000", "", 1),
        lambda text: text.replace("]\n</Nnet>", "</Nnet>"),
        lambda text: text[: len(text) // 3],
        lambda text: text + "é",
        lambda text: text + " " * (1 << 20),
    ],
)
def test_malformed_normalisation_files(tmp_path, edit):
    path = tmp_path / "am.mvn"
    path.write_text(edit(cmvn_text(np.ones(560), np.ones(560))))
    with pytest.raises(ConfigError, match=r"^am\.mvn: "):
        audio.load_cmvn(path)
    with pytest.raises(ConfigError):
        audio.load_cmvn(tmp_path / "absent.mvn")
