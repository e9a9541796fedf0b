"""What is remembered of files: never read twice without need, never believed once the file has changed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from picture_files import Tree, encode

from keeplora.data import digests, load_task
from keeplora.data.digests import FileFacts, file_digests, holds, read_settled
from keeplora.data.sets import FileBytes
from keeplora.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own that also remembers files that were written just now."""
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEEPLORA_NO_CACHE", raising=False)
    monkeypatch.setattr(digests, "SETTLED_NS", -(10**9))
    return tmp_path / "cache" / "files.sqlite"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that `file_digests` really read."""
    found: list[str] = []
    original = digests._sha256

    def counted(path: str) -> str:
        found.append(os.path.basename(path))
        return original(path)

    monkeypatch.setattr(digests, "_sha256", counted)
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{name}.bin" for name in "abc"]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * 1000)
    return [str(path) for path in paths]


def true_digests(paths: list[str]) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def test_a_second_run_reads_nothing(files, reads):
    assert file_digests(files) == true_digests(files)
    assert sorted(reads) == ["a.bin", "b.bin", "c.bin"]
    reads.clear()
    assert file_digests(files) == true_digests(files)
    assert reads == []


def later_write(path: str, data: bytes) -> None:
    """Write so that at least one tick of the file system's clock has passed since the last change."""
    before = os.stat(path).st_ctime_ns
    while True:
        Path(path).write_bytes(data)
        if os.stat(path).st_ctime_ns != before:
            return
        time.sleep(0.002)


