"""A generated picture, sound and clip for the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

RATE = 16000


@dataclass(frozen=True)
class DemoMedia:
    """Paths of the files that ``demo_media`` wrote."""

    image: Path
    audio: Path
    video: Path


def demo_media(directory: str | Path) -> DemoMedia:
    """Writes picture.png (448x336), sound.wav and clip.mp4 (3 s each) unless they are there already."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    media = DemoMedia(directory / "picture.png", directory / "sound.wav", directory / "clip.mp4")
    for path, write in (
        (media.image, _write_image),
        (media.audio, _write_audio),
        (media.video, _write_video),
    ):
        if not path.exists():
            temporary = path.with_name(f".{path.name}")
            write(temporary)
            temporary.replace(path)
    return media


def _scene(width: int, height: int, time: float) -> Image.Image:
    """Sky, hill, a square and a ball that moves from left to right while ``time`` goes from 0 to 1."""
    rows = np.linspace(0.0, 1.0, height)[:, None, None]
    sky = (1 - rows) * np.array([90.0, 150.0, 230.0]) + rows * np.array([250.0, 220.0, 160.0])
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse([-width // 4, height * 2 // 3, width, height * 3 // 2], fill=(60, 140, 70))
    side = height // 5
    draw.rectangle(
        [width * 3 // 4, height // 2, width * 3 // 4 + side, height // 2 + side], fill=(40, 60, 200)
    )
    x, y = width * (0.1 + 0.7 * time), height * (0.55 - 0.35 * abs(np.sin(2.0 * np.pi * time)))
    radius = height // 9
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(210, 40, 40))
    return image


def _write_image(path: Path) -> None:
    _scene(448, 336, 0.3).save(path, format="PNG")


def _write_audio(path: Path) -> None:
    """Voiced syllables (harmonics under moving formants), then a rising chirp."""
    seconds = np.arange(3 * RATE) / RATE
    pitch = 120.0 + 20.0 * np.sin(2 * np.pi * 0.7 * seconds)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = (500 + 250 * np.sin(2 * np.pi * 1.5 * seconds), 1500 + 500 * np.cos(2 * np.pi * 1.1 * seconds))
    voice = np.zeros_like(seconds)
    for harmonic in range(1, 25):
        gain = sum(np.exp(-(((harmonic * pitch - formant) / 150.0) ** 2)) for formant in formants)
        voice += (0.05 / harmonic + gain) * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 3.0 * seconds), 0.0, None) * (seconds < 2.0)
    start = np.clip(seconds - 2.0, 0.0, None)
    chirp = np.sin(2 * np.pi * (200.0 * start + 900.0 * start**2)) * (seconds >= 2.0)
    wave = 0.12 * voice * syllables + 0.2 * chirp
    soundfile.write(path, np.clip(wave, -1.0, 1.0), RATE, subtype="PCM_16", format="WAV")


def _write_video(path: Path) -> None:
    codec = next((name for name in ("libx264", "h264", "mpeg4") if name in av.codecs_available), "mpeg4")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_image(_scene(320, 240, index / 11))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
