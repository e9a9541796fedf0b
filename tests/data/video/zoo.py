"""Videos of every odd sort, and what should become of each."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.video.video_files import draw, encode, numbered, sound_only

SIZE = (96, 64)
OPEN_GOP = "keyint=12:min-keyint=12:bframes=3:scenecut=0:open-gop=1"


def _same(picture: np.ndarray) -> np.ndarray:
    return picture


@dataclass(frozen=True)
class Good:
    """A video that must be decoded right.

    Attributes:
        make: writes it.
        numbers: what the frames show, in order.
        times: when they start, in seconds.
        seen: what should be seen of a picture that was drawn.
    """

    make: Callable[[Path], Path]
    numbers: list[int] = field(default_factory=lambda: list(range(30)))
    times: list[float] | None = None
    size: tuple[int, int] = SIZE
    seen: Callable[[np.ndarray], np.ndarray] = _same
    alpha: bool = False
    tolerance: float = 4.0

    def expected(self, index: int) -> np.ndarray:
        return self.seen(draw(self.numbers[index], self.size, self.alpha))

    def starts(self) -> list[float]:
        return self.times if self.times is not None else [i / 25 for i in range(len(self.numbers))]


@dataclass(frozen=True)
class Bad:
    """A video that must be refused, by its header (``quick``) or when all of it is decoded."""

    make: Callable[[Path], Path]
    tells: str
    quick: bool = True


def video(name: str, frames: int = 30, size: tuple[int, int] = SIZE, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: numbered(folder / name, frames, size, **options)


def _wider(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    return np.asarray(image.resize((image.width * 3 // 2, image.height), Image.Resampling.BICUBIC))


def _on_white(picture: np.ndarray) -> np.ndarray:
    return np.where(picture[..., 3:] == 0, 255, picture[..., :3]).astype(np.uint8)


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def _turned(quarters: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda picture: np.rot90(picture, quarters)


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (320, 320), (9, 200, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


def _clear(folder: Path) -> Path:
    pictures = (draw(i, SIZE, alpha=True) for i in range(30))
    options = {"auto-alt-ref": "0"}
    return encode(folder / "clear.webm", pictures, codec="libvpx-vp9", pixels="yuva420p", options=options)


def _joined(folder: Path) -> Path:
    """Two transport streams one after the other: the clock starts anew, and the second has smaller pictures."""
    first = numbered(folder / "first.ts", 10)
    second = encode(folder / "second.ts", (draw(i, (48, 32)) for i in range(10, 20)))
    path = folder / "joined.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def _cut_out(codec: str) -> Callable[[Path], Path]:
    """A piece of a transport stream that begins at an open key frame, as a recording from a broadcast does.

    A picture shown before that key comes after it; and in H.264 one after it speaks of pictures before it.
    """

    def write(folder: Path) -> Path:
        import av

        shape = OPEN_GOP.replace("12", "10") + ":b-adapt=0"
        options = {
            "libx264": {"x264-params": shape + ":b-pyramid=normal"},
            "libx265": {"x265-params": "log-level=none:" + shape},
        }
        whole = numbered(folder / "whole.ts", 48, codec=codec, options=options[codec])
        path = folder / "piece.ts"
        with av.open(str(whole)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            keys, stamps = 0, []
            for packet in source.demux(video=0):
                keys += packet.is_keyframe
                if keys >= 2 and packet.dts is not None:
                    stamps.append(packet.pts)
                    packet.stream = stream
                    target.mux(packet)
        assert min(stamps) < stamps[0]
        return path

    return write


def _hidden(folder: Path) -> Path:
    """VP8 with one picture that is only referred to (its bit to be shown is cleared), as encoders make them."""
    import av

    whole = numbered(folder / "whole.webm", 30, codec="libvpx", options={"auto-alt-ref": "0"})
    path = folder / "hidden.webm"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is None:
                continue
            data = bytearray(bytes(packet))
            if number == 7:
                data[0] &= ~0x10
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, stream
            target.mux(changed)
    return path


def _bytes(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def _part(make: Callable[[Path], Path], share: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = make(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return write


def _noisy(make: Callable[[Path], Path], start: float, end: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = make(folder)
        data = bytearray(path.read_bytes())
        low = int(len(data) * start)
        high = max(low + 1, int(len(data) * end))
        data[low:high] = bytes(
            byte ^ mask for byte, mask in zip(data[low:high], random.Random(0).randbytes(high - low))
        )
        path.write_bytes(data)
        return path

    return write


def _song(folder: Path) -> Path:
    import av

    from tests.data.video.video_files import tone

    path = folder / "song.mp4"
    with av.open(str(path), "w") as container:
        sound, art = container.add_stream("aac", rate=44100), container.add_stream("mjpeg", rate=1)
        art.width = art.height = 320
        art.pix_fmt = "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(_jpeg())
        packet.stream, packet.pts, packet.dts, packet.time_base = art, 0, 0, Fraction(1, 90000)
        container.mux(packet)
        tone(container, sound, 1.0)
    return path


def _folder(folder: Path) -> Path:
    (folder / "clips.mp4").mkdir()
    return folder / "clips.mp4"


def _dangling(folder: Path) -> Path:
    (folder / "link.mp4").symlink_to(folder / "nothing.mp4")
    return folder / "link.mp4"


def _playlist(folder: Path) -> Path:
    """A list that names a good video, which FFmpeg would open by itself."""
    numbered(folder / "part.ts")
    path = folder / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\npart.ts\n#EXT-X-ENDLIST\n")
    return path


_SQUARES = [i * i for i in range(30)]
_FAST = video("fast.mp4", muxer={"movflags": "faststart"}, size=(160, 128))
_TS = video("cut.ts", size=(160, 128))

#: Streams that have no length may end anywhere: what is left of them is a shorter video.
LEFT: dict[str, Callable[[Path], Path]] = {
    "mpegts": _part(_TS, 0.6),
    "live matroska": _part(video("cut2.mkv", size=(160, 128), muxer={"live": "1"}), 0.6),
}

GOOD: dict[str, Good] = {
    "h264 mp4": Good(video("plain.mp4")),
    "b frames, open gop": Good(
        video("open.mp4", 60, options={"x264-params": OPEN_GOP + ":b-pyramid=normal"}), list(range(60))
    ),
    "b frames, open gop, mpegts": Good(
        video("open.ts", 60, options={"x264-params": OPEN_GOP + ":b-pyramid=normal"}), list(range(60))
    ),
    "open gop, hevc": Good(
        video("open.mkv", 60, codec="libx265", options={"x265-params": "log-level=none:" + OPEN_GOP}), list(range(60))
    ),
    "no key frames but the first": Good(
        video("refresh.ts", 60, options={"x264-params": "intra-refresh=1:keyint=12:bframes=0"}), list(range(60))
    ),
    "piece of a broadcast": Good(_cut_out("libx264"), list(range(10, 48))),
    "piece of a broadcast, hevc": Good(_cut_out("libx265"), list(range(10, 48))),
    "joined recordings": Good(_joined, list(range(20)), tolerance=14.0),
    "hevc": Good(video("hevc.mp4", codec="libx265")),
    "hevc, 10 bits": Good(video("ten.mkv", codec="libx265", pixels="yuv420p10le")),
    "hevc, 10 bits, BT.2020": Good(video("wide.mp4", codec="libx265", pixels="yuv420p10le", colour=(9, 1))),
    "h264, 10 bits": Good(video("ten.mp4", pixels="yuv420p10le")),
    "prores, 10 bits": Good(video("ten.mov", codec="prores_ks", pixels="yuv422p10le")),
    "vp9 webm": Good(video("vp9.webm", codec="libvpx-vp9")),
    "vp8 webm": Good(video("vp8.webm", codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"})),
    "vp8 with a hidden picture": Good(_hidden, [*range(7), *range(8, 30)], times=[i / 25 for i in range(30) if i != 7]),
    "av1": Good(video("av1.mp4", codec="libsvtav1")),
    "mpeg-4 part 2": Good(video("four.avi", codec="mpeg4", options={"qscale": "2"}), tolerance=5.0),
    "mpeg-4 part 2, b frames": Good(video("fourb.avi", codec="mpeg4", bframes=2), tolerance=5.0),
    "h264 avi, b frames": Good(video("two.avi", bframes=2)),
    "mpeg-2 program stream": Good(video("two.mpg", codec="mpeg2video", bframes=2), tolerance=5.0),
    "motion jpeg": Good(video("jpeg.avi", codec="mjpeg", pixels="yuvj420p", colour=(5, 2))),
    "flv": Good(video("flash.flv")),
    "gif": Good(video("moving.gif", codec="gif", pixels="rgb8"), tolerance=30.0),
    "raw h264": Good(video("raw.h264", form="h264", bframes=2)),
    "live matroska": Good(video("live.mkv", muxer={"live": "1"})),
    "fragmented mp4": Good(video("pieces.mp4", muxer={"movflags": "frag_keyframe+empty_moov"})),
    "variable frame rate": Good(
        video("vfr.mp4", stamps=_SQUARES, tick=Fraction(1, 1000)), times=[s / 1000 for s in _SQUARES]
    ),
    "variable frame rate, matroska": Good(
        video("vfr.mkv", stamps=_SQUARES, tick=Fraction(1, 1000)), times=[s / 1000 for s in _SQUARES]
    ),
    "rate of 30000/1001": Good(
        video("ntsc.mp4", rate=Fraction(30000, 1001)), times=[i * 1001 / 30000 for i in range(30)]
    ),
    "late start, mpegts": Good(video("late.ts", stamps=[250 + i for i in range(30)])),
    "late start, matroska": Good(video("late.mkv", stamps=[250 + i for i in range(30)])),
    "edit list": Good(
        video(
            "edited.mp4",
            stamps=[i - 10 for i in range(30)],
            muxer={"avoid_negative_ts": "disabled", "use_editlist": "1"},
        ),
        list(range(10, 30)),
    ),
    "odd size, 4:4:4": Good(video("odd.mp4", size=(101, 67), pixels="yuv444p"), size=(101, 67)),
    "odd size, 4:2:0": Good(video("odd.webm", size=(101, 67), codec="libvpx-vp9"), size=(101, 67)),
    "turned by 90": Good(video("right.mp4", matrix=(0, 1, -1, 0)), seen=_turned(-1)),
    "turned by 180": Good(video("over.mp4", matrix=(-1, 0, 0, -1)), seen=_turned(2)),
    "turned by 270": Good(video("left.mov", matrix=(0, -1, 1, 0)), seen=_turned(1)),
    "mirrored": Good(video("mirror.mp4", matrix=(-1, 0, 0, 1)), seen=lambda picture: picture[:, ::-1]),
    "turned and mirrored": Good(
        video("both.mp4", matrix=(0, 1, 1, 0)), seen=lambda picture: picture.transpose(1, 0, 2)
    ),
    "wide pixels": Good(video("wide.mkv", aspect=Fraction(3, 2)), seen=_wider),
    "transparent webm": Good(_clear, alpha=True, seen=_on_white),
    "BT.709": Good(video("hd.mp4", colour=(1, 1))),
    "full range": Good(video("full.mp4", colour=(5, 2))),
    "BT.709, full range": Good(video("hdfull.mp4", colour=(1, 2))),
    "grey": Good(video("grey.mp4", pixels="gray", colour=(2, 2)), seen=_grey),
    "grey, range not told": Good(video("grey.mkv", codec="ffv1", pixels="gray", colour=(2, 0)), seen=_grey),
    "full range, 10 bits": Good(video("full10.mkv", codec="libx265", pixels="yuv420p10le", colour=(5, 2))),
    "rgb": Good(video("rgb.mp4", codec="libx264rgb", pixels="rgb24")),
    "cover picture first": Good(video("cover.mp4", cover=_jpeg())),
    "with sound": Good(video("sound.mp4", sound=True)),
    "one frame": Good(video("one.mp4", 1), [0]),
    "name like an address": Good(video("http:%03d|x y.mp4")),
}

BAD: dict[str, Bad] = {
    "sound only": Bad(lambda folder: sound_only(folder / "song.mp4"), "sound only"),
    "sound and a cover": Bad(_song, "sound and a cover picture only"),
    "no bytes": Bad(_bytes("empty.mp4", b""), "empty"),
    "zeros": Bad(_bytes("zeros.mp4", bytes(20_000)), "not a video"),
    "noise": Bad(_bytes("noise.webm", random.Random(1).randbytes(20_000)), "not a video"),
    "text": Bad(_bytes("text.mp4", b"Dear all,\nthe video follows.\n" * 200), "not a video"),
    "page of a failed download": Bad(
        _bytes("page.mp4", b"<!doctype html><html><body>404</body></html>"), "not a video"
    ),
    "playlist": Bad(_playlist, "not a video"),
    "picture": Bad(_bytes("jpeg.mp4", _jpeg()), r"a picture \(JPEG\)"),
    "mp4 without its index": Bad(_part(video("cut.mp4", size=(160, 128)), 0.6), r"index \(moov\) is lost"),
    "mp4 cut, index first": Bad(_part(_FAST, 0.6), "cut short"),
    "matroska cut": Bad(_part(video("cut.mkv", size=(160, 128)), 0.6), "cut short"),
    "avi cut": Bad(_part(video("cut.avi", codec="mpeg4"), 0.6), "cut short"),
    "mpegts cut": Bad(_part(_TS, 0.6), "damaged|cannot be decoded", False),
    "raw h264 cut": Bad(_part(video("cut.h264", size=(160, 128), form="h264"), 0.6), "damaged after frame", False),
    "noise within, mp4": Bad(_noisy(video("hurt.mp4", size=(160, 128)), 0.4, 0.45), "damaged at", False),
    "noise within, matroska": Bad(_noisy(video("hurt.mkv", size=(160, 128)), 0.4, 0.45), "damaged", False),
    "one byte of hevc, matroska": Bad(_noisy(video("byte.mkv", codec="libx265"), 0.8, 0.8), "damaged between", False),
    "noise within, mpegts": Bad(_noisy(video("hurt.ts", size=(160, 128)), 0.4, 0.5), "damaged", False),
    "noise within, mpeg-2": Bad(_noisy(video("hurt.mpg", codec="mpeg2video"), 0.4, 0.45), "damaged", False),
    "folder": Bad(_folder, "not an ordinary file"),
    "no file": Bad(lambda folder: folder / "gone.mp4", "does not exist"),
    "link to nothing": Bad(_dangling, "link points to"),
    "strip": Bad(video("strip.mp4", 2, (16 * 150, 16)), "strip"),
}
