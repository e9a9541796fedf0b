"""Drawing, writing and reading short clips: cut-outs on a plain ground, H.264 in MP4 by PyAV."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from PIL import Image
from stand_in_scenes import SIDE, fitted

FPS, SAMPLED = 8, 8
"""Frames a second of a clip, and frames that the model is shown of it."""


@dataclass(frozen=True)
class Pose:
    """How a cut-out is laid on a frame: centre and longest side in pixels, degrees anticlockwise, opacity 0..1."""

    cutout: Image.Image
    x: float
    y: float
    side: float
    angle: float = 0.0
    opacity: float = 1.0

    def at(self, **changes: float) -> Pose:
        return replace(self, **changes)  # type: ignore[arg-type]


def draw_frame(ground: Image.Image, poses: Sequence[Pose]) -> Image.Image:
    """The poses on the ground. What leaves the frame on one side comes in on the other, so that places repeat and no
    single frame tells which way something goes."""
    frame = ground.copy()
    for pose in poses:
        if pose.opacity <= 0:
            continue
        picture = fitted(pose.cutout, max(2, round(pose.side)))
        if pose.angle:
            picture = picture.convert("RGBa").rotate(pose.angle, Image.Resampling.BICUBIC, expand=True).convert("RGBA")
        if pose.opacity < 1:
            picture.putalpha(picture.getchannel("A").point(lambda v, o=pose.opacity: round(v * o)))
        left, top = pose.x % SIDE - picture.width / 2, pose.y % SIDE - picture.height / 2
        for dx in (-SIDE, 0, SIDE):
            for dy in (-SIDE, 0, SIDE):
                corner = round(left + dx), round(top + dy)
                if -picture.width < corner[0] < SIDE and -picture.height < corner[1] < SIDE:
                    frame.paste(picture, corner, picture)
    return frame


def encode(frames: Sequence[Image.Image], quality: int = 27, preset: str = "veryslow") -> bytes:
    """An MP4 of H.264 (libx264, yuv420p, one thread) at `FPS`; `quality` is x264's crf.

    The same frames give the same pictures but not always the same bytes: with frames as small as these, what x264's
    look-ahead (mbtree) plans differs by a bit now and then, most often where the whole frame changes.
    """
    import av
    from av.bitstream import BitStreamFilterContext

    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, FPS)
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.options = {"crf": str(quality), "preset": preset, "tune": "animation", "threads": "1"}
        stream.codec_context.gop_size = 250
        # x264's own advertisement would be a fifth of such a small file.
        keep = BitStreamFilterContext("filter_units=remove_types=6", stream)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_image(frame)
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            for packet in stream.encode(picture):
                container.mux(keep.filter(packet))
        for packet in stream.encode():
            container.mux(keep.filter(packet))
    return sink.getvalue()


def decode(video: bytes) -> list[np.ndarray]:
    """All frames, RGB uint8 [H, W, 3]."""
    import av

    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def sampled(count: int, wanted: int = SAMPLED) -> list[int]:
    """Numbers of `wanted` frames spread evenly from the first to the last, as uniform sampling takes them.

    >>> sampled(16)
    [0, 2, 4, 6, 8, 10, 12, 15]
    """
    return [math.floor(i * (count - 1) / (wanted - 1) + 1e-6) for i in range(wanted)]
