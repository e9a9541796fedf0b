"""Frames of a video by their number, reached by seeking, with one frame in memory at a time."""

from __future__ import annotations

import contextlib
import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from keeplora.data.video.source import Opened, VideoError, brief
from keeplora.data.video.timeline import Timeline


class Decoded(NamedTuple):
    """A frame out of the decoder and its time stamp (its number, where the container has no times)."""

    pts: int
    frame: Any


class Goal(NamedTuple):
    """The key that frames are wanted from, and the one that decoding must start at or before."""

    pts: int
    lead: int


class _SeekFailed(Exception):
    """Decoding from this place does not lead to the frame; an earlier one may."""


def make_decoder(video: Opened, max_pixels: int, strict: bool = True) -> Any:
    """A codec context that stops at damage instead of painting over it, on one thread, so that the outcome is certain."""
    import av
    from av.error import FFmpegError

    codec = video.stream.codec_context
    if video.stream.metadata.get("alpha_mode") == "1" and codec.name in ("vp8", "vp9"):
        # FFmpeg's own decoders leave the transparency out
        with contextlib.suppress(FFmpegError, ValueError):
            clear = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec.name], "r")
            clear.extradata = codec.extradata
            codec = clear
    codec.thread_count = 1
    codec.thread_type = "NONE"
    codec.options = {"max_pixels": str(max_pixels)} | ({"err_detect": "explode"} if strict else {})
    return codec


def frames(
    video: Opened, decoder: Any, timeline: Timeline | None = None, goal: Goal | None = None
) -> Iterator[Decoded]:
    """Decode from where the container stands to the end.

    Frames are those from the key of the ``goal`` on (the first key met, without it). What comes before its
    packet is only led through the decoder, and may be faulty; so may pictures that are shown before it and come after it,
    for they refer to what lies before it. Without a ``timeline``, or with one that has no times, frames are numbered.

    Raises:
        VideoError: damage; it names the file and the place.
        _SeekFailed: the container stands after the key that leads to the ``goal``, or its stamps are not the timeline's.
    """
    from av.error import FFmpegError

    timed = timeline if timeline is not None and timeline.timed else None
    number, started, reached = 0, False, False
    packets = video.container.demux(video.stream)
    while True:
        pts, damage, shown = None, None, []
        try:
            packet = next(packets, None)
            if packet is None:
                return
            pts, last = packet.pts, packet.size == 0 and packet.pts is None and packet.dts is None
            if packet.size == 0 and not last:  # AVI's way to say that the picture stays
                continue
            if last and not started:
                return
            if not started and not packet.is_keyframe:
                continue
            if timed is not None and packet.is_keyframe and not reached:
                if pts is None or not timed.has_key(pts):  # a stamp guessed from the middle of a stream
                    if started:
                        raise _SeekFailed
                    continue
                goal = goal or Goal(pts, pts)
                if pts > (goal.pts if started else goal.lead):
                    raise _SeekFailed
                reached = pts == goal.pts
            started = True
            if packet.is_corrupt and reached:
                raise VideoError(f"{video.where}: damaged{_place(video, pts, number)}; copy it again or delete it")
            shown = decoder.decode(None if last else packet)
        except FFmpegError as error:
            if started and goal is not None and (not reached or (pts is not None and pts < goal.pts)):
                continue
            damage = VideoError(
                f"{video.where}: damaged{_place(video, pts, number)} ({brief(error)}); copy it again or delete it"
            )
            damage.__cause__ = error
            # frames before the fault are still in the decoder, waiting for their turn
            with contextlib.suppress(FFmpegError):
                shown = [frame for frame in decoder.decode(None) if frame.pts != pts]
        for frame in shown:
            stamp = frame.pts
            if timed is not None and (stamp is None or goal is None or stamp < goal.pts):
                continue
            if frame.is_corrupt:
                raise VideoError(f"{video.where}: damaged{_place(video, stamp, number)}; copy it again or delete it")
            yield Decoded(stamp if timed is not None else number, frame)
            number += 1
        if damage is not None:
            raise damage
        if last:
            return


