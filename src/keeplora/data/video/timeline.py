"""When every frame of a video is shown, found from its packets without decoding them."""

from __future__ import annotations

import math
import re
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from keeplora.data.video.source import Opened, VideoError, brief

#: Time stamps of an AVI file are of decoding; where frames change places, those of H.264 tell nothing.
_UNTIMED_FORMATS = frozenset({"avi"})
_REORDERING = frozenset({"h264", "hevc", "vvc"})
_REMEMBERED_BYTES = 32 << 20


class Key(NamedTuple):
    """A packet that decoding can start at.

    ``open``: an H.264 key after which pictures may still refer to those before it, or mark them as done with. Those that
    are shown after it are right even so, if what stands before it is in the decoder.
    """

    pts: int
    dts: int | None
    open: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """Frames in the order they are shown.

    Attributes:
        pts: time stamp of each, ascending and all different, in units of ``tick`` seconds.
        keys: where decoding can start, in ascending order of ``pts``.
        tick: seconds.
        tail: how long the last frame is shown, in ticks.
        timed: False where the container tells no times: ``pts`` are then the frames' numbers as the decoder gives them.
    """

    pts: array[int]
    keys: tuple[Key, ...]
    tick: float
    tail: int
    timed: bool

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def cut_out(self) -> bool:
        """Whether the first frames may refer to what is not there; the decoder must not stop at every fault then."""
        return self.keys[0].open

    @property
    def last(self) -> float:
        """Seconds from the start of the first frame to the start of the last."""
        return (self.pts[-1] - self.pts[0]) * self.tick

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return (self.pts[-1] - self.pts[0] + self.tail) * self.tick

    @property
    def fps(self) -> float:
        """Frames a second, on average."""
        return len(self.pts) / self.duration

    def time(self, index: int) -> float:
        """When frame ``index`` starts, in seconds from the first."""
        return (self.pts[index] - self.pts[0]) * self.tick

    def index_at(self, seconds: float) -> int:
        """The number of the last frame that starts at ``seconds`` or before.

        Time stamps are rounded to ticks, so one that lies up to a tick after the moment asked for counts as being on it,
        unless ticks are as long as frames.
        """
        slack = 1.0 if self.tick <= 0.001 else 1e-6
        return max(0, bisect_right(self.pts, self.pts[0] + seconds / self.tick + slack) - 1)

    def key_before(self, index: int) -> int:
        """The number of the last key at frame ``index`` or before."""
        return max(0, bisect_right(self.keys, self.pts[index], key=lambda key: key.pts) - 1)

    def has_key(self, pts: int) -> bool:
        """Whether decoding can start at this time stamp."""
        at = bisect_left(self.keys, pts, key=lambda key: key.pts)
        return at < len(self.keys) and self.keys[at].pts == pts

    @property
    def nbytes(self) -> int:
        return self.pts.itemsize * len(self.pts) + 200 * len(self.keys) + 200


def untimed(video: Opened) -> bool:
    """Whether the container's time stamps are not to be used."""
    formats = set(video.container.format.name.split(","))
    return bool(formats & _UNTIMED_FORMATS) and codec_of(video) in _REORDERING


def codec_of(video: Opened) -> str:
    """FFmpeg's name of the compression, whichever program undoes it."""
    return video.stream.codec_context.codec.canonical_name


def hidden(codec: str, packet: Any) -> bool:
    """Whether a packet gives no frame to show: outside an edit list, or VP8's frame that is only referred to."""
    return packet.is_discard or (codec == "vp8" and packet.size > 0 and not memoryview(packet)[0] & 0x10)


def scan(video: Opened) -> Timeline | None:
    """Read every packet's time stamp; the container must be fresh, and is used up.

    Returns:
        None where the container tells no time stamps, or none to rely on.

    Raises:
        VideoError: not one frame.
    """
    from av.error import FFmpegError

    stream, codec = video.stream, codec_of(video)
    is_open = _open_test(stream.codec_context.extradata) if codec == "h264" else lambda packet: False
    found: array[int] = array("q")
    keys: list[Key] = []
    latest, tail, decoded_last = -math.inf, 0, -math.inf
    try:
        for packet in video.container.demux(stream):
            if packet.size == 0:
                continue
            pts, dts = packet.pts, packet.dts
            # a clock that starts anew, as where recordings are joined, tells no order either
            if pts is None or (dts is not None and dts < decoded_last):
                return None
            decoded_last = decoded_last if dts is None else dts
            if packet.is_keyframe:
                keys.append(Key(pts, dts, is_open(packet)))
            if not hidden(codec, packet):
                found.append(pts)
                if pts >= latest:
                    latest, tail = pts, packet.duration or 0
    except FFmpegError as error:
        raise VideoError(f"{video.where}: damaged ({brief(error)}); copy it again or delete it") from error
    if not keys or not found:
        raise VideoError(f"{video.where}: no frames in the video; copy it again or delete it")
    # pictures before the first key, as in a piece cut out of a broadcast, refer to what is not there
    shown = array("q", sorted({pts for pts in found if pts >= keys[0].pts}))
    if not shown:
        raise VideoError(f"{video.where}: no frames in the video; copy it again or delete it")
    tick = float(stream.time_base or 1)
    if tail <= 0:
        tail = _usual(shown, tick, video)
    return Timeline(shown, tuple(sorted(set(keys), key=lambda key: key.pts)), tick, tail, True)


def _open_test(extradata: bytes | None) -> Callable[[Any], bool]:
    """Tells whether an H.264 packet is without an instantaneous refresh (a unit of type 5), after which nothing refers back."""
    if extradata and extradata[0] == 1 and len(extradata) > 4:  # units with their lengths, as in MP4 and Matroska
        size = (extradata[4] & 3) + 1

        def types(data: bytes) -> Iterator[int]:
            at = 0
            while at + size < len(data):
                yield data[at + size] & 31
                at += size + int.from_bytes(data[at : at + size], "big")
    else:  # units between start codes

        def types(data: bytes) -> Iterator[int]:
            return (data[match.end()] & 31 for match in re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL))

    return lambda packet: 5 not in types(bytes(packet))


def _usual(shown: array[int], tick: float, video: Opened) -> int:
    """How long a frame is shown, in ticks."""
    if len(shown) > 1:
        return max(1, round((shown[-1] - shown[0]) / (len(shown) - 1)))
    return max(1, round(1 / (rate(video) * tick)))


def rate(video: Opened) -> float:
    """Frames a second as the header tells; 25 where it does not."""
    told = video.stream.average_rate or video.stream.guessed_rate
    return float(told) if told and 0 < told <= 1000 else 25.0


def counted(video: Opened, frames: int) -> Timeline:
    """The timeline of ``frames`` frames without time stamps."""
    return Timeline(array("q", range(frames)), (Key(0, None),), 1 / rate(video), 1, False)


class Timelines:
    """The timelines found last, under a key that names a file and its state; thread-safe."""

    def __init__(self, max_bytes: int = _REMEMBERED_BYTES) -> None:
        self.max_bytes = max_bytes
        self._held: OrderedDict[Hashable, Timeline] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Timeline | None:
        with self._lock:
            if (found := self._held.get(key)) is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: Hashable, timeline: Timeline) -> None:
        with self._lock:
            if key in self._held or timeline.nbytes > self.max_bytes:
                return
            self._held[key] = timeline
            self._bytes += timeline.nbytes
            while self._bytes > self.max_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
