"""What a header tells, digests, the optional package, and files that would lead elsewhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from keeplora.data.sets import FileBytes, HeldBytes
from keeplora.data.video import (
    VIDEO_SUFFIXES,
    Sampling,
    VideoError,
    VideoFacts,
    check_video,
    decode_clip,
    is_video,
    video_digest,
)  # fmt: skip
from keeplora.data.video.timeline import Timelines, counted
from keeplora.errors import DataError, KeepLoraError
from tests.data.video.video_files import draw, encode, numbered


@pytest.mark.parametrize("full", [False, True])
def test_facts(full: bool, tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.mp4", 50, rate=20, matrix=(0, 1, -1, 0), aspect=Fraction(3, 2))
    facts = check_video(FileBytes(path), "a.mp4", full=full)
    assert facts == VideoFacts(2.5, 50, 64, 144, 20.0, "h264")
    assert check_video(HeldBytes(path.read_bytes()), "a.mp4", full=full) == facts


def test_facts_of_a_stream_without_header(tmp_path: Path) -> None:
    source = FileBytes(numbered(tmp_path / "a.h264", 50, form="h264"))
    assert check_video(source, "a", full=False).duration == 0.0
    assert check_video(source, "a", full=True) == VideoFacts(2.0, 50, 96, 64, 25.0, "h264")


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    data = bytes(range(256)) * 9000
    path.write_bytes(data)
    assert video_digest(FileBytes(path)) == video_digest(HeldBytes(data)) == hashlib.sha256(data).hexdigest()
    with pytest.raises(VideoError, match=r"gone\.mp4: does not exist"):
        video_digest(FileBytes(tmp_path / "gone.mp4"))


def test_files_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(tmp_path / "a.mp4", 10)

    def never(_: FileBytes) -> bytes:
        raise AssertionError("read whole")

    monkeypatch.setattr(FileBytes, "read", never)
    decode_clip(FileBytes(path), "a.mp4", Sampling())
    check_video(FileBytes(path), "a.mp4", full=True)
    video_digest(FileBytes(path))


def test_other_sources_are_fetched_once(tmp_path: Path) -> None:
    data = numbered(tmp_path / "a.mp4", 10).read_bytes()
    reads = []

    class Row:
        def read(self) -> bytes:
            reads.append(1)
            return data

    decode_clip(Row(), "row 1", Sampling())
    assert len(reads) == 1
    check_video(Row(), "row 1", full=True)
    assert len(reads) == 2


def test_suffixes() -> None:
    assert all(is_video(f"a/b{suffix.upper()}") for suffix in VIDEO_SUFFIXES)
    assert not any(map(is_video, ("a.png", "a.gif", "mp4", "a.mp4.txt", "")))


def test_errors_are_of_data() -> None:
    assert issubclass(VideoError, DataError)


def test_without_av(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(KeepLoraError, match=r'^reading videos needs the package av: pip install "keeplora\[video\]"$'):
        decode_clip(FileBytes(tmp_path / "a.mp4"), "a.mp4", Sampling())
    with pytest.raises(KeepLoraError, match="needs the package av"):
        check_video(FileBytes(tmp_path / "a.mp4"), "a.mp4", full=False)


def test_an_old_av(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("av.__version__", "17.1.0")
    with pytest.raises(KeepLoraError, match=r'^the package av 17\.1\.0 is too old .*: pip install -U "av>=18"$'):
        decode_clip(FileBytes(tmp_path / "a.mp4"), "a.mp4", Sampling())


def test_av_is_imported_when_a_video_is_read_and_not_before() -> None:
    code = "import sys, keeplora.data.video; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_second_video_stream_is_passed_over(tmp_path: Path) -> None:
    """The stream marked as the default one is shown, as by players."""
    import av

    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size, default in (((32, 32), False), ((96, 64), True)):
            stream: Any = container.add_stream("libx264", rate=25)
            stream.width, stream.height = size
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
            streams.append(stream)
        for i in range(5):
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(i, (stream.width, stream.height)))))
        for stream in streams:
            container.mux(stream.encode())
    facts = check_video(FileBytes(path), "two.mkv", full=True)
    assert (facts.width, facts.height, facts.frames) == (96, 64, 5)


def test_a_playlist_does_not_lead_to_other_files(tmp_path: Path) -> None:
    """Formats that name further files or addresses are not opened, whatever the file is called."""
    encode(tmp_path / "secret.ts", (draw(i) for i in range(5)))
    lists = {
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile secret.ts\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    }
    for name, text in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        for source in (FileBytes(path), HeldBytes(text.encode())):
            with pytest.raises(VideoError, match="not a video that can be read"):
                decode_clip(source, str(path), Sampling())


def test_what_is_known_of_files_is_bounded() -> None:
    class Video:
        class stream:
            average_rate = Fraction(25)

    one = counted(Video, 1000)  # type: ignore[arg-type]
    held = Timelines(max_bytes=3 * one.nbytes)
    for name in "abcd":
        held.put(name, one)
        held.get("a")
    assert [held.get(name) is not None for name in "abcd"] == [True, False, True, True]
    held.put("large", counted(Video, 10_000))  # type: ignore[arg-type]
    assert held.get("large") is None