def _place(video: Opened, pts: int | None, number: int) -> str:
    if pts is None or not video.stream.time_base:
        return f" after frame {number}"
    return f" at {float((pts - (video.stream.start_time or 0)) * video.stream.time_base):.2f} s"


class Reader:
    """Gives the frames of a video by number; quickest when asked in ascending order.

    Args:
        open_video: opens the video afresh.
        video: one that was opened before, and read but not decoded.
    """

    def __init__(
        self, open_video: Callable[[], Opened], timeline: Timeline, max_pixels: int, video: Opened | None = None
    ) -> None:
        self.timeline, self.max_pixels, self._open = timeline, max_pixels, open_video
        self.decoded = 0  # frames out of the decoder so far
        self._video = video
        self._strict = True
        self._decoder: Any = None if video is None else make_decoder(video, max_pixels)
        self._flow: Iterator[Decoded] = iter(())
        self._at: Decoded | None = None  # the frame that came out last

    def fetch(self, index: int) -> tuple[int, Any]:
        """Frame ``index`` as an `av.VideoFrame`; where its packet gives none, the frame before it. With its number.

        Raises:
            VideoError: the way to it is damaged.
        """
        target, key = self.timeline.pts[index], self.timeline.key_before(index)
        if self._at is not None and self._at.pts == target:
            return index, self._at.frame
        stands_well = self._at is not None and self.timeline.keys[key].pts <= self._at.pts < target
        damage: VideoError | None = None
        before: Decoded | None = None
        for start in itertools.chain([None] if stands_well else (), self._starts(key)):
            try:
                if start is not None:
                    start()
                before = self._at
                found, before = self._forward(target)
            except _SeekFailed:
                continue
            except VideoError as error:
                if damage is not None:  # the same from two places
                    raise damage from None
                damage = error
                continue
            if found is not None:
                return index, found.frame
        if damage is not None:
            raise damage
        instead = before or self._at
        if instead is None:
            raise VideoError(f"{self.video.where}: no frame can be decoded; copy it again or delete it")
        return bisect_left(self.timeline.pts, instead.pts), instead.frame

    @property
    def video(self) -> Opened:
        """What is read from at present."""
        return self._video or self._open_video(strict=True)

    def _forward(self, target: int) -> tuple[Decoded | None, Decoded | None]:
        """The frame of this time stamp, or None; and the last one before it."""
        before = self._at
        for decoded in self._flow:
            self.decoded += 1
            self._at = decoded
            if decoded.pts >= target:
                return (decoded if decoded.pts == target else None), before
            before = decoded
        return None, before

    def _starts(self, key: int) -> Iterator[Callable[[], None]]:
        """Ways to come before a frame whose last key is number ``key``: the shortest first, from the file's start last."""
        keys, back = self.timeline.keys, 1
        while self.timeline.timed and key >= 0:
            lead = key - 1 if keys[key].open else key
            if lead < 0:
                break
            # containers look their keys up by one stamp or the other, and some land behind the key they find
            stamps = (keys[lead].pts, keys[lead].dts, keys[max(0, lead - 1)].pts, keys[max(0, lead - 3)].pts)
            for stamp in dict.fromkeys(stamp for stamp in stamps if stamp is not None):
                yield functools.partial(self._seek, stamp, Goal(keys[key].pts, keys[lead].pts))
            key, back = key - back, 2 * back
        yield self._start_over

    def _seek(self, stamp: int, goal: Goal) -> None:
        from av.error import FFmpegError

        if not self._strict:
            self._open_video(strict=True)
        video, self._at = self.video, None
        try:
            video.container.seek(stamp, stream=video.stream)
        except FFmpegError as error:
            raise _SeekFailed from error
        self._decoder.flush_buffers()
        self._flow = frames(video, self._decoder, self.timeline, goal)

    def _start_over(self) -> None:
        video = self._open_video(strict=not self.timeline.cut_out)
        self._flow = frames(video, self._decoder, self.timeline)

    def _open_video(self, strict: bool) -> Opened:
        self._video, self._at, self._strict = self._open(), None, strict
        self._decoder = make_decoder(self._video, self.max_pixels, strict)
        return self._video
