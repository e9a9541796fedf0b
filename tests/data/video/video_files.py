"""Videos made for the tests: every frame shows its number, so that a test can tell which one it was given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

BITS = 8
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"svtav1-params": "enable-stat-report=0"}}
os.environ.setdefault("SVT_LOG", "0")


def draw(number: int, size: tuple[int, int] = (96, 64), alpha: bool = False) -> np.ndarray:
    """Frame ``number``: above, its bits as white and black bars, highest first; below, red, a colour of its own, and blue.

    No turn or mirror of it looks like itself. With ``alpha`` the last channel clears the blue part.
    """
    width, height = size
    picture = np.zeros((height, width, 4 if alpha else 3), np.uint8)
    half = height // 2
    for x in range(width):
        picture[:half, x, :3] = 255 if number >> (BITS - 1 - x * BITS // width) & 1 else 0
    third = width // 3
    picture[half:, :third, :3] = (220, 30, 30)
    picture[half:, third : 2 * third, :3] = own_colour(number)
    picture[half:, 2 * third :, :3] = (30, 30, 220)
    if alpha:
        picture[..., 3] = 255
        picture[half:, 2 * third :, 3] = 0
    return picture


def own_colour(number: int) -> tuple[int, int, int]:
    return 60 + number * 37 % 160, 60 + number * 11 % 160, 60 + number * 73 % 160


def number_of(picture: Image.Image) -> int:
    """The number that a picture drawn by `draw` shows."""
    grey = np.asarray(picture.convert("L")).astype(int)
    height, width = grey.shape
    row = grey[height // 8 : 3 * height // 8].mean(axis=0)
    number = 0
    for bit in range(BITS):
        number = number * 2 + int(row[int((bit + 0.5) * width / BITS)] > 127)
    return number


def difference(picture: Image.Image, expected: np.ndarray) -> float:
    """Mean absolute difference of the pixels, of 255; infinite where sizes differ."""
    found = np.asarray(picture).astype(float)
    return float("inf") if found.shape != expected.shape else float(np.abs(found - expected).mean())


def encode(
    path: Path | str,
    pictures: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int | Fraction = 25,
    stamps: Sequence[int] | None = None,
    tick: Fraction | None = None,
    gop: int = 12,
    bframes: int | None = None,
    options: dict[str, str] | None = None,
    form: str | None = None,
    muxer: dict[str, str] | None = None,
    matrix: tuple[int, int, int, int] | None = None,
    aspect: Fraction | None = None,
    sound: bool = False,
    cover: bytes | None = None,
    prepare: Callable[[Any], None] | None = None,
    colour: tuple[int, int] = (2, 1),  # AVColorSpace and AVColorRange: not told, limited
) -> Path:
    """Write a video of these RGB (or RGBA) pictures.

    Args:
        stamps: presentation time of each, in ``tick`` seconds; by default one after another at ``rate``.
        form: the container's name, where the file's suffix does not tell.
        matrix: the display matrix's (a, b, c, d): a picture's x goes to (a, b), its y, downwards, to (c, d).
        prepare: is given the stream before anything is encoded.
    """
    pictures = iter(pictures)
    first = next(pictures)
    tick = tick or 1 / Fraction(rate)
    with av.open(str(path), "w", format=form, options=muxer or {}) as container:
        art = None
        if cover is not None:
            art = container.add_stream("mjpeg", rate=1)
            with Image.open(__import__("io").BytesIO(cover)) as image:
                art.width, art.height = image.size
            art.pix_fmt = "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        stream: Any = container.add_stream(codec, rate=rate, options={**QUIET.get(codec, {}), **(options or {})})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pixels
        stream.gop_size = gop
        stream.time_base = tick
        stream.codec_context.time_base = tick
        if bframes is not None:
            stream.max_b_frames = bframes
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        stream.codec_context.colorspace, stream.codec_context.color_range = colour
        if matrix is not None:
            a, b, c, d = (value << 16 for value in matrix)
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        if prepare is not None:
            prepare(stream)
        track = container.add_stream("aac", rate=44100) if sound else None
        if art is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts, packet.time_base = art, 0, 0, Fraction(1, 90000)
            container.mux(packet)
        count = 0
        for count, picture in enumerate(_chain(first, pictures)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = stamps[count] if stamps is not None else count, tick
            space, range_ = colour
            if pixels.startswith(("yuv", "gray")) and picture.shape[2] == 3:
                frame = frame.reformat(
                    format=pixels, dst_colorspace={1: 1, 9: 9}.get(space, 5), src_color_range=2, dst_color_range=range_
                )
                frame.colorspace, frame.color_range = space, range_
            container.mux(stream.encode(frame))
        if track is not None:
            tone(container, track, (count + 1) / rate)
        container.mux(stream.encode())
    return Path(path)


def _chain(first: np.ndarray, rest: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    yield first
    yield from rest


def tone(container: Any, track: Any, seconds: float | Fraction) -> None:
    for start in range(0, int(44100 * seconds), 1024):
        wave = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32) * 0.1
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, start, Fraction(1, 44100)
        container.mux(track.encode(frame))
    container.mux(track.encode())


def numbered(path: Path | str, frames: int = 30, size: tuple[int, int] = (96, 64), **options: Any) -> Path:
    """A video of frames 0, 1, ... as `draw` draws them."""
    return encode(path, (draw(i, size) for i in range(frames)), **options)


def sound_only(path: Path | str, seconds: float = 1.0) -> Path:
    with av.open(str(path), "w") as container:
        tone(container, container.add_stream("aac", rate=44100), seconds)
    return Path(path)