def restore_mtime(path: str, before: os.stat_result) -> None:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Any] = {
    "another size": lambda path: later_write(path, b"longer" * 1000),
    "same size": lambda path: later_write(path, b"x" * 1000),
    "appended": lambda path: later_write(path, Path(path).read_bytes() + b"!"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_file_is_read_again_and_only_that_one(files, reads, change):
    file_digests(files)
    reads.clear()
    change(files[1])
    assert file_digests(files) == true_digests(files)
    assert reads == ["b.bin"]
    reads.clear()
    assert file_digests(files) == true_digests(files)  # the new one is remembered
    assert reads == []


@pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")
def test_a_change_of_the_same_size_whose_time_was_turned_back_is_seen(files):
    """What rsync, tar and cp -p do: content of equal size, modification time of the old file."""
    file_digests(files)
    before = os.stat(files[1])
    later_write(files[1], b"x" * 1000)
    restore_mtime(files[1], before)
    after = os.stat(files[1])
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_digests(files) == true_digests(files)


def test_a_file_or_link_that_leads_to_another_of_the_same_size_is_seen(files, tmp_path):
    link = tmp_path / "link.bin"
    link.symlink_to(files[0])
    file_digests([str(link), *files])
    link.unlink()
    link.symlink_to(files[1])
    os.replace(files[2], files[0])
    paths = [str(link), files[0], files[1]]
    assert file_digests(paths) == true_digests(paths)


def test_twins_in_size_and_time_differ_in_their_inode(tmp_path):
    """A link may come to lead from one file to another that was written within the same tick of a coarse clock."""
    (tmp_path / "one").write_bytes(b"1")
    status = os.stat(tmp_path / "one")
    fields = list(status)
    fields[1] += 1  # st_ino
    twin = os.stat_result(fields, {n: getattr(status, n) for n in ("st_mtime_ns", "st_ctime_ns")})
    one, two = digests.Stamp.of(status), digests.Stamp.of(twin)
    assert one[:3] == two[:3]
    assert one != two
    fields[1] = 2**64 - 1  # some systems use the whole range; SQLite has no room for it
    assert digests.Stamp.of(os.stat_result(fields)).inode < 2**63


def test_what_has_just_changed_is_not_remembered(files, reads, monkeypatch):
    """A second change within one tick of the clock would leave every stamp as it was."""
    monkeypatch.setattr(digests, "SETTLED_NS", 2_000_000_000)
    file_digests(files)
    file_digests(files)
    assert len(reads) == 6


def test_a_file_that_changes_while_it_is_read_is_not_remembered(files):
    def read(path: str) -> str:
        later_write(path, b"meanwhile")
        return "half"

    stamp, value = read_settled(files[0], read)
    assert (stamp, value) == (None, "half")
    stamp, _ = read_settled(files[1], lambda path: "whole")
    assert stamp is not None


def test_the_cache_can_be_turned_off(files, reads, cache, monkeypatch):
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    file_digests(files)
    file_digests(files)
    assert len(reads) == 6
    assert not cache.exists()
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    file_digests(files)
    assert cache.exists()


@pytest.mark.parametrize("rubbish", [b"not a database, but long enough to be taken for one" * 50, b""])
def test_a_damaged_cache_is_thrown_away(files, reads, cache, rubbish):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(rubbish)
    assert file_digests(files) == true_digests(files)
    file_digests(files)
    assert len(reads) <= 6
    reads.clear()
    assert file_digests(files) == true_digests(files)
    assert reads == []


def test_a_cache_that_cannot_be_written_stops_nothing(files, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "taken"))
    assert file_digests(files) == true_digests(files)


def test_a_locked_cache_stops_nothing(files, cache, monkeypatch):
    file_digests(files)
    later_write(files[0], b"new" * 1000)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.01))
    other = connect(cache, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert file_digests(files) == true_digests(files)
    finally:
        other.close()


def test_files_that_cannot_be_read_are_left_out(files, tmp_path):
    assert file_digests([*files, str(tmp_path / "none"), str(tmp_path)]) == true_digests(files)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_not_remembered_but_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.bin")
    with open(path, "wb") as handle:
        handle.write(b"content")
    name = os.fsdecode(path)
    for _ in range(2):
        assert file_digests([name]) == {name: hashlib.sha256(b"content").hexdigest()}


def test_kinds_of_facts_are_apart_and_bound_to_the_file(files):
    stamp, _ = read_settled(files[0], lambda path: "")
    assert stamp is not None
    FileFacts("colour-1").remember({files[0]: (stamp, "red")})
    known = FileFacts("colour-1").recall(files)
    assert holds(known, files[0]) == "red"
    assert holds(known, files[1]) is None
    assert FileFacts("colour-2").recall(files) == {}
    os.unlink(files[0])
    assert holds(known, files[0]) is None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The picture files that loading really read."""
    found: list[Path] = []
    original = FileBytes.read

    def counted(self: FileBytes) -> bytes:
        found.append(self.path)
        return original(self)

    monkeypatch.setattr(FileBytes, "read", counted)
    return found


PETS = {"name": "pets", "source": "folder", "path": "pets"}


def test_a_task_is_read_once(pets: Tree, opened):
    first = load_task(PETS, pets.root)
    assert len(opened) == 12
    opened.clear()
    second = load_task(PETS, pets.root)
    assert opened == []
    assert second.fingerprint == first.fingerprint
    changed = pets.root / "pets/train/cat/0.png"
    later_write(str(changed), encode(seed=77))
    third = load_task(PETS, pets.root)
    assert opened == [changed]
    assert third.fingerprint != first.fingerprint


def test_another_check_reads_again(pets: Tree, opened):
    load_task(PETS, pets.root)
    opened.clear()
    full = load_task({**PETS, "check": "full"}, pets.root)
    assert len(opened) == 12
    assert all(entry.pixels for entry in full.train.entries)
    opened.clear()
    again = load_task({**PETS, "check": "full"}, pets.root)
    assert opened == []
    assert [e.pixels for e in again.train.entries] == [e.pixels for e in full.train.entries]
    with pytest.raises(
        DataError, match="more than max_pixels"
    ):  # a smaller limit is not passed by what passed a larger
        load_task({**PETS, "max_pixels": 50}, pets.root)


def test_a_picture_that_was_damaged_since_is_refused(pets: Tree):
    load_task(PETS, pets.root)
    later_write(str(pets.root / "pets/test/dog/1.png"), b"damaged")
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(DataError, match=r"dog/1\.png: not a picture"):
            load_task(PETS, pets.root)
