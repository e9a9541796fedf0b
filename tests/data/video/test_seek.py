"""A frame reached by seeking is the frame that decoding from the start gives, bit for bit, and costs little."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from keeplora.data.sets import FileBytes
from keeplora.data.video import Sampling, VideoError, all_frames, check_video, decode, decode_clip, reader
from keeplora.data.video.pixels import Developer
from keeplora.data.video.timeline import Timeline
from tests.data.video.video_files import number_of, numbered
from tests.data.video.zoo import OPEN_GOP

GOP = 10
FRAMES = 200
KINDS: dict[str, dict[str, Any]] = {
    "closed.mp4": {},
    "bframes.mkv": {"bframes": 3},
    "open.mp4": {"options": {"x264-params": OPEN_GOP.replace("12", str(GOP)) + ":b-pyramid=normal"}},
    "open.ts": {"options": {"x264-params": OPEN_GOP.replace("12", str(GOP))}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={GOP}"}},
    "four.avi": {"codec": "mpeg4", "bframes": 2},
    "vfr.mp4": {"stamps": [i * i + 7 for i in range(FRAMES)], "tick": Fraction(1, 1000)},
    "two.mpg": {"codec": "mpeg2video", "bframes": 2},
}


@pytest.fixture(scope="module")
def long_videos(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[FileBytes, list[tuple[float, bytes]]]]:
    folder = tmp_path_factory.mktemp("long")
    made: dict[str, tuple[FileBytes, list[tuple[float, bytes]]]] = {}

    def get(name: str) -> tuple[FileBytes, list[tuple[float, bytes]]]:
        if name not in made:
            source = FileBytes(numbered(folder / name, FRAMES, (64, 48), gop=GOP, **KINDS[name]))
            made[name] = source, [(time, picture.tobytes()) for time, picture in all_frames(source, name)]
            assert len(made[name][1]) == FRAMES
        return made[name]

    return get


samplings = st.one_of(
    st.builds(Sampling, st.sampled_from(["uniform", "segment"]), st.integers(1, 30)),
    st.builds(Sampling, st.just("fps"), st.integers(1, 30), st.floats(0.05, 40)),
)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sampling=samplings)
def test_seeked_frames_are_those_of_a_full_decode(name: str, sampling: Sampling, long_videos: Any) -> None:
    source, every = long_videos(name)
    clip = decode_clip(source, name, sampling)
    for time, index, picture in zip(clip.times, clip.indices, clip.frames):
        assert picture.tobytes() == every[index][1]
        assert time == every[index][0]


class Counted:
    """Stands for a decoded frame, so that those alive can be counted."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame


