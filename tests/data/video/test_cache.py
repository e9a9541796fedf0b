"""The cache of decoded clips: what it gives again, what it forgets, and who shares it."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keeplora.data.sets import ByteSource, FileBytes, HeldBytes
from keeplora.data.video import Clip, FrameCache, Sampling, VideoError, cache, decode_clip
from tests.data.video.video_files import number_of, numbered

TWO = Sampling(frames=2)
CLIP_BYTES = 2 * 96 * 64 * 3


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the clips that were really decoded; files count as long unchanged."""
    monkeypatch.setattr("keeplora.data.digests.SETTLED_NS", -(10**12))
    names: list[str] = []

    def decode(source: ByteSource, where: str, sampling: Sampling, **options: Any) -> Clip:
        names.append(where)
        return decode_clip(source, where, sampling, **options)

    monkeypatch.setattr(cache, "decode_clip", decode)
    return names


@dataclass(frozen=True)
class Row:
    """As a row of a table: bytes that are fetched each time."""

    data: bytes

    def read(self) -> bytes:
        return self.data


def test_the_same_clip_is_decoded_once(tmp_path: Path, decodes: list[str]) -> None:
    path = numbered(tmp_path / "a.mp4", 10)
    frames = FrameCache(10 * CLIP_BYTES)
    first = frames.get(FileBytes(path), "a", TWO)
    assert frames.get(FileBytes(path), "a", TWO) is first
    assert frames.get(FileBytes(tmp_path / "." / "a.mp4"), "again", TWO) is first
    assert decodes == ["a"]
    assert (frames.hits, frames.misses, len(frames), frames.nbytes) == (2, 1, 1, CLIP_BYTES)
    assert [number_of(picture) for picture in first.frames] == [0, 9]


@pytest.mark.parametrize("kind", [HeldBytes, Row])
def test_bytes_are_known_by_what_they_are(kind: Any, tmp_path: Path, decodes: list[str]) -> None:
    data = numbered(tmp_path / "a.mp4", 10).read_bytes()
    other = numbered(tmp_path / "b.mp4", 11).read_bytes()
    frames = FrameCache(10 * CLIP_BYTES)
    first = frames.get(kind(data), "a", TWO)
    assert frames.get(kind(bytes(bytearray(data))), "copy", TWO) is first
    assert frames.get(kind(other), "b", TWO).indices == (0, 10)
    assert decodes == ["a", "b"]


def test_every_setting_is_part_of_the_key(tmp_path: Path, decodes: list[str]) -> None:
    source = FileBytes(numbered(tmp_path / "a.mp4", 10))
    frames = FrameCache(100 * CLIP_BYTES)
    assert len(frames.get(source, "frames", TWO).frames) == 2
    assert len(frames.get(source, "more frames", Sampling(frames=3)).frames) == 3
    assert frames.get(source, "method", Sampling("segment", 2)).indices == (2, 7)
    assert frames.get(source, "smaller", TWO, max_side=48).frames[0].size == (48, 32)
    with pytest.raises(VideoError, match="more than max_pixels"):
        frames.get(source, "too large", TWO, max_pixels=100)
    assert decodes == ["frames", "more frames", "method", "smaller", "too large"]
    assert len(frames) == 4


def test_a_file_that_changed_is_decoded_again(tmp_path: Path, decodes: list[str]) -> None:
    path = numbered(tmp_path / "a.mp4", 10)
    frames = FrameCache(10 * CLIP_BYTES)
    assert frames.get(FileBytes(path), "a", TWO).indices == (0, 9)
    numbered(path, 6)
    assert frames.get(FileBytes(path), "a", TWO).indices == (0, 5)
    path.unlink()
    with pytest.raises(VideoError, match="does not exist"):
        frames.get(FileBytes(path), str(path), TWO)


def test_a_file_that_has_just_been_written_is_not_kept(tmp_path: Path) -> None:
    """A second change within one tick of the file system's clock would leave no trace."""
    path = numbered(tmp_path / "a.mp4", 10)
    frames = FrameCache(10 * CLIP_BYTES)
    frames.get(FileBytes(path), "a", TWO)
    assert len(frames) == 0


def test_the_clip_used_longest_ago_goes_first(tmp_path: Path, decodes: list[str]) -> None:
    sources = {name: FileBytes(numbered(tmp_path / f"{name}.mp4", 5 + i)) for i, name in enumerate("abc")}
    frames = FrameCache(2 * CLIP_BYTES)
    for name in "aba" + "c" + "a" + "b":
        frames.get(sources[name], name, TWO)
        assert frames.nbytes <= frames.max_bytes
        assert frames.nbytes == len(frames) * CLIP_BYTES
    assert "".join(decodes) == "abcb"  # c takes b's place, for a was used last; then b takes c's


def test_what_is_too_large_is_not_kept(tmp_path: Path, decodes: list[str]) -> None:
    source = FileBytes(numbered(tmp_path / "a.mp4", 10))
    for size in (0, CLIP_BYTES - 1):
        frames = FrameCache(size)
        frames.get(source, "a", TWO)
        frames.get(source, "a", TWO)
        assert (len(frames), frames.nbytes) == (0, 0)
    assert decodes == ["a"] * 4


def test_a_copy_for_a_worker_is_empty(tmp_path: Path, decodes: list[str]) -> None:
    source = FileBytes(numbered(tmp_path / "a.mp4", 10))
    frames = FrameCache(10 * CLIP_BYTES)
    frames.get(source, "a", TWO)
    copy = pickle.loads(pickle.dumps(frames))
    assert (len(copy), copy.nbytes, copy.max_bytes, copy.hits) == (0, 0, frames.max_bytes, 0)
    assert len(pickle.dumps(frames)) < 200
    copy.get(source, "a", TWO)
    assert decodes == ["a", "a"]


def test_a_forked_process_does_not_wait_for_its_parents_threads(tmp_path: Path, decodes: list[str]) -> None:
    source = FileBytes(numbered(tmp_path / "a.mp4", 10))
    frames = FrameCache(10 * CLIP_BYTES)
    frames.get(source, "a", TWO)
    frames._lock.acquire()  # as if held by another thread at the time of the fork
    frames._process = -1
    assert frames.get(source, "a", TWO).indices == (0, 9)
    assert decodes == ["a", "a"]


def test_threads_share_one_decode(tmp_path: Path, decodes: list[str]) -> None:
    sources = [FileBytes(numbered(tmp_path / f"{i}.mp4", 6 + i)) for i in range(3)]
    frames = FrameCache(100 * CLIP_BYTES)
    found: list[tuple[int, Clip]] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for i in range(12):
            which = (number + i) % 3
            found.append((which, frames.get(sources[which], str(which), TWO)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decodes) == ["0", "1", "2"]
    assert len(found) == 96
    assert all(clip.indices == (0, 5 + which) for which, clip in found)
    assert frames.hits + frames.misses == 96


def test_a_failure_is_not_kept_and_frees_those_who_wait(tmp_path: Path, decodes: list[str]) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video" * 100)
    frames = FrameCache(100 * CLIP_BYTES)
    told: list[str] = []

    def work() -> None:
        try:
            frames.get(FileBytes(path), "a", TWO)
        except VideoError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(told) == 4
    assert len(frames) == 0
