"""Whether a video can be used: by its header and first frame, or by decoding all of it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from keeplora.data.pictures import DEFAULT_MAX_PIXELS
from keeplora.data.sets import ByteSource
from keeplora.data.video.decode import opener, timeline_of
from keeplora.data.video.matroska import damage, is_matroska
from keeplora.data.video.pixels import Developer
from keeplora.data.video.reader import frames, make_decoder
from keeplora.data.video.source import Opened, VideoError, at_hand, raw
from keeplora.data.video.timeline import codec_of, rate


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What is known of a video.

    Attributes:
        duration: seconds; 0 where the header does not tell.
        frames: how many; as the header tells, or reckoned from duration and rate, unless the check was full.
        width, height: pixels of a frame as it is shown, upright and with square pixels.
        fps: frames a second, on average.
        codec: FFmpeg's name of the compression, such as ``h264``.
    """

    duration: float
    frames: int
    width: int
    height: int
    fps: float
    codec: str


def check_video(source: ByteSource, where: str, *, full: bool, max_pixels: int = DEFAULT_MAX_PIXELS) -> VideoFacts:
    """Raise VideoError unless the video can be used.

    With ``full=False`` the container's header and length are looked at and the first frame is decoded; with ``full=True``
    every frame is decoded, one in memory at a time, every packet must have given its frame, and the checksums of Matroska
    must hold. Other containers have none, and some codecs (HEVC, VP8, VP9) take changed bytes for another picture: there a
    few wrong bytes may go unseen.

    Raises:
        VideoError: missing, damaged, cut short, too large, or no video; it names the file and says how to mend it.
    """
    source = at_hand(source)
    with opener(source, where, max_pixels) as open_video:
        timeline = timeline_of(source, open_video, max_pixels)[0] if full else None
        video = open_video()
        strict = timeline is None or not timeline.cut_out
        decoded = frames(video, make_decoder(video, max_pixels, strict), timeline)
        first = next(decoded, None)
        if first is None:
            raise VideoError(f"{where}: no frames in the video; copy it again or delete it")
        width, height = Developer(video).develop(first.frame).size
        codec = codec_of(video)
        if timeline is None:
            duration, fps = _duration(video), rate(video)
            count = video.stream.frames or round(duration * fps)
            return VideoFacts(duration, max(1, count), width, height, fps, codec)
        with raw(source, where) as file:
            if is_matroska(file) and (fault := damage(file)):
                raise VideoError(f"{where}: {fault}; copy it again or delete it")
        seen = bytearray(len(timeline))
        while first is not None:
            at = bisect_left(timeline.pts, first.pts)
            if at < len(seen) and timeline.pts[at] == first.pts:
                seen[at] = 1
            first = next(decoded, None)
        if (missing := seen.count(0)) > 0:
            raise VideoError(
                f"{where}: {missing} of {len(seen)} frames cannot be decoded, the first of them at "
                f"{timeline.time(seen.index(0)):.2f} s; copy it again or delete it"
            )
        return VideoFacts(timeline.duration, len(timeline), width, height, timeline.fps, codec)


def _duration(video: Opened) -> float:
    stream, container = video.stream, video.container
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0
