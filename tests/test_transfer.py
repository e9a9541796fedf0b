"""Copies to and from an object store: whole, checked, and never over something else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from keeplora.data import remote
from keeplora.data.remote import RemotePath
from keeplora.errors import ConfigError, KeepLoraError
from keeplora.transfer import INCOMPLETE, address, copy, download, refuse_address, upload


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {"ledger/HEAD.json": "head", "ledger/0001-a/tensors.safetensors": "tensors" * 9, "results.json": "{}", ".lock": "1",
             "config.yaml": "a: 1", "ledger/.x.abcdefgh.tmp": "part"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    return tmp_path / "run"


def names(store: MemoryFileSystem) -> list[str]:
    return sorted(name.removeprefix("/bucket/run/") for name in store.find("/bucket"))


WHOLE = ["config.yaml", "ledger/0001-a/tensors.safetensors", "ledger/HEAD.json", "results.json"]


def test_there_and_back(bucket: MemoryFileSystem, run: Path, tmp_path: Path) -> None:
    done = copy(run, "memory://bucket/run")
    assert names(bucket) == WHOLE  # no lock, nothing half-written, no mark
    assert (done.files, done.bytes) == (4, 4 + 63 + 4 + 2)
    copy("memory://bucket/run", tmp_path / "back")
    assert (
        sorted(p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*") if p.is_file())
        == WHOLE
    )
    assert (tmp_path / "back/ledger/0001-a/tensors.safetensors").read_text() == "tensors" * 9


def test_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    copy(run, "memory://bucket/run")
    with pytest.raises(ConfigError, match=r"memory:///bucket/run: holds 4 file\(s\) already"):
        copy(run, "memory://bucket/run")
    (tmp_path / "back").mkdir()
    with pytest.raises(ConfigError, match="back exists; name a new folder"):
        copy("memory://bucket/run", tmp_path / "back")
    with pytest.raises(ConfigError, match="both local folders"):
        copy(run, tmp_path / "other")
    with pytest.raises(ConfigError, match="both addresses"):
        copy("memory://bucket/run", "memory://bucket/other")
    with pytest.raises(KeepLoraError, match="none: holds no files"):
        copy("memory://bucket/none", tmp_path / "x")
    with pytest.raises(KeepLoraError, match="no such folder"):
        copy(tmp_path / "none", "memory://bucket/none")


class Broken(MemoryFileSystem):
    """Refuses the file that `at` names, so many times; `short` cuts it."""

    cachable = False
    at, times, short = "", 0, False
    order: list[str] = []  # noqa: RUF012

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if type(self).at and rpath.endswith(type(self).at) and type(self).times > 0:
            type(self).times -= 1
            raise ConnectionResetError("gone")
        type(self).order.append(rpath)
        if type(self).short:
            self.pipe_file(rpath, b"x")
        else:
            super().put_file(lpath, rpath, *args, **kwargs)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    for name, value in (("at", ""), ("times", 0), ("short", False), ("order", [])):
        monkeypatch.setattr(Broken, name, value)
    return RemotePath(Broken(), "/bucket/run", "memory://")


def test_a_copy_that_fails_is_no_whole_one_and_can_be_completed(
    bucket: MemoryFileSystem, broken: RemotePath, run: Path, tmp_path: Path
) -> None:
    Broken.at, Broken.times = "results.json", 3
    upload(run, broken)
    assert names(bucket) == WHOLE  # three failures are got over
    assert [Path(name).name for name in Broken.order[-2:]] == [
        "HEAD.json",
        "results.json",
    ]  # what says that all is there
    bucket.rm("/bucket", recursive=True)
    Broken.at, Broken.times = "HEAD.json", 4
    with pytest.raises(KeepLoraError, match=r"memory:///bucket/run: the copy failed \(ConnectionResetError: gone\)"):
        upload(run, broken)
    assert INCOMPLETE in names(bucket)
    assert "ledger/HEAD.json" not in names(bucket)
    with pytest.raises(KeepLoraError, match=r"the copy to there did not end \(INCOMPLETE lies in it\)"):
        download(broken, tmp_path / "back")
    upload(run, broken)
    assert names(bucket) == WHOLE
    bucket.rm("/bucket", recursive=True)
    Broken.short = True
    with pytest.raises(KeepLoraError, match="arrived with 1 bytes in place of 4; copy it again"):
        upload(run, broken)


def test_a_download_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(run, "memory://bucket/run")

    def get(self: Any, there: str, here: str, **_: Any) -> None:
        if there.endswith("results.json"):
            raise TimeoutError("no answer")
        Path(here).write_bytes(self.cat_file(there))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get)
    with pytest.raises(KeepLoraError, match=r"the copy failed \(TimeoutError: no answer\)"):
        copy("memory://bucket/run", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_names_and_links_that_lead_elsewhere_are_refused(
    bucket: MemoryFileSystem, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "link").symlink_to(tmp_path)
    with pytest.raises(KeepLoraError, match="link is a link"):
        copy(run, "memory://bucket/run")
    bucket.pipe_file("/bucket/run/a", b"x")
    monkeypatch.setattr(RemotePath, "find", lambda self: {"../../evil": {"size": 1}})
    with pytest.raises(KeepLoraError, match="leads out of memory:///bucket/run"):
        copy("memory://bucket/run", tmp_path / "back")
    assert not (tmp_path / "evil").exists()


def test_a_run_directory_is_local() -> None:
    assert address("runs/a") is None
    assert address(Path("C:/x")) is None
    with pytest.raises(
        ConfigError,
        match=r"s3://bucket/a: a run directory must lie on a local disk.*`keeplora copy FOLDER s3://bucket/a`",
    ):
        refuse_address(Path("s3://bucket/a"), "a run directory")