class Watch:
    """How many frames came out of decoders, and how many frames and pictures were alive at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.most_frames = self.most_pictures = 0
        self.frames: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pictures: list[weakref.ref[Image.Image]] = []
        real_frames, real_develop = reader.frames, Developer.develop

        def frames(*args: Any, **options: Any) -> Iterator[reader.Decoded]:
            for pts, frame in real_frames(*args, **options):
                counted = Counted(frame)
                self.frames.add(counted)
                self.decoded += 1
                self.most_frames = max(self.most_frames, len(self.frames))
                yield reader.Decoded(pts, counted)
                del counted, frame

        def develop(developer: Developer, counted: Counted) -> Image.Image:
            picture = real_develop(developer, counted.frame)
            self.pictures = [ref for ref in self.pictures if ref() is not None] + [weakref.ref(picture)]
            self.most_pictures = max(self.most_pictures, len(self.pictures))
            return picture

        for module in ("reader", "decode", "check"):
            monkeypatch.setattr(f"keeplora.data.video.{module}.frames", frames)
        monkeypatch.setattr(Developer, "develop", develop)


@pytest.mark.parametrize(("name", "groups"), [("closed.mp4", 1), ("bframes.mkv", 1), ("open.mp4", 2), ("vp9.webm", 1)])
def test_a_frame_costs_no_more_than_its_group_of_pictures(
    name: str, groups: int, long_videos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = long_videos(name)
    watch = Watch(monkeypatch)
    clip = decode_clip(source, name, Sampling(frames=6))
    assert watch.decoded <= 6 * groups * (GOP + 1) < FRAMES
    assert watch.most_frames <= 3  # the last one asked for, the last one out, and the one before it
    assert watch.most_pictures == len(set(clip.indices))
    assert [number_of(picture) for picture in clip.frames] == [0, 39, 79, 119, 159, 199]


def test_neighbouring_frames_are_decoded_once(long_videos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = long_videos("closed.mp4")
    watch = Watch(monkeypatch)
    decode_clip(source, "closed.mp4", Sampling("fps", FRAMES, 25))
    assert watch.decoded == FRAMES


@pytest.mark.parametrize("name", ["closed.mp4", "open.ts", "four.avi"])
def test_the_full_check_holds_a_frame_at_a_time(name: str, long_videos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = long_videos(name)
    watch = Watch(monkeypatch)
    assert check_video(source, name, full=True).frames == FRAMES
    assert watch.decoded >= FRAMES
    assert watch.most_frames <= 2
    assert watch.most_pictures == 1


def test_a_header_check_decodes_one_frame(long_videos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = long_videos("bframes.mkv")
    watch = Watch(monkeypatch)
    check_video(source, "bframes.mkv", full=False)
    assert watch.decoded == 1


def test_an_unchanged_file_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeplora.data.digests.SETTLED_NS", -(10**12))
    path = numbered(tmp_path / "a.mp4", 20)
    scans = []
    real = decode.scan

    def scan(video: Any) -> Timeline | None:
        scans.append(video.where)
        return real(video)

    monkeypatch.setattr(decode, "scan", scan)
    for _ in range(3):
        decode_clip(FileBytes(path), "a.mp4", Sampling(frames=2))
    assert scans == ["a.mp4"]
    numbered(path, 12)
    assert decode_clip(FileBytes(path), "a.mp4", Sampling(frames=2)).indices == (0, 11)
    assert scans == ["a.mp4"] * 2


def test_a_container_that_cannot_seek_is_read_from_its_start(long_videos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, every = long_videos("closed.mp4")

    def fail(self: Any, *_: Any) -> None:
        raise reader._SeekFailed

    monkeypatch.setattr(reader.Reader, "_seek", fail)
    clip = decode_clip(source, "closed.mp4", Sampling(frames=5))
    assert [picture.tobytes() for picture in clip.frames] == [every[index][1] for index in clip.indices]
    assert len(set(clip.indices)) == 5


@pytest.mark.parametrize("off", [-30, 30, 1])
def test_a_seek_that_lands_elsewhere_is_noticed(off: int, long_videos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers find their keys more or less well; what comes out must not depend on it."""
    source, every = long_videos("open.mp4")
    real = reader.Reader._seek

    def astray(self: Any, stamp: int, goal: Any) -> None:
        real(self, max(0, stamp + off * GOP * 512 // 10), goal)

    monkeypatch.setattr(reader.Reader, "_seek", astray)
    clip = decode_clip(source, "open.mp4", Sampling("segment", frames=7))
    assert [picture.tobytes() for picture in clip.frames] == [every[index][1] for index in clip.indices]
    assert clip.indices == tuple(int(FRAMES * (2 * i + 1) / 14) for i in range(7))


def test_damage_is_met_only_on_the_way_to_a_frame(tmp_path: Path) -> None:
    path = numbered(tmp_path / "hurt.mp4", 60, (160, 128), gop=GOP)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) * 3 // 4
    data[at : at + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(data)
    source = FileBytes(path)
    ends = decode_clip(source, "hurt.mp4", Sampling(frames=2))
    assert [number_of(picture) for picture in ends.frames] == [0, 59]
    with pytest.raises(VideoError, match=r"^hurt\.mp4: damaged at \d\.\d\d s .*; copy it again or delete it$"):
        check_video(source, "hurt.mp4", full=True)


def test_a_frame_that_its_packet_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full check refuses; a sample shows what a player would: the frame before, or the first there is."""
    source = FileBytes(numbered(tmp_path / "a.mp4", 30))
    real = reader.frames

    def gaps(*args: Any) -> Iterator[reader.Decoded]:
        return (found for found in real(*args) if found.pts not in (0, 13 * 512, 14 * 512))

    for module in ("reader", "decode", "check"):
        monkeypatch.setattr(f"keeplora.data.video.{module}.frames", gaps)
    clip = decode_clip(source, "a.mp4", Sampling("fps", frames=30, fps=25))
    assert clip.indices == (1, *range(1, 13), 12, 12, *range(15, 30))
    assert [number_of(picture) for picture in clip.frames] == list(clip.indices)
    told = r"^a\.mp4: 3 of 30 frames cannot be decoded, the first of them at 0\.00 s; copy it again or delete it$"
    with pytest.raises(VideoError, match=told):
        check_video(source, "a.mp4", full=True)


def test_frames_are_made_smaller(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.mp4", 12, (96, 64), matrix=(0, 1, -1, 0))
    clip = decode_clip(FileBytes(path), "a.mp4", Sampling(frames=3), max_side=48)
    assert {picture.size for picture in clip.frames} == {(32, 48)}
    same = decode_clip(FileBytes(path), "a.mp4", Sampling(frames=3), max_side=1000)
    assert {picture.size for picture in same.frames} == {(64, 96)}


def test_few_frames_are_repeated(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.mp4", 3)
    clip = decode_clip(FileBytes(path), "a.mp4", Sampling(frames=8))
    assert clip.indices == (0, 0, 0, 0, 1, 1, 1, 2)
    assert clip.frames[0] is clip.frames[3]
    assert clip.nbytes == 3 * 96 * 64 * 3
    assert clip.fps == pytest.approx(25)
    assert clip.duration == pytest.approx(0.12)
