"""A few frames of a video, in bounded memory however long it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from keeplora.data.digests import Stamp
from keeplora.data.pictures import DEFAULT_MAX_PIXELS
from keeplora.data.sets import ByteSource
from keeplora.data.video.pixels import Developer
from keeplora.data.video.reader import Reader, frames, make_decoder
from keeplora.data.video.sampling import Sampling
from keeplora.data.video.source import Opened, VideoError, at_hand, file_of, opened
from keeplora.data.video.timeline import Timeline, Timelines, counted, scan, untimed

#: A video's packets are read once in a process, its frames' times kept.
_TIMELINES = Timelines()


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: upright RGB with square pixels, all of one size; a frame that was sampled twice is there twice.
        times: when each starts, in seconds from the first frame of the video.
        duration: of the whole video, in seconds.
        fps: frames a second of the whole video, on average.
        indices: number of each frame in the video, from 0.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    duration: float
    fps: float
    indices: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels; a frame that is there twice counts once."""
        return sum(3 * frame.width * frame.height for frame in {id(frame): frame for frame in self.frames}.values())


def decode_clip(
    source: ByteSource,
    where: str,
    sampling: Sampling,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_side: int | None = None,
) -> Clip:
    """Decode the frames that ``sampling`` asks for.

    A first pass reads the time stamps without decoding; each frame is then reached from the key frame before it, and at
    most the frames of the clip and a few of the decoder's are in memory. The frame at a time is the last that starts at it
    or before. The rotation and the shape of pixels that the file states are applied.

    Args:
        source: a file is opened by its path, any other source from memory.
        where: the name that an error gives, usually the file's path.
        sampling: which moments.
        max_pixels: videos of larger frames are refused by their header.
        max_side: frames are resized so that their longer side is at most this.

    Raises:
        VideoError: missing, damaged, cut short, too large, or no video.

    >>> from keeplora.data.sets import FileBytes
    >>> clip = decode_clip(FileBytes(Path("dog.mp4")), "dog.mp4", Sampling(frames=8))  # doctest: +SKIP
    """
    source = at_hand(source)
    with opener(source, where, max_pixels) as open_video:
        timeline, video = timeline_of(source, open_video, max_pixels)
        wanted = [timeline.index_at(time) for time in sampling.times(timeline.duration, timeline.last)]
        reader = Reader(open_video, timeline, max_pixels, video)
        developer: Developer | None = None
        found: dict[int, int] = {}
        pictures: dict[int, Image.Image] = {}
        for index in sorted(set(wanted)):
            found[index], frame = reader.fetch(index)
            if developer is None:
                developer = Developer(reader.video, max_side)
            if found[index] not in pictures:
                pictures[found[index]] = developer.develop(frame)
    indices = tuple(found[index] for index in wanted)
    return Clip(
        frames=tuple(pictures[index] for index in indices),
        times=tuple(timeline.time(index) for index in indices),
        duration=timeline.duration,
        fps=timeline.fps,
        indices=indices,
    )


@contextlib.contextmanager
def opener(source: ByteSource, where: str, max_pixels: int) -> Iterator[Callable[[], Opened]]:
    """Gives a function that opens the video afresh; all that it opened is closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(opened(source, where, max_pixels))


def timeline_of(
    source: ByteSource, open_video: Callable[[], Opened], max_pixels: int
) -> tuple[Timeline, Opened | None]:
    """The times of the video's frames; and the video where it had to be read for them, but not decoded.

    The times of an unchanged file are remembered. A container without time stamps is decoded once to count its frames, none
    of which is kept.
    """
    key = identity(source)
    if key is not None and (known := _TIMELINES.get(key)) is not None:
        return known, None
    video = read = open_video()
    timeline = None if untimed(video) else scan(video)
    if timeline is None:
        video, read = open_video(), None
        count = sum(1 for _ in frames(video, make_decoder(video, max_pixels)))
        if count == 0:
            raise VideoError(f"{video.where}: no frames in the video; copy it again or delete it")
        timeline = counted(video, count)
    # a file that changed meanwhile would be remembered under the wrong stamp
    if key is not None and key == identity(source):
        _TIMELINES.put(key, timeline)
    return timeline, read


def identity(source: ByteSource) -> tuple[str, Stamp] | None:
    """What a file is known by while it stays as it is; None of other sources, and of files too fresh to tell."""
    path = file_of(source)
    if path is None:
        return None
    try:
        stamp = Stamp.of(os.stat(path))
    except OSError:
        return None
    return (path, stamp) if stamp.settled else None


def all_frames(
    source: ByteSource, where: str, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_side: int | None = None
) -> Iterator[tuple[float, Image.Image]]:
    """Every frame from the first to the last with its time in seconds, one in memory at a time.

    Raises:
        VideoError: as `decode_clip`, and where any frame of the video is damaged.
    """
    source = at_hand(source)
    with opener(source, where, max_pixels) as open_video:
        timeline, _ = timeline_of(source, open_video, max_pixels)
        video = open_video()
        developer = Developer(video, max_side)
        decoder = make_decoder(video, max_pixels, strict=not timeline.cut_out)
        for decoded in frames(video, decoder, timeline):
            yield (decoded.pts - timeline.pts[0]) * timeline.tick, developer.develop(decoded.frame)
