"""Videos: frame selection, sizes, files in several containers, lists of frames, and hostile files."""

from __future__ import annotations

import base64
import io
import random

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ming_rt import ops
from ming_rt.config import PreprocessorConfig
from ming_rt.errors import InvalidMediaError, InvalidRequestError, UnsupportedError
from ming_rt.inputs import image, video
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits

CONFIG = PreprocessorConfig()
LITE = ("preview", "v1", "v1.5")
ALL = (*LITE, "flash")


def clip(frames=20, height=64, width=96, seed=0) -> np.ndarray:
    """Smooth frames; the mean level says which one it is."""
    y, x = np.mgrid[:height, :width] / 8
    waves = [np.sin(x + seed), np.cos(y), np.sin(x - y)]
    levels = np.linspace(40, 200, frames)
    return (
        np.stack([[level + 20 * wave for wave in waves] for level in levels])
        .transpose(0, 2, 3, 1)
        .astype(np.uint8)
    )


def encoded(frames: np.ndarray, fmt="mp4", codec="mpeg4", fps=10) -> bytes:
    out = io.BytesIO()
    write(out, frames, fmt, codec, fps)
    return out.getvalue()


def write(out, frames: np.ndarray, fmt="mp4", codec="mpeg4", fps=10, **options) -> None:
    with av.open(out, "w", format=fmt, options=options) as container:
        stream = container.add_stream(codec, rate=fps, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def which(pixels: torch.Tensor, frames: np.ndarray) -> list[int]:
    """Frames of the source that the given ones look like."""
    levels = frames.mean((1, 2, 3))
    return [int(np.abs(levels - float(p.float().mean())).argmin()) for p in pixels]


@pytest.mark.parametrize(
    ("options", "total", "count"),
    [
        ({}, 100, 100),
        ({}, 1000, 128),
        ({}, 5, 4),
        ({}, 4, 4),
        ({"nframes": 7}, 100, 8),
        ({"nframes": 5}, 100, 4),
        ({"nframes": 2}, 2, 2),
        ({"max_frames": 9}, 100, 8),
        ({"min_frames": 9}, 100, 100),
        ({"min_frames": 9, "max_frames": 6}, 100, 10),
        ({"min_frames": 2}, 3, 2),
    ],
)
def test_frame_count(options, total, count):
    assert video.frame_count(total, options) == count


@pytest.mark.parametrize(
    ("options", "total"), [({}, 1), ({}, 3), ({}, 0), ({"nframes": 8}, 7), ({"nframes": 1}, 7)]
)
def test_too_few_frames(options, total):
    with pytest.raises(InvalidMediaError, match="usable frames"):
        video.frame_count(total, options)


def test_decord_s_rule_falls_back_to_torchvision_s():
    # 30 frames at 30 fps are 2 frames for decord's rule, too few, but 30 for the other one.
    indices, sample_fps = video.sample_frames("preview", 30, 30.0, {})
    assert len(indices) == 30
    assert sample_fps == 30
    with pytest.raises(InvalidMediaError):
        video.sample_frames("preview", 30, 30.0, {}, "decord")


def test_random_sampling_takes_one_frame_of_each_interval():
    options = {"sample": "random", "nframes": 10}
    picks = [video.sample_frames("v1", 100, 25.0, options, rng=random.Random(seed))[0] for seed in (1, 1, 2)]
    assert np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], picks[2])
    for pick in picks:
        assert np.array_equal(pick // 10, np.arange(10))
    with pytest.raises(InvalidMediaError, match="to choose from"):
        video.pick_frames("random", 3, 4)


@pytest.mark.parametrize("generation", ["v1", "v1.5"])
def test_adaptive_sampling_needs_few_frames(generation):
    few = video.sample_frames(generation, 60, 10.0, {"sample": "adaptive", "max_frames": 64})
    assert np.array_equal(few[0], video.sample_frames(generation, 60, 10.0, {"sample": "uniform"})[0])
    with pytest.raises(UnsupportedError, match="at most 64"):
        video.sample_frames(generation, 200, 2.0, {"sample": "adaptive"})


@pytest.mark.parametrize("generation", ["preview", "flash"])
def test_adaptive_sampling_is_not_in_every_generation(generation):
    with pytest.raises(UnsupportedError, match="adaptive"):
        video.sample_frames(generation, 60, 10.0, {"sample": "adaptive"})


@pytest.mark.parametrize(
    ("generation", "n", "options", "size"),
    [
        ("v1.5", 4, {}, (560, 1008)),
        ("v1.5", 128, {}, (252, 448)),
        ("v1.5", 4, {"max_pixels": 200000}, (308, 588)),
        ("flash", 4, {}, (1092, 1932)),
        ("flash", 128, {}, (280, 504)),
        ("flash", 4, {"max_pixels": 200000}, (1092, 1932)),  # ignored, as in the original
        ("flash", 4, {"total_pixels": 400000}, (308, 588)),
        ("preview", 4, {"resized_height": 100, "resized_width": 200}, (112, 196)),
    ],
)
def test_clip_size(generation, n, options, size):
    assert video.clip_size(generation, 1080, 1920, n, options, DEFAULT_LIMITS) == size


@pytest.mark.parametrize(
    ("fmt", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
@pytest.mark.parametrize("generation", ALL)
def test_files(generation, fmt, codec):
    frames = clip()
    options = {"sample": "uniform", "max_frames": 6, "min_pixels": 3136}
    taken = video.fetch_video(encoded(frames, fmt, codec), generation, options, reader="torchvision")
    indices = [1, 4, 7, 11, 14, 17]
    assert taken.indices.tolist() == indices
    assert taken.sample_fps == pytest.approx(3.0)
    assert which(taken.frames, frames) == indices
    assert taken.frames.dtype == torch.uint8


def test_every_form_gives_the_same_patches(tmp_path):
    frames = clip()
    data = encoded(frames)
    path = tmp_path / "a video.mp4"
    path.write_bytes(data)
    forms = [
        path,
        str(path),
        f"file://{path}",
        data,
        "data:video/mp4;base64," + base64.b64encode(data).decode(),
    ]
    results = [video.preprocess_video(form, "v1.5", CONFIG, {"max_frames": 4}) for form in forms]
    assert results[0][1] == (2, 20, 28)
    assert results[0][0].dtype == np.float32
    for rows, grid in results[1:]:
        assert grid == results[0][1]
        assert np.array_equal(rows, results[0][0])


def test_decoding_stops_after_the_last_frame_that_is_needed(monkeypatch):
    decoded = []

    class Watched:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame)
                yield frame

    data, opened = encoded(clip(60)), av.open
    monkeypatch.setattr(video.av, "open", lambda *args, **options: Watched(opened(*args, **options)))
    taken = video.fetch_video(data, "v1.5", {"video_end": 0.95})
    assert taken.indices.tolist() == list(range(10))
    assert len(decoded) == 10


def test_decoded_frames_equal_the_same_selection_by_hand():
    frames = clip()
    taken = video.fetch_video((frames, 10.0), "v1.5", {"nframes": 4, "min_pixels": 3136})
    assert taken.indices.tolist() == [0, 6, 12, 19]
    expected = ops.resize_frames(torch.from_numpy(frames[taken.indices]), 56, 84, to_uint8=True)
    assert taken.frames.shape[1:3] == (56, 84)
    assert torch.equal(taken.frames, expected)
    assert torch.equal(
        video.fetch_video((torch.from_numpy(frames), 10), "v1.5", {"nframes": 4, "min_pixels": 3136}).frames,
        expected,
    )


@pytest.mark.parametrize(
    ("window", "indices"),
    [
        ({"video_start": 1.0}, list(range(10, 20))),
        ({"video_start": 0}, list(range(20))),
        ({"video_end": 0.75}, list(range(8))),
        ({"video_start": 0.55, "video_end": 1.0}, [5, 6, 7, 8, 9, 10]),  # from the frame shown at 0.55 s
    ],
)
def test_time_windows(window, indices):
    for source in (encoded(clip()), (clip(), 10.0)):
        assert video.fetch_video(source, "v1.5", {"min_pixels": 3136, **window}).indices.tolist() == indices


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_frames_cut_off_by_an_edit_list_do_not_count(codec):
    frames, out = clip(), io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10, options={"qscale": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        packets = []
        for frame in frames:
            packets += stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        for packet in packets + stream.encode():
            cut = round(0.6 / packet.time_base)
            packet.pts, packet.dts = packet.pts - cut, packet.dts - cut
            container.mux(packet)
    taken = video.fetch_video(out.getvalue(), "v1.5", {"min_pixels": 3136})
    assert taken.indices.tolist() == list(range(14))
    assert which(taken.frames, frames) == list(range(6, 20))


def test_an_empty_time_window():
    with pytest.raises(InvalidMediaError, match=r"no frames between 7 and 8 s|usable frames"):
        video.fetch_video(encoded(clip()), "v1.5", {"video_start": 7.0, "video_end": 8.0})


def folder(tmp_path, frames):
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i:03}.png")
    (tmp_path / ".hidden").write_text("not a frame")
    return tmp_path


@pytest.mark.parametrize(
    ("generation", "total", "most", "indices"),
    [
        ("v1.5", 5, 8, [0, 1, 2, 3, 4, 4]),
        ("v1", 5, 4, [0, 1, 3, 4]),
        ("preview", 5, 8, [0, 1, 2, 3, 4, 4]),
        ("preview", 9, 4, [0, 2, 4, 6]),
        ("preview", 9, 3, [0, 3, 6, 6]),
    ],
)
def test_lists_of_frames(tmp_path, generation, total, most, indices):
    frames = clip(total, 56, 84)
    sources = [folder(tmp_path, frames), frames, list(frames), [Image.fromarray(f) for f in frames]]
    for source in sources:
        taken = video.fetch_video(source, generation, {"max_frames": most, "sample": "uniform"})
        assert taken.indices.tolist() == indices
        assert torch.equal(taken.frames, torch.from_numpy(frames[indices]))
        assert taken.sample_fps is None


@pytest.mark.parametrize("generation", LITE)
def test_one_frame_of_a_list_is_doubled(generation):
    rows, grid = video.preprocess_video(clip(1), generation, CONFIG)
    assert grid[0] == 1
    assert len(rows) == np.prod(grid)


def test_odd_clips_are_refused():
    with pytest.raises(InvalidMediaError, match="3 frames, expected an even number"):
        video.preprocess_video(clip(9), "v1.5", CONFIG, {"max_frames": 3})


def test_flash_uses_all_frames_of_a_list(tmp_path):
    frames = clip(6, 40, 60)
    taken = video.fetch_video(folder(tmp_path, frames), "flash", {"max_frames": 4, "min_pixels": 3136})
    assert taken.indices.tolist() == list(range(6))
    assert taken.frames.dtype == torch.float32
    size = tuple(taken.frames.shape[1:3])
    assert size == video.clip_size("flash", 40, 60, 4, {"min_pixels": 3136}, DEFAULT_LIMITS)
    assert torch.equal(taken.frames, ops.resize_frames(torch.from_numpy(frames), *size, "bilinear"))


def test_flash_brings_frames_of_another_shape_into_line():
    frames = list(clip(6, 40, 60))
    frames[3] = clip(1, 50, 44)[0]
    taken = video.fetch_video(frames, "flash", {"min_pixels": 3136})
    fitted = ops.resize_u8(torch.from_numpy(frames[3]), 40, 60)
    size = taken.frames.shape[1:3]
    assert torch.equal(taken.frames[3], ops.resize_frames(fitted[None], *size, "bilinear")[0])


@pytest.mark.parametrize("total", [1, 3, 5])
def test_flash_refuses_odd_lists(total):
    with pytest.raises(InvalidMediaError, match="expected an even number"):
        video.fetch_video(clip(total), "flash")


def test_lite_enlarges_small_frames_in_the_second_stage():
    _, grid = video.preprocess_video((clip(4), 2.0), "v1.5", CONFIG, {"min_pixels": 3136, "max_pixels": 6272})
    height, width = image.processor_size(56, 84, CONFIG.min_pixels_video, CONFIG.max_pixels_video)
    assert grid == (2, height // 14, width // 14)


@pytest.mark.parametrize("fmt", ["mp4", "faststart", "matroska", "avi"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.85])
def test_truncated_files(tmp_path, fmt, share):
    if fmt == "faststart":  # the index comes first, so a reader knows what is missing
        write(tmp_path / "a.mp4", clip(), movflags="faststart")
        data = (tmp_path / "a.mp4").read_bytes()
    else:
        data = encoded(clip(), fmt)
    with pytest.raises(InvalidMediaError, match=r"^video: "):
        video.fetch_video(data[: int(len(data) * share)], "v1.5")


def test_a_file_without_frames():
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(InvalidMediaError, match=r"^video: "):
        video.fetch_video(out.getvalue(), "v1.5")


def test_a_file_without_video():
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(InvalidMediaError, match="no video stream"):
        video.fetch_video(out.getvalue(), "v1.5")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        b"\0\0\0\x18ftypmp42" + b"\xff" * 300,
        b"\x1a\x45\xdf\xa3" + b"\xff" * 300,
    ],
)
def test_malformed_files(data):
    with pytest.raises(InvalidMediaError, match=r"^video: "):
        video.fetch_video(data, "v1.5")


@pytest.mark.parametrize("generation", ALL)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_damaged_files_end_in_frames_or_an_error(generation, share):
    data = bytearray(encoded(clip()))
    begin = int(len(data) * share)
    data[begin : begin + 200] = np.random.default_rng(1).bytes(200)
    try:
        rows, grid = video.preprocess_video(bytes(data), generation, CONFIG)
    except InvalidMediaError:
        return
    assert len(rows) == np.prod(grid)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_video_seconds=1.0), r"found 2(\.0)? s, expected at most 1 s"),
        (Limits(max_video_frames=10), "20 frames asked for, expected at most 10"),
        (Limits(max_image_pixels=5000), "pixels, expected at most 5000"),
    ],
)
def test_limits_are_checked_before_decoding(limits, message, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("decoded before the limits were checked")

    monkeypatch.setattr(video, "_resize", decode)
    for source in (encoded(clip()), (clip(), 10.0)):
        with pytest.raises(InvalidMediaError, match=message):
            video.fetch_video(source, "v1.5", {}, limits)


@pytest.mark.parametrize("generation", ALL)
def test_limits_of_lists(generation):
    with pytest.raises(InvalidMediaError, match="20 frames, expected at most 10"):
        video.fetch_video(clip(), generation, {}, Limits(max_video_frames=10))
    with pytest.raises(InvalidMediaError, match="pixels, expected at most 30000"):
        video.preprocess_video(clip(10), generation, CONFIG, {}, Limits(max_image_pixels=30000))


@pytest.mark.parametrize(
    "options",
    [
        {"sample": "best"},
        {"sample": 3},
        {"nframes": -2},
        {"nframes": float("nan")},
        {"max_frames": 0},
        {"max_frames": "8"},
        {"min_pixels": float("inf")},
        {"min_pixels": 1e12},
        {"total_pixels": -1},
        {"video_start": -1.0},
        {"video_end": 0},
        {"fps": 2.0},
        {"max_video_fps": 1.0},
        {"nframes": 1e9, "video_start": 0},
    ],
)
def test_hostile_options(options):
    with pytest.raises(InvalidRequestError):
        video.preprocess_video((clip(8), 2.0), "v1.5", CONFIG, options)


@pytest.mark.parametrize(
    ("obj", "error"),
    [
        ("http://example.com/a.mp4", UnsupportedError),
        ("rtsp://example.com/a", InvalidMediaError),
        ("concat:a.mp4|b.mp4", InvalidMediaError),
        ("no/such/file.mp4", InvalidMediaError),
        ("/dev/zero", InvalidMediaError),
        (7, InvalidMediaError),
        ([], InvalidMediaError),
        ([7, 8], InvalidMediaError),
        (np.zeros((4, 56, 56), np.uint8), InvalidMediaError),
        (np.zeros((4, 56, 56, 3), np.float32), InvalidMediaError),
        (np.zeros((0, 56, 56, 3), np.uint8), InvalidMediaError),
        ((np.zeros((4, 0, 56, 3), np.uint8), 2.0), InvalidMediaError),
        ((np.zeros((0, 56, 56, 3), np.uint8), 2.0), InvalidMediaError),
        ((np.zeros((4, 56, 56, 3), np.uint8), 0.0), InvalidMediaError),
        ((np.zeros((4, 56, 56, 3), np.uint8), float("nan")), InvalidMediaError),
        ((np.zeros((4, 56, 56, 3), np.uint8), 1e9), InvalidMediaError),
    ],
)
def test_unusable_objects(obj, error):
    with pytest.raises(error):
        video.fetch_video(obj, "v1.5")


def test_an_empty_directory(tmp_path):
    with pytest.raises(InvalidMediaError, match="no frames"):
        video.fetch_video(tmp_path, "v1.5")


def test_elongated_frames():
    with pytest.raises(InvalidMediaError, match="aspect ratio"):
        video.fetch_video((np.zeros((4, 1, 10000, 3), np.uint8), 2.0), "v1.5")
