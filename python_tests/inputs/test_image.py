"""Pictures: every accepted form and mode, the size rules, and hostile files."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ming_rt.config import PreprocessorConfig
from ming_rt.errors import InvalidMediaError, InvalidRequestError, UnsupportedError
from ming_rt.inputs import image
from ming_rt.inputs.limits import Limits

CONFIG = PreprocessorConfig()


def picture(height=40, width=60, mode="RGB", seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if mode in ("RGBA", "RGB"):
        return Image.fromarray(pixels[:, :, : len(mode)])
    return Image.fromarray(pixels[:, :, :3]).convert(mode)


def encoded(im: Image.Image, fmt: str, **options) -> bytes:
    out = io.BytesIO()
    im.save(out, fmt, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises much and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def test_every_form_gives_the_same_pixels(tmp_path):
    im = picture()
    data = encoded(im, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    pixels = np.asarray(im)
    forms = [
        path,
        str(path),
        f"file://{path}",
        data,
        bytearray(data),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        im,
        pixels,
        torch.from_numpy(pixels.copy()),
        np.ascontiguousarray(pixels.transpose(1, 0, 2)).transpose(1, 0, 2),
    ]
    for form in forms:
        loaded = image.load_image(form)
        assert loaded.dtype == np.uint8
        assert np.array_equal(loaded, pixels)
        assert image.image_size(form) == (40, 60)


@pytest.mark.parametrize(("fmt", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_lossless_formats(fmt, options):
    assert np.array_equal(image.load_image(encoded(picture(), fmt, **options)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode):
    data = encoded(picture(mode=mode), "JPEG")
    assert np.array_equal(image.load_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_modes_become_rgb_without_compositing():
    rgba = picture(mode="RGBA")
    assert np.array_equal(image.load_image(rgba), np.asarray(rgba)[:, :, :3])
    gray = picture(mode="L")
    assert np.array_equal(
        image.load_image(encoded(gray, "PNG")), np.repeat(np.asarray(gray)[:, :, None], 3, 2)
    )
    palette = picture(mode="P")
    wanted = np.asarray(palette.convert("RGB"))
    assert np.array_equal(image.load_image(encoded(palette, "PNG", transparency=3)), wanted)
    assert np.array_equal(image.load_image(encoded(palette, "PNG", transparency=bytes(range(200)))), wanted)
    bits = picture(mode="1")
    assert set(np.unique(image.load_image(bits))) == {0, 255}
    array = np.asarray(rgba)
    assert np.array_equal(image.load_image(array), array[:, :, :3])
    assert np.array_equal(image.load_image(array[:, :, 0]), np.repeat(array[:, :, :1], 3, 2))


def test_exif_orientation_is_not_applied():
    im = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image.load_image(encoded(im, "PNG", exif=exif)).shape == (40, 60, 3)


def test_a_picture_given_by_the_user_is_not_changed():
    im = Image.open(io.BytesIO(encoded(picture(mode="P"), "PNG", transparency=3)))
    image.load_image(im)
    assert "transparency" in im.info


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_truncated_files(fmt, share):
    data = encoded(picture(120, 160), fmt)
    with pytest.raises(InvalidMediaError, match=r"^image: "):
        image.load_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 50,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a" + b"\0" * 20,
        b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff",
        encoded(picture(), "PNG")[:60] + b"\xff" * 400,
        encoded(picture(), "TIFF"),
    ],
)
def test_malformed_files(data):
    with pytest.raises(InvalidMediaError, match=r"^image: "):
        image.load_image(data)


def test_bombs_are_refused_from_their_header(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded before the size was checked")

    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image.Image, "convert", decode)
    for width, height in [(8000, 10000), (60000, 60000)]:
        with pytest.raises(InvalidMediaError, match="pixels"):
            image.load_image(png_header(width, height))
    with pytest.raises(InvalidMediaError, match="40x30 pixels, expected at most 1000"):
        image.load_image(png_header(40, 30), Limits(max_image_pixels=1000))
    with pytest.raises(InvalidMediaError, match="at most 1000"):
        image.load_image(np.zeros((40, 30, 3), np.uint8), Limits(max_image_pixels=1000))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("obj", "error", "message"),
    [
        ("http://example.com/a.png", UnsupportedError, "web address"),
        ("HTTPS://example.com/a.png", UnsupportedError, "web address"),
        ("no/such/file.png", InvalidMediaError, "no file 'no/such/file.png'"),
        ("/", InvalidMediaError, "no file"),
        ("/dev/zero", InvalidMediaError, "no file"),
        ("a\0b", InvalidMediaError, "no file"),
        ("x" * 100000, InvalidMediaError, "no file 'xxx"),
        ("data:image/png;base64,@@@", InvalidMediaError, "not valid base64"),
        ("data:text/plain;base64,AAAA", InvalidMediaError, "another data URL"),
        ("data:image/png,AAAA", InvalidMediaError, "another data URL"),
        (7, InvalidMediaError, "found int"),
        (None, InvalidMediaError, "found NoneType"),
        (np.zeros((0, 4, 3), np.uint8), InvalidMediaError, "not empty"),
        (np.zeros((4, 4, 2), np.uint8), InvalidMediaError, "expected uint8"),
        (np.zeros((4, 4, 3), np.float32), InvalidMediaError, "found float32"),
    ],
)
def test_unusable_objects(obj, error, message):
    with pytest.raises(error, match=message) as info:
        image.load_image(obj)
    assert len(str(info.value)) < 300


def test_long_data_urls_are_refused_before_decoding():
    with pytest.raises(InvalidMediaError, match="base64 characters"):
        image.load_image("data:image/png;base64," + "A" * 101, Limits(max_base64_bytes=100))


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(1, 10000, "aspect ratio"), (28, 5601, "aspect ratio"), (10000, 1, "aspect ratio")],
)
def test_elongated_pictures(height, width, message):
    with pytest.raises(InvalidMediaError, match=message):
        image.preprocess_image(np.zeros((height, width, 3), np.uint8), CONFIG)


def test_a_side_may_not_vanish():
    with pytest.raises(InvalidMediaError, match="not empty"):
        image.fetch_image(np.zeros((28, 5600, 3), np.uint8), {"max_pixels": 150528})


def test_both_stages():
    rows, grid, fetched = image.preprocess_image(picture(91, 137), CONFIG)
    assert fetched.shape == (84, 140, 3)
    assert grid == (1, 16, 26)
    assert rows.shape == (16 * 26, 1176)
    assert rows.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (56, 84)),
        ({"min_pixels": 10000}, (84, 140)),
        ({"max_pixels": 3136, "min_pixels": 784}, (28, 56)),
        ({"resized_height": 100, "resized_width": 300}, (112, 308)),
        ({"resized_height": 100}, (56, 84)),  # counts only together with the width
    ],
)
def test_options(options, size):
    assert image.fetch_image(picture(40, 60), options).shape[:2] == size


@pytest.mark.parametrize(
    "options",
    [
        {"min_pixels": -1},
        {"min_pixels": 0},
        {"max_pixels": float("nan")},
        {"max_pixels": float("inf")},
        {"max_pixels": "1000"},
        {"min_pixels": True},
        {"resized_height": 50.5, "resized_width": 50},
        {"resized_height": 1e300, "resized_width": 1e300},
        {"min_pixels": 1e12},
        {"resized_height": 1, "resized_width": 10**9},
        {"detail": "high"},
    ],
)
def test_hostile_options(options):
    with pytest.raises(InvalidRequestError):
        image.preprocess_image(picture(), CONFIG, options)
