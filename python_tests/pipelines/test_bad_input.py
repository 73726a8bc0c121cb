"""Hostile and broken requests to a running session: one typed error of one line, nothing else changes."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import ming_rt
from ming_rt.errors import CapacityError, InvalidMediaError, InvalidRequestError, MingError, UnsupportedError
from ming_rt.inputs import image
from ming_rt.inputs.limits import Limits

NAN, INF, HUGE = math.nan, math.inf, 10**5000


def nested(depth: int = 100_000) -> list:
    """A list in a list in a list ... deeper than any recursion limit."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


class NoRepr:
    """Fails when an error message tries to show it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


DEEP = nested()
WILD = {
    "negative": -1,
    "zero": 0,
    "one": 1,
    "true": True,
    "half": 0.5,
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "1e308": 1e308,
    "1e-320": 1e-320,
    "2^31": 2**31,
    "2^63": 2**63,
    "10^5000": HUGE,
    "-10^5000": -HUGE,
    "complex": 1j,
    "none": None,
    "text": "1",
    "long text": "x" * 10**6,
    "bytes": b"x",
    "list": [1],
    "dict": {"a": 1},
    "nested": DEEP,
    "object": object(),
    "no repr": NoRepr(),
    "float32 nan": np.float32("nan"),
    "int64": np.int64(3),
    "array": np.array([1, 2]),
    "tensor": torch.tensor([1.0, 2.0]),
    "function": len,
}


@pytest.fixture(scope="module")
def sessions(demo_model):
    """One small session per generation, loaded when first asked for."""
    loaded = {}

    def session(generation: str) -> ming_rt.Session:
        if generation not in loaded:
            loaded[generation] = ming_rt.load(
                demo_model(generation), dtype="float32", kv_bytes=32 << 20, max_model_len=2048
            )
        return loaded[generation]

    yield session
    for each in loaded.values():
        each.close()


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def medium(kind: str, value, **options) -> list[dict]:
    return user({"type": kind, kind: value, **options})


def answer(session, messages=None, **options) -> tuple[int, ...]:
    return session.chat(messages or user(), **{"max_tokens": 3, **options}).token_ids


class Checked:
    """A session that is asked a bad question; afterwards it must be as it was."""

    def __init__(self, session) -> None:
        self.session, self.expected = session, answer(session)

    def refuses(self, error: type[MingError], match: str, messages=None, **options) -> None:
        with pytest.raises(error, match=match) as caught:
            answer(self.session, messages, **options)
        self.unharmed()
        check_message(caught.value)

    def survives(self, messages=None, **options) -> None:
        """Either an answer or a typed error."""
        try:
            answer(self.session, messages, **options)
        except InvalidRequestError as error:
            check_message(error)
        except CapacityError as error:  # a legal request, but too long for this session
            assert "longest sequence" in str(error)  # noqa: PT017
        self.unharmed()

    def unharmed(self) -> None:
        stats = self.session.stats()
        assert (stats.kv_pages_used, stats.running, stats.waiting) == (0, 0, 0)
        assert answer(self.session) == self.expected


def check_message(error: MingError) -> None:
    text = str(error)
    assert len(text) < 320
    assert "\n" not in text
    assert not re.search(r"0x[0-9a-f]{5,}", text), "an address"


@pytest.fixture
def lite(sessions) -> Checked:
    return Checked(sessions("v1.5"))


@pytest.fixture
def sanm(sessions) -> Checked:
    return Checked(sessions("preview"))


@pytest.fixture
def flash(sessions) -> Checked:
    return Checked(sessions("flash"))


# Files.


def encoded(kind: str, size=(60, 40), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    picture = Image.effect_noise(size, 60).convert(mode)
    picture.save(out, kind, **({"save_all": True, "append_images": [picture]} if kind == "MPO" else {}))
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def wav(seconds=0.5, rate=16000, channels=1, form="WAV", subtype="PCM_16", spoil=None) -> bytes:
    out = io.BytesIO()
    wave = np.sin(np.arange(int(seconds * rate)) * (2000 / rate))[:, None] * np.full((1, channels), 0.3)
    if spoil is not None:
        wave[len(wave) // 2] = spoil
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


PNG, JPEG, WEBP, WAV = encoded("PNG"), encoded("JPEG"), encoded("WEBP"), wav()


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64," + base64.b64encode(data).decode()


def frames(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


BAD_IMAGES = {
    "empty": (b"", "not a readable"),
    "text": (b"no picture" * 50, "not a readable"),
    "PNG signature": (PNG[:8], "not a readable|malformed"),
    "PNG header": (PNG[:33], "malformed|not a readable"),
    "PNG half": (PNG[: len(PNG) // 2], "truncated"),
    "JPEG start": (JPEG[:20], "malformed|not a readable"),
    "JPEG half": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG last byte": (JPEG[:-2], "truncated"),
    "WebP half": (WEBP[: len(WEBP) // 2], "malformed|truncated|not a readable"),
    "bomb": (png_header(60000, 60000), "more pixels|at most"),
    "bomb below Pillow's": (png_header(9000, 9000), "81000000|9000x9000"),
    "largest header": (png_header(2**31 - 1, 2**31 - 1), "more pixels|at most"),
    "0x0 PNG": (png_header(0, 0), "malformed|not a readable|not empty"),
    "0x0": (frames(0, 0, 3), "0x0 pixels"),
    "0 wide": (frames(5, 0, 3), "0x5 pixels"),
    "1x10000": (frames(1, 10000, 3), "aspect ratio"),
    "10000x1": (frames(10000, 1, 3), "aspect ratio"),
    "float": (np.zeros((30, 30, 3)), "float64"),
    "NaN": (np.full((30, 30, 3), NAN, np.float32), "float32"),
    "bool": (np.zeros((30, 30), bool), "bool"),
    "two channels": (frames(30, 30, 2), r"\[30, 30, 2\]"),
    "one axis": (frames(30), r"\[30\]"),
    "objects": (np.array([None]), "object"),
    "bfloat16": (torch.zeros(30, 30, dtype=torch.bfloat16), "float32"),
    "meta": (torch.zeros(30, 30, dtype=torch.uint8, device="meta"), "dense"),
    "sparse": (torch.zeros(30, 30, dtype=torch.uint8).to_sparse(), "dense|sparse"),
    "number": (5, "found int"),
    "dict": ({"url": "x"}, "found dict"),
    "object": (object(), "found object"),
    "nested": (DEEP, "found list"),
    "empty list": ([], "empty list"),
    "list of nothing": ([None], "found NoneType"),
    "missing": ("/no/such/picture.png", "no file"),
    "no name": ("", "no file"),
    "zero byte": ("a\0b", "no file"),
    "endless name": ("x" * 10**6, "no file"),
    "directory": ("/", "no file"),
    "device": ("/dev/zero", "no file"),
    "data URL": ("data:", "another data URL"),
    "data URL of a sound": (data_url(WAV, "audio/wav"), "another data URL"),
    "data URL, no base64": ("data:image/png;base64,&&&&", "not valid base64"),
    "data URL, no picture": (data_url(b"abc", "image/png"), "not a readable"),
    "web address": ("http://127.0.0.1/x.png", "web address"),
    "web address in capitals": ("HTTPS://[::1]/x.png", "web address"),
    "other address": ("ftp://127.0.0.1/x.png", "no file"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(lite, case):
    value, match = BAD_IMAGES[case]
    lite.refuses(InvalidRequestError, match, medium("image", value))


GOOD_IMAGES = {
    **{kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "MPO")},
    **{f"PNG {mode}": encoded("PNG", mode=mode) for mode in ("1", "L", "P", "LA", "RGBA", "I;16")},
    **{f"JPEG {mode}": encoded("JPEG", mode=mode) for mode in ("L", "CMYK", "YCbCr")},
    "data URL": data_url(WEBP, "image/webp"),
    "1x1": frames(1, 1, 3),
    "1x200": frames(1, 200, 3),
    "grey": frames(31, 33),
    "RGBA": frames(31, 33, 4),
    "tensor": torch.zeros(31, 33, 3, dtype=torch.uint8),
    "PIL": Image.new("RGB", (33, 31)),
    "memoryview": memoryview(PNG),
}


@pytest.mark.parametrize("case", GOOD_IMAGES)
def test_unusual_images_are_answered(lite, case):
    assert answer(lite.session, medium("image", GOOD_IMAGES[case]))


def test_pillow_knows_every_format_by_the_name_we_use():
    """An unknown name would stop the search, and formats after it could not be read."""
    Image.init()
    assert set(image._FORMATS) <= set(Image.OPEN)


BAD_AUDIO = {
    "empty": (b"", "malformed"),
    "text": (b"no sound" * 50, "malformed"),
    "WAV signature": (WAV[:12], "malformed"),
    "WAV header": (WAV[:44], "truncated"),
    "WAV half": (WAV[: len(WAV) // 2], "truncated"),
    "WAV last byte": (WAV[:-1], "truncated"),
    "FLAC half": (wav(form="FLAC")[:1000], "malformed"),
    "OGG half": (wav(form="OGG", subtype="VORBIS")[:2000], "malformed|no samples|truncated"),
    "no samples": (wav(0.0), "no samples"),
    "a few samples": (np.zeros(200, np.float32), "expected more than 200"),
    "empty array": (np.zeros(0, np.float32), r"shape \[0\]"),
    "NaN": (wav(subtype="FLOAT", spoil=NAN), "NaN or infinite"),
    "infinite": (wav(subtype="DOUBLE", spoil=-INF), "NaN or infinite"),
    "overflow": (wav(subtype="DOUBLE", spoil=1e300), "NaN or infinite"),
    "NaN array": (np.full(16000, NAN), "NaN or infinite"),
    "overflowing array": (np.full(16000, 1e300), "NaN or infinite"),
    "NaN tensor": (torch.full((16000,), NAN, dtype=torch.bfloat16), "NaN or infinite"),
    "too long": (wav(301, 1000), "at most 300 s"),
    "too long array": (np.zeros(301 * 16000, np.float32), "at most 300 s"),
    "longer than the encoder": (np.zeros(61 * 16000, np.float32), "at most 60.0 s"),
    "unsigned": (np.zeros(16000, np.uint16), "uint16"),
    "complex": (np.zeros(16000, complex), "complex128"),
    "bool": (torch.zeros(16000, dtype=torch.bool), "bool"),
    "sparse": (torch.zeros(16000).to_sparse(), "dense"),
    "no axis": (np.array(1.0), "shape"),
    "triple": ((np.zeros(16000), 16000, 1), "pair"),
    "pair of numbers": ((1, 2), "pair"),
    "list": ([1.0, 2.0], "found a list"),
    "nested": (DEEP, "found a list"),
    "number": (0.5, "found float"),
    "missing": ("/no/such/sound.wav", "no file"),
    "picture": (PNG, "malformed"),
    "data URL of a picture": (data_url(PNG, "image/png"), "another data URL"),
    "web address": ("https://localhost/x.wav", "web address"),
    **{
        f"rate {name}": ((np.zeros(16000, np.float32), WILD[name]), "sample rate")
        for name in WILD
        if name not in ("none",)
    },
}


@pytest.mark.parametrize("case", BAD_AUDIO)
def test_bad_recordings(lite, case):
    value, match = BAD_AUDIO[case]
    lite.refuses(InvalidRequestError, match, medium("audio", value))


@pytest.mark.parametrize("case", ["WAV half", "NaN", "no samples", "too long", "picture"])
def test_bad_recordings_of_the_other_encoder(sanm, case):
    value, match = BAD_AUDIO[case]
    sanm.refuses(InvalidRequestError, match, medium("audio", value))
    with pytest.raises(InvalidRequestError, match=match):
        sanm.session.transcribe(value)
    sanm.unharmed()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_every_rate_and_channel_count(lite, sanm, rate):
    """Half a second is as many tokens at every rate, and channels beyond the first change nothing."""
    for checked in (lite, sanm):
        plain = len(checked.session._processor(medium("audio", wav(rate=16000))).input_ids)
        asked = [checked.session._processor(medium("audio", wav(0.5, rate, n))) for n in (1, 2, 8)]
        assert {len(prompt.input_ids) for prompt in asked} == {plain}
        assert all(np.array_equal(prompt.audio_feats[0], asked[0].audio_feats[0]) for prompt in asked)
        assert answer(checked.session, medium("audio", wav(0.5, rate, 2)))


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        *(("WAV", s) for s in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
        *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"), ("CAF", "PCM_16")),
    ],
)
def test_every_sound_format(lite, form, subtype):
    assert answer(lite.session, medium("audio", wav(form=form, subtype=subtype)))


def mp4(demo_files) -> bytes:
    return demo_files.video.read_bytes()


BAD_VIDEOS = {
    "empty": (b"", "malformed"),
    "text": (b"no video" * 50, "malformed"),
    "picture": (PNG, "malformed"),
    "sound": (WAV, "malformed|no video stream"),
    "playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", "malformed"),
    "concat": ("concat:/etc/passwd|/etc/hosts", "no file"),
    "no frames": ([], "no frames"),
    "no frames, array": (frames(0, 30, 40, 3), "no frames"),
    "0x0": (frames(4, 0, 0, 3), "0x0 pixels"),
    "1x10000": (frames(4, 1, 10000, 3), "aspect ratio"),
    "float": (np.zeros((4, 30, 30, 3)), "float64"),
    "one bad frame": ([PNG, b"x", PNG, PNG], "not a readable"),
    "nested": ([DEEP] * 4, "found list"),
    "number": (5, "found int"),
    "missing": ("/no/such/clip.mp4", "no file"),
    "web address": ("http://169.254.169.254/x.mp4", "web address"),
    "short": ((frames(2, 30, 30, 3), 2.0), "usable frames"),
    "long": ((frames(8, 30, 30, 3), 1e-6), "at most 3600 s"),
    **{
        f"rate {name}": (
            (frames(8, 30, 30, 3), WILD[name]),
            "frames per second|found uint8|found tuple|s, exp",
        )
        for name in (
            "negative",
            "zero",
            "nan",
            "inf",
            "1e308",
            "1e-320",
            "10^5000",
            "-10^5000",
            "float32 nan",
        )
    },
}


@pytest.mark.parametrize("generation", ["lite", "flash"])
@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_videos(request, generation, case):
    value, match = BAD_VIDEOS[case]
    request.getfixturevalue(generation).refuses(InvalidRequestError, match, medium("video", value))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.98])
def test_truncated_videos(lite, demo_files, share):
    data = mp4(demo_files)
    cut = data[: int(share * len(data))]
    lite.refuses(InvalidMediaError, "malformed|truncated|no frames|no video stream", medium("video", cut))


def test_one_and_odd_numbers_of_frames(lite, flash):
    for count in (1, 3, 5):
        assert answer(lite.session, medium("video", frames(count, 30, 40, 3)))
        flash.refuses(InvalidMediaError, "even number|usable frames", medium("video", [PNG] * count))


MEDIA_NUMBERS = [
    *(("image", name) for name in ("min_pixels", "max_pixels", "resized_height", "resized_width")),
    *(
        ("video", name)
        for name in ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    ),
    *(("video", name) for name in ("resized_height", "video_start", "video_end", "sample", "max_video_fps")),
    ("audio", "sample_rate"),
]


@pytest.mark.parametrize(("kind", "name"), MEDIA_NUMBERS)
@pytest.mark.filterwarnings("error")
def test_wild_numbers_of_media(lite, flash, demo_files, kind, name):
    """Every numeric option of a medium with every wild value: an answer or one sentence."""
    values = {"image": [PNG], "audio": [np.zeros(8000, np.float32)], "video": [[PNG] * 4, mp4(demo_files)]}
    checked = flash if name == "max_video_fps" else lite
    for value in values[kind]:
        for wild in WILD.values():
            try:
                checked.session._processor(medium(kind, value, **{name: wild}))
            except InvalidRequestError as error:
                check_message(error)
        for refused in (-1, NAN, INF, "1", DEEP, HUGE):
            if not (
                kind == "video" and value is not values[kind][1] and name in ("video_start", "video_end")
            ):
                match = "sample rate" if kind == "audio" else name
                checked.refuses(InvalidRequestError, match, medium(kind, value, **{name: refused}))
    checked.survives(medium(kind, values[kind][0], **{name: 2**35}))


@pytest.mark.parametrize(
    "options",
    [
        {"resized_height": 10**6, "resized_width": 28},
        {"resized_height": 28, "resized_width": 8400},
        {"resized_height": 1, "resized_width": 1},
        {"min_pixels": 10**9, "max_pixels": 5},
        {"min_pixels": 1, "max_pixels": 1},
        {"min_pixels": 2**40, "max_pixels": 2**40},
        {"min_pixels": 1e-300, "max_pixels": 1e-300},
    ],
    ids=str,
)
def test_wild_sizes_together(lite, options):
    lite.survives(medium("image", PNG, **options))
    lite.survives(medium("video", [PNG] * 4, **options))


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_unknown_options_of_media(lite, kind):
    value = {"image": PNG, "audio": WAV, "video": [PNG] * 4}[kind]
    for name, wild in (("foo", 1), ("foo", DEEP), ("x" * 10**6, 1)):
        part = {"type": kind, kind: value, name: wild}
        lite.refuses(InvalidRequestError, f"^{kind}: unknown option", user(part))
    for name in (5, None, ()):
        part = {"type": kind, kind: value, name: 1}
        lite.refuses(InvalidRequestError, "expected names as keys", user(part))


@pytest.mark.parametrize("generation", ["preview", "flash"])
@pytest.mark.parametrize("size", [(28, 28), (29, 57), (100, 30), (333, 111)])
def test_sizes_not_divisible_by_anything(sessions, generation, size):
    assert answer(sessions(generation), medium("image", frames(*size, 3)))


def test_limits_are_those_of_the_session(demo_model):
    small = Limits(
        max_image_pixels=2000,
        max_audio_seconds=0.2,
        max_video_frames=4,
        max_video_seconds=1.0,
        max_base64_bytes=50,
        max_messages=3,
        max_text_chars=100,
        max_media=2,
    )
    refused = [
        (medium("image", PNG), "60x40"),
        (medium("image", data_url(PNG, "image/png")), "at most 50"),
        (medium("audio", WAV), r"at most 0\.2 s"),
        (medium("video", [frames(30, 30)] * 6), "at most 4"),
        (medium("video", (frames(8, 30, 30, 3), 2.0)), "at most 1 s"),
        (user(*[{"type": "image", "image": PNG}] * 3), "3 media items"),
        ([{"role": "user", "content": "x"}] * 4, "at most 3"),
        ([{"role": "user", "content": "x" * 101}], "101 characters"),
    ]
    with ming_rt.load(demo_model("v1.5"), kv_bytes=16 << 20, limits=small) as session:
        checked = Checked(session)
        for messages, match in refused:
            checked.refuses(InvalidRequestError, match, messages)
        with pytest.raises(InvalidRequestError, match="characters"):
            session.transcribe(np.zeros(3000, np.float32), context=["word"] * 100)
    for name, value in (
        ("max_media", 0),
        ("max_audio_seconds", NAN),
        ("max_messages", INF),
        ("max_media", "1"),
    ):
        with pytest.raises(InvalidRequestError, match=f"^{name}: expected a positive number"):
            Limits(**{name: value})


BAD_MESSAGES = {
    "none": (None, "non-empty list"),
    "number": (5, "non-empty list"),
    "text": ("Hello", "non-empty list"),
    "one message": ({"role": "user", "content": "x"}, "non-empty list"),
    "generator": ((m for m in user()), "non-empty list"),
    "nothing in it": ([None], r"messages\[0\]"),
    "nested": (DEEP, r"messages\[0\]"),
    "no role": ([{"content": "x"}], r"messages\[0\]\.role: found None"),
    "other role": ([{"role": "root", "content": "x"}], r"messages\[0\]\.role: found 'root'"),
    "nested role": ([{"role": DEEP, "content": "x"}], r"\.role: found list"),
    "huge role": ([{"role": HUGE, "content": "x"}], r"\.role: found an integer of \d+ bits"),
    "long role": ([{"role": "x" * 10**6, "content": "x"}], r"\.role: found 'xxx"),
    "no repr": ([{"role": NoRepr(), "content": "x"}], r"\.role: found NoRepr"),
    "no content": ([{"role": "user"}], r"\.content: expected a string or a list"),
    "number as content": ([{"role": "user", "content": 5}], r"\.content: expected"),
    "bytes as content": ([{"role": "user", "content": b"x"}], r"\.content: expected"),
    "dict as content": ([{"role": "user", "content": {"type": "text", "text": "x"}}], r"\.content: expected"),
    "nested content": ([{"role": "user", "content": DEEP}], r"\.content\[0\]: expected an item with a type"),
    "no type": (
        [{"role": "user", "content": [{"text": "x"}]}],
        r"\.content\[0\]: expected an item with a type",
    ),
    "other type": ([{"role": "user", "content": [{"type": "file", "file": "x"}]}], "found 'file'"),
    "type without value": ([{"role": "user", "content": [{"type": "image"}]}], "needs the key 'image'"),
    "text is none": ([{"role": "user", "content": [{"type": "text", "text": None}]}], "needs the key 'text'"),
    "text is a number": ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "found int"),
    "nested text": ([{"role": "user", "content": [{"type": "text", "text": DEEP}]}], "found list"),
    "nested address": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DEEP}}]}],
        r"image_url: expected \{url: text\}",
    ),
    "web address": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}]}],
        "web address",
    ),
    "two systems": (
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *user()],
        r"messages\[1\]\.role: a system message",
    ),
    "only a system": ([{"role": "system", "content": "a"}], "after the system message"),
    "picture for the system": (
        [{"role": "system", "content": [{"type": "image", "image": PNG}]}, *user()],
        "only text in a system message",
    ),
    "lone surrogate": ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    "too many": (user() * 513, "found 513, expected at most 512"),
    "too much text": ([{"role": "user", "content": "x" * 1_000_001}], "1000001 characters"),
    "too many pictures": (user(*[{"type": "image", "image": PNG}] * 65), "65 media items"),
    "a million pictures": (user({"type": "image", "image": [PNG] * 10**6}), "1000000 media items"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages(lite, case):
    messages, match = BAD_MESSAGES[case]
    if messages is None:
        with pytest.raises(InvalidRequestError, match=match):
            lite.session.chat(None)
    else:
        lite.refuses(InvalidRequestError, match, messages)


def test_a_conversation_that_contains_itself(lite):
    messages: list = []
    messages.append(messages)
    lite.refuses(InvalidRequestError, r"messages\[0\]", messages)


@pytest.mark.parametrize("text", ["", "\0", "\ufeff\u202e\U0010ffff", "\x1b[2J", "%s%n{0}{{}}"])
def test_odd_text_is_answered(lite, text):
    assert answer(lite.session, [{"role": "user", "content": text}])


def test_many_small_parts_do_not_take_long(lite):
    parts = [{"type": "text", "text": "a"}] * 100_000
    lite.refuses(CapacityError, "the prompt has 1000", [{"role": "user", "content": parts}])


NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
    "max_tokens",
)
OTHERS = ("logprobs", "stop", "stream", "return_hidden", "thinking", "answer_prefix", "trust_special")
MORE = ("use_whisper_encoder", "system_template", "add_generation_prompt", "use_cot_system_prompt")


@pytest.mark.parametrize("name", [*NUMBERS, *OTHERS, *MORE, "sys_prompt_exp", "bogus"])
@pytest.mark.filterwarnings("error")
def test_wild_options(lite, name):
    """Every option with every wild value: an answer, or one sentence that names the option."""
    for what, value in WILD.items():
        if (name, what) == ("answer_prefix", "long text"):
            continue  # legal, but it takes long to encode
        try:
            result = lite.session.chat(user(), **{"max_tokens": 2, name: value})
        except InvalidRequestError as error:
            named = {"text": "characters of text", "trust_special": "expected HUMAN"}
            assert name in str(error) or named["text" if what == "long text" else name] in str(error)  # noqa: PT017
            check_message(error)
        else:
            assert list(result)[-1].token_ids if name == "stream" else result.token_ids
    lite.unharmed()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1, NAN, INF, 1e308, HUGE, "1", None)),
        ("top_k", (-1, 0.5, NAN, 2**31, HUGE)),
        ("top_p", (-1, 0, 1.5, NAN, INF, 1e-320)),
        ("repetition_penalty", (-1, 0, NAN, INF, 1e-320, 1e308)),
        ("no_repeat_ngram_size", (-1, 0.5, NAN, 2**31)),
        ("seed", (-1, 0.5, 2**63)),
        ("max_tokens", (-1, 0, 0.5, NAN, 2**31, HUGE)),
        ("logprobs", (-1, 21, NAN)),
        ("stream", (1, "yes", None)),
        ("return_hidden", (1, "yes", np.array([1, 2]))),
    ],
)
def test_these_values_are_refused(lite, name, values):
    for value in values:
        with pytest.raises(InvalidRequestError, match=f"^{name}: expected"):
            lite.session.chat(user(), **{name: value})
    lite.unharmed()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30, "seed": 1},
        {"temperature": 100.0, "seed": 1},
        {"temperature": 1.0, "top_p": 1e-6, "seed": 1},
        {"temperature": 1.0, "top_k": 2**31 - 1, "seed": 2**63 - 1},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"repetition_penalty": 0.01, "temperature": 1e-3, "top_p": 1e-6, "top_k": 1},
        {"no_repeat_ngram_size": 1 << 20},
        {"max_tokens": 1 << 20, "stop": ["e", "a", " ", "o"]},
    ],
    ids=str,
)
def test_values_at_the_edge_are_used(lite, options):
    assert answer(lite.session, **options)
    lite.unharmed()


def test_the_smallest_sampling_set_is_the_greedy_one(lite):
    greedy = answer(lite.session, max_tokens=8)
    for edge in (
        {"temperature": 1e-30},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 2.0, "top_k": 1},
    ):
        assert answer(lite.session, max_tokens=8, seed=3, **edge) == greedy


@pytest.mark.parametrize(
    "name",
    [
        *("kv_bytes", "max_model_len", "threads", "max_num_seqs", "limits", "dtype", "device", "quant"),
        "gpu_memory_utilization",
    ],
)
def test_wild_load_options(demo_model, name):
    """Refused by name. Not all: a cache of 2^31 bytes or one sequence at a time are legal."""
    for value in WILD.values():
        legal = (
            value is None or (isinstance(value, int) and 1 <= value <= 2**31) or isinstance(value, np.int64)
        )
        share = name == "gpu_memory_utilization" and isinstance(value, float) and 0 < value <= 1
        if legal or share:
            continue
        with pytest.raises(MingError, match=name) as caught:
            ming_rt.load(demo_model("v1.5"), **{name: value})
        check_message(caught.value)


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "demo:", "demo:v9", "demo:" + "x" * 1000, "~nobody-at-all", 5, DEEP]
)
def test_wild_paths(path):
    if path == "demo:":
        return
    with pytest.raises(MingError):
        ming_rt.load(path)


def test_a_cache_larger_than_the_machine(demo_model):
    with pytest.raises(CapacityError, match="does not fit into the memory"):
        ming_rt.load(demo_model("v1.5"), kv_bytes=1 << 47)


def test_weights_larger_than_the_memory(demo_model, monkeypatch):
    monkeypatch.setattr("ming_rt.runtime.weights.available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="the weights need"):
        ming_rt.load(demo_model("v1.5"))


@pytest.mark.parametrize("ids", [[], [-1], [1 << 40], [0.5], [[1]], ["a"]], ids=str)
def test_token_ids_out_of_range(lite, ids):
    prompt = lite.session._processor(user())
    with pytest.raises(InvalidRequestError, match=r"^input_ids: expected"):
        lite.session._engine.submit(replace(prompt, input_ids=np.array(ids)))
    lite.unharmed()


def test_failures_do_not_disturb_a_running_answer(lite):
    long = {"max_tokens": 80, "temperature": 1.0, "seed": 5}
    alone = answer(lite.session, **long)
    stream = lite.session.chat(user(), stream=True, **long)
    for value, _ in list(BAD_IMAGES.values())[:12]:
        with pytest.raises(InvalidRequestError):
            answer(lite.session, medium("image", value))
    assert stream.result().token_ids == alone
    lite.unharmed()


def test_an_encoder_that_fails_ends_only_its_own_request(lite, monkeypatch):
    model = lite.session._engine._worker.model
    encode = model.encode

    def broken(prompt, *rest):
        if prompt.audio_feats:
            raise RuntimeError("out of memory")
        return encode(prompt, *rest)

    monkeypatch.setattr(model, "encode", broken)
    stream = lite.session.chat(user(), stream=True, max_tokens=40)
    with pytest.raises(
        ming_rt.errors.EngineError, match="preparing the prompt failed: RuntimeError: out of memory"
    ):
        answer(lite.session, medium("audio", WAV))
    assert len(stream.result().token_ids) >= 1
    lite.unharmed()


def test_unsupported_is_told_from_wrong(lite):
    lite.refuses(
        UnsupportedError,
        "not both",
        user({"type": "image", "image": PNG}, {"type": "video", "video": [PNG] * 4}),
    )
