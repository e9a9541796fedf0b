"""Data behind addresses: read as local data is, confined to the folder that a person wrote, named where the network fails."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from picture_files import encode
from stream_files import parquet, questions

from keeplora.data import load_task, remote
from keeplora.data.hub_open import source_in_row
from keeplora.data.remote import RemoteBytes, RemotePath, is_url, place, transient
from keeplora.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An empty object store, and no waiting between attempts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # else `datasets` opens no address at all
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    datasets.disable_progress_bars()
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def put(local: Path, there: str) -> str:
    store = fsspec.filesystem("memory")
    for file in sorted(local.rglob("*")):
        if file.is_file():
            store.pipe_file(f"/{there}/{file.relative_to(local).as_posix()}", file.read_bytes())
    return f"memory://{there}"


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), splits: tuple[str, ...] = ("train", "test")) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                (root / split / name / f"{i}.png").write_bytes(encode(100 * s + 10 * c + i))
    return root


def load(base: Path, source: str, **spec: Any) -> Any:
    return load_task({"name": "pets", "source": source, **spec}, base)


def same(one: Any, other: Any) -> bool:
    pictures = [[s.picture(i).tobytes() for i in range(len(s))] for s in (one.train, one.test, other.train, other.test)]
    return pictures[:2] == pictures[2:] and one.classes == other.classes and one.train.labels == other.train.labels


def test_a_folder_behind_an_address_is_the_folder(tmp_path: Path) -> None:
    local = folder(tmp_path / "pets")
    (local / "train/cat/notes.txt").write_text("x")
    (local / "train/.DS_Store").write_text("x")
    there = load(tmp_path, "folder", path=put(local, "bucket/pets"))
    assert same(there, load(tmp_path, "folder", path="pets"))
    assert there.fingerprint == load(tmp_path, "folder", path="pets").fingerprint
    assert there.warnings == ["1 file(s) that are not pictures or videos in class folders ignored"]
    assert pickle.loads(pickle.dumps(there.train)).picture(0).size == (12, 10)
    named = load(tmp_path, "folder", train="memory://bucket/pets/train", test="memory://bucket/pets/test")
    assert same(there, named)
    flat = load(tmp_path, "folder", path="memory://bucket/pets/train", test=0.34)
    assert (len(flat.train), len(flat.test)) == (4, 2)
    with pytest.raises(ConfigError, match="some splits are local folders and some are addresses"):
        load(tmp_path, "folder", train="memory://bucket/pets/train", test="pets/test")
    with pytest.raises(DataError, match="memory:///bucket/none: no files there"):
        load(tmp_path, "folder", path="memory://bucket/none")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_table_behind_an_address_names_pictures_beside_it(tmp_path: Path, ending: str) -> None:
    local = folder(tmp_path / "pets", splits=("train",))
    files = sorted((local / "train").rglob("*.png"))
    rows = [
        {
            "image": f.relative_to(local).as_posix(),
            "label": f.parent.name,
            "split": "test" if f.stem == "0" else "train",
        }
        for f in files
    ]
    lines = [json.dumps(row) for row in rows]
    if ending == "csv":
        lines = ["image,label,split", *(",".join(row.values()) for row in rows)]
    (local / f"pets.{ending}").write_text("\n".join(lines) + "\n")
    there = load(tmp_path, "table", path=f"{put(local, 'bucket/pets')}/pets.{ending}")
    assert same(there, load(tmp_path, "table", path=f"pets/pets.{ending}"))


def test_llava_json_and_question_tables_behind_an_address(tmp_path: Path) -> None:
    local = questions(tmp_path / "quiz", 6, 3)
    for split in ("train", "test"):
        lines = [json.loads(line) for line in (local / f"{split}.jsonl").read_text().splitlines()]
        (local / f"{split}.json").write_text(json.dumps(lines))
        (local / f"{split}-table.jsonl").write_text((local / f"{split}.jsonl").read_text())
    url = put(local, "bucket/quiz")
    tables = [load(tmp_path, "llava", train=f"{base}/train.json", test=f"{base}/test.json") for base in (url, "quiz")]
    tables += [
        load(tmp_path, "vqa-table", train=f"{base}/train-table.jsonl", test=f"{base}/test-table.jsonl", images=base)
        for base in (url, "quiz")
    ]
    for one, other in (tables[:2], tables[2:]):
        assert one.fingerprint == other.fingerprint
        assert one.train.pictures(4)[0].tobytes() == other.train.pictures(4)[0].tobytes()


def test_datasets_behind_an_address_whole_and_streamed(tmp_path: Path) -> None:
    url = put(parquet(tmp_path / "animals", {"train": [4, 5], "test": [6]}), "bucket/animals")
    whole = load(tmp_path, "datasets", path=url)
    streamed = load(tmp_path, "datasets", path=url, streaming={"samples": 9})
    assert whole.classes == streamed.classes
    assert whole.train.labels == [s.label for s in streamed.train.reader(None).take(9)]
    assert same(whole, load(tmp_path, "datasets", path="animals"))
    quiz = put(questions(tmp_path / "quiz", 6, 3), "bucket/quiz")
    task = load(tmp_path, "vqa-datasets", path=quiz, streaming={"samples": 6})
    (first, *_) = task.train.reader(None).take(6)
    assert isinstance(first.item.pictures[0], RemoteBytes)  # fetched by the worker that decodes it
    assert first.item.pictures[0].read() == encode(0)


def test_file_addresses_are_local_paths(tmp_path: Path) -> None:
    folder(tmp_path / "pets")
    task = load(Path("/"), "folder", path=f"file://{tmp_path}/pets")
    assert task.train.where(0).startswith(str(tmp_path))
    assert place("local:///a/b", Path("/")) == Path("/a/b")


# ---- what is not read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://other/a.png", "is an address, not a file"),
        ("file:///etc/passwd", "is an address, not a file"),
        ("filecache::memory://x", "is an address, not a file"),
        ("/bucket/secret.png", "leads out of memory:///bucket/pets"),
        ("../secret.png", "leads out of memory:///bucket/pets"),
        ("a/../../secret.png", "leads out of memory:///bucket/pets"),
        ("~/secret.png", "leads out of memory:///bucket/pets"),
        ("C:\\secret.png", "leads out of memory:///bucket/pets"),
        ("..\\secret.png", "leads out of memory:///bucket/pets"),
    ],
)
@pytest.mark.parametrize("source", ["table", "llava", "vqa-datasets"])
def test_data_names_nothing_outside_of_its_folder(tmp_path: Path, source: str, name: str, message: str) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/secret.png", encode(1))
    row = {"image": name, "label": "cat", "question": "What?", "answer": "a cat"}
    for split in ("train", "test"):
        store.pipe_file(f"/bucket/pets/{split}.jsonl", (json.dumps(row) + "\n").encode())
    spec = {"train": "memory://bucket/pets/train.jsonl", "test": "memory://bucket/pets/train.jsonl"}
    if source == "vqa-datasets":
        spec = {"path": "memory://bucket/pets", "streaming": {"samples": 1}}
        message = message.replace("is an address, not a file", "is an address")
    with pytest.raises(DataError, match=message):
        load(tmp_path, source, **spec)


def test_an_address_of_a_row_is_read_below_the_folder_alone(tmp_path: Path) -> None:
    here = RemotePath.of("memory://bucket/pets")
    assert here.inside("memory://bucket/pets/a/b.png") == "a/b.png"
    for elsewhere in ("memory://bucket/petsitter/a", "memory://bucket/pets", "s3://bucket/pets/a", "memory://bucket/a"):
        assert here.inside(elsewhere) is None
    with pytest.raises(DataError, match="leads out of"):
        source_in_row("memory://bucket/pets/../a.png", here, "row 1")


def test_a_local_table_names_no_address(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\nmemory://bucket/a.png,cat\n")
    with pytest.raises(DataError, match="is an address, not a file"):
        load(tmp_path, "table", path="t.csv")


@pytest.mark.parametrize("source", ["pack", "oxford-pet", "llava-pack"])
def test_sources_of_local_files_say_so(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=r"reads local files alone; copy the data here \(`keeplora copy`\)"):
        load(tmp_path, source, path=put(folder(tmp_path / "pets"), "bucket/pets"))


def test_missing_packages_and_unknown_schemes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **_: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(ConfigError, match=r"nope://a: cannot be opened .*schemes that can be read"):
        load(tmp_path, "folder", path="nope://a")
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(
        ConfigError, match=r"s3://b/pets: s3:// needs a package that is not installed: pip install s3fs$"
    ):
        load(tmp_path, "folder", path="s3://b/pets")
    with pytest.raises(ConfigError, match=r"gs://b/t.csv: .*pip install gcsfs"):
        load(tmp_path, "table", path="gs://b/t.csv")


# ---- a network that fails ---------------------------------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """Fails so many times before it opens a file."""

    protocol = "flaky"
    cachable = False
    failures = 0
    error: Exception = TimeoutError("no answer")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if type(self).failures > 0 and path.endswith(".png"):
            type(self).failures -= 1
            raise type(self).error
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    put(folder(tmp_path / "pets"), "bucket/pets")
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "error", TimeoutError("no answer"))
    remote._root.cache_clear()
    return RemotePath(Flaky(), "/bucket/pets", "flaky://")


def test_a_read_that_fails_is_tried_again(flaky: RemotePath) -> None:
    picture = RemoteBytes(flaky / "train/cat/0.png")
    Flaky.failures = 3
    assert picture.read() == encode(0)
    Flaky.failures = 4
    with pytest.raises(
        DataError, match=r"flaky:///bucket/pets/train/cat/0.png: cannot be read in 4 attempts \(.*no answer"
    ):
        picture.read()
    Flaky.failures, Flaky.error = 1, PermissionError("forbidden")
    with pytest.raises(DataError, match=r"0.png: cannot be read \(PermissionError: forbidden\)"):
        picture.read()
    assert Flaky.failures == 0  # once was enough


def test_the_sample_that_a_network_loses_is_named_or_skipped(
    tmp_path: Path, flaky: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_root", lambda url: flaky)
    Flaky.failures = 1_000
    with pytest.raises(
        DataError, match=r"task 'pets': flaky:///bucket/pets/train/\w+/\d.png: cannot be read in 4 attempts"
    ):
        load(tmp_path, "folder", path="flaky://bucket/pets")


def test_which_errors_may_pass() -> None:
    assert all(transient(e) for e in (TimeoutError(), ConnectionResetError(), OSError("EOF"), EOFError()))
    assert not any(transient(e) for e in (FileNotFoundError(), PermissionError(), ValueError(), DataError("x")))
    assert [is_url(x) for x in ("s3://b", "filecache::s3://b", "a/b", "C:\\x", "c://x", 3)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
