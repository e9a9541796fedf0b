from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from keeplora.data.benchmarks import common, names
from keeplora.data.benchmarks.common import ArrayBytes, random_split_80_20
from keeplora.data.benchmarks.pickles import read_batch
from keeplora.data.pictures import decode_picture
from keeplora.data.sets import Entry
from keeplora.data.spec import TaskSpec
from keeplora.errors import ConfigError, DataError
from tests.data.benchmarks.mini import pickle2


@pytest.mark.parametrize("n", [2, 5, 9, 10, 101, 8677, 27_000, 108_754])
def test_the_split_is_torchs_random_split(n: int) -> None:
    sizes = [int(0.8 * n), n - int(0.8 * n)]
    generator = torch.Generator().manual_seed(42)
    train, test = torch.utils.data.random_split(range(n), sizes, generator=generator)  # type: ignore[arg-type]
    assert random_split_80_20(n) == (list(train.indices), list(test.indices))


def test_the_split_of_ten_is_known() -> None:
    assert random_split_80_20(10) == ([2, 6, 1, 8, 4, 5, 0, 9], [3, 7])


def test_the_split_of_caltech101_is_known() -> None:
    """The permutation of torch's CPU generator is part of the protocol: another would be another benchmark."""
    train, test = random_split_80_20(8677)
    assert (len(train), len(test)) == (6941, 1736)
    assert hashlib.sha256(repr((train, test)).encode()).hexdigest()[:16] == "fe8d893e25d73959"
    assert {split: len(part) for split, part in zip("ab", random_split_80_20(108_754))} == {"a": 87_003, "b": 21_751}


def test_split_entries_get_the_split_in_their_key() -> None:
    entries = [Entry(f"k{i}", "x", "w", ArrayBytes(np.zeros((1, 1, 1), np.uint8), 0)) for i in range(10)]
    splits = common.split_80_20(entries)
    assert [e.key for e in splits["train"]] == [f"train/k{i}" for i in (2, 6, 1, 8, 4, 5, 0, 9)]
    assert [e.key for e in splits["test"]] == ["test/k3", "test/k7"]


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 5, 7, 3)])
def test_a_row_becomes_its_picture(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for row in range(3):
        picture = decode_picture(ArrayBytes(array, row).read(), "x")
        assert picture.size == (7, 5)
        want = array[row] if array.ndim == 4 else np.repeat(array[row][:, :, None], 3, axis=2)
        assert np.array_equal(np.asarray(picture), want)


def test_rows_of_a_transposed_array_are_read_right() -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), dtype=np.uint8)
    picture = decode_picture(ArrayBytes(array.transpose(0, 2, 3, 1), 1).read(), "x")
    assert np.array_equal(np.asarray(picture), array[1].transpose(1, 2, 0))


def test_rows_are_pickled_with_one_array_between_them() -> None:
    array = np.zeros((1000, 32, 32, 3), np.uint8)
    rows = pickle.loads(data := pickle.dumps([ArrayBytes(array, row) for row in range(1000)]))
    assert len(data) < array.nbytes * 1.02
    assert all(row.array is rows[0].array for row in rows)
    assert rows[7].row == 7


def spec(**keys: Any) -> TaskSpec:
    return TaskSpec(**{"name": "t", "source": "dtd", "path": "dtd", **keys})


def test_root(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    assert common.benchmark_root(spec(validation=0.1), tmp_path) == tmp_path / "dtd"
    with pytest.raises(DataError, match=r"dtx: no such folder; did you mean 'dtd'\?"):
        common.benchmark_root(spec(path="dtx"), tmp_path)
    for keys, message in (
        ({"path": None}, "'dtd' needs `path`"),
        ({"train": "a"}, "remove `train: a`"),
        ({"test": 0.2}, "remove `test: 0.2`"),
        ({"validation": "val"}, "give a fraction"),
    ):
        with pytest.raises(ConfigError, match=message):
            common.benchmark_root(spec(**keys), tmp_path)


def test_inner_folder_is_found_from_itself_too(tmp_path: Path) -> None:
    inner = tmp_path / "2750"
    inner.mkdir()
    assert common.inner_folder(tmp_path, "2750", "x", "y") == common.inner_folder(inner, "2750", "x", "y") == inner
    (tmp_path / "dtd/dtd").mkdir(parents=True)
    assert common.inner_folder(tmp_path / "dtd", "dtd", "x", "y") == tmp_path / "dtd/dtd"
    with pytest.raises(DataError, match="data: the data folder is missing; unpack it"):
        common.inner_folder(tmp_path, "data", "the data folder", "unpack it")


def test_need(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert common.need(tmp_path / "file", "a", "b") == tmp_path / "file"
    assert common.need(tmp_path, "a", "b", folder=True) == tmp_path
    with pytest.raises(DataError, match="no: the list is missing; fetch it"):
        common.need(tmp_path / "no", "the list", "fetch it")
    with pytest.raises(DataError, match="file: the list is a file, not a folder; fetch it"):
        common.need(tmp_path / "file", "the list", "fetch it", folder=True)
    with pytest.raises(DataError, match="the list is not an ordinary file; fetch it"):
        common.need(tmp_path, "the list", "fetch it")


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf one \r\n\r\ntwo words\r\n")
    assert common.read_lines(file, "a", "b") == ["one", "two words"]
    for content, message in ((b"\n \n", "is empty; fetch"), (b"\xff\xfe\xfd", "cannot be read as text .*fetch")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            common.read_lines(file, "the list", "fetch it")


def test_mat(tmp_path: Path) -> None:
    file = tmp_path / "a.mat"
    savemat(file, {"labels": np.array([[1, 2, 3]], np.uint8)}, do_compression=True)
    assert common.read_mat(file, ["labels"], "a", "b")["labels"].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"a\.mat: the table lacks the variable\(s\) trnid; fetch it"):
        common.read_mat(file, ["labels", "trnid"], "the table", "fetch it")
    whole = file.read_bytes()
    noise = np.random.default_rng(0).bytes(500)
    for damaged in (b"", b"x", whole[:60], whole[:-10], whole[:140] + b"\xff" * 40, noise):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.mat: the table (cannot be read|lacks).*; fetch it$"):
            common.read_mat(file, ["labels"], "the table", "fetch it")
    with pytest.raises(DataError, match=r"no\.mat: the table is missing; fetch it"):
        common.read_mat(tmp_path / "no.mat", ["labels"], "the table", "fetch it")


def test_listings_are_sorted_and_hide_the_hidden(tmp_path: Path) -> None:
    for name in ("b_10.jpg", "b_2.JPG", "B_3.png", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert common.file_names(tmp_path, "a", "b", (".jpg", ".png")) == ["B_3.png", "b_10.jpg", "b_2.JPG"]
    assert common.folder_names(tmp_path, "a", "b") == ["folder"]


@pytest.mark.parametrize(("table", "count"), [(names.CALTECH101, 101), (names.EUROSAT, 10), (names.FLOWERS102, 102)])
def test_class_tables_have_the_published_counts(table: dict[str, str] | tuple[str, ...], count: int) -> None:
    shown = list(table.values()) if isinstance(table, dict) else list(table)
    assert len(shown) == len(set(shown)) == count
    assert all(name == " ".join(name.split()) and "_" not in name for name in shown)
    if isinstance(table, dict):
        assert list(table) == sorted(table)  # the label order


@pytest.mark.parametrize(
    ("table", "digest"),
    [
        (names.CALTECH101, "4d899af2866edef8"),
        (names.EUROSAT, "365793d6a05d4300"),
        (names.FLOWERS102, "0490feb6c5d111ee"),
    ],
)
def test_class_tables_are_as_they_were_when_compared(table: dict[str, str] | tuple[str, ...], digest: str) -> None:
    """A name changed, or two swapped, is another benchmark: compare the table with its origin before changing this."""
    rows = list(table.items()) if isinstance(table, dict) else list(table)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_flower_numbers() -> None:
    known = {1: "pink primrose", 10: "globe thistle", 50: "common dandelion", 102: "blackberry lily"}
    assert {number: names.FLOWERS102[number - 1] for number in known} == known


# --- pickles -------------------------------------------------------------------------------------------------------

DATA = np.arange(24, dtype=np.uint8).reshape(4, 6)


def batch(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_batch(path, ("data", "fine_labels"), "the batch", "fetch it")


@pytest.mark.parametrize("protocol", [2, 3, 4, "python 2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_any_python_are_read(tmp_path: Path, protocol: int | str, order: str) -> None:
    value = {"data": np.array(DATA, order=order), "fine_labels": [0, 1, 2, 3], "filenames": ["a", "b"]}
    dumped = pickle2(value) if protocol == "python 2" else pickle.dumps(value, protocol=int(protocol))
    found = batch(tmp_path / "train", dumped)
    assert np.array_equal(found["data"], DATA)
    assert found["data"].dtype == np.uint8
    assert found["fine_labels"] == [0, 1, 2, 3]


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_harmful_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    harmful = pickle.dumps({"data": DATA, "fine_labels": Call(os.mkdir, str(trace))}, protocol=2)
    pickle.loads(harmful)
    assert trace.is_dir()  # it would
    trace.rmdir()
    with pytest.raises(DataError, match=r"the batch asks for posix\.mkdir, .*may be malicious: delete it, and"):
        batch(tmp_path / "train", harmful)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("1",)),
        (getattr, ("a", "upper")),
        (np.load, ("x",)),
        (np.frombuffer, (b"a",)),
        (io.open, ("x",)),
        (gc.collect, ()),
        (pickle.loads, (b"",)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_every_other_name_is_refused(tmp_path: Path, function: Any, arguments: tuple[Any, ...], protocol: int) -> None:
    with pytest.raises(DataError, match="may be malicious"):
        batch(tmp_path / "train", pickle.dumps(Call(function, *arguments), protocol=protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n.",
        b"c_codecs\ndecode\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dot\x93.",  # a dotted name walks attributes
        b"c_codecs\nencode\n(Vx\nVbz2\ntR.",  # an allowed name with another codec
    ],
)
def test_neighbours_of_allowed_names_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="may be malicious"):
        batch(tmp_path / "train", content)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "holds no dictionary but a list"),
        ({"data": DATA}, "lacks 'fine_labels'"),
        ({"data": DATA.astype(np.int64), "fine_labels": []}, "cannot be read .*type 'i8' instead of bytes"),
        ({"data": np.array([None, "x"]), "fine_labels": []}, "cannot be read .*type 'O8' instead of bytes"),
    ],
)
def test_wrong_batches(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=f"train: the batch {message}.*fetch it"):
        batch(tmp_path / "train", pickle.dumps(value, protocol=2))


def test_damaged_batches(tmp_path: Path) -> None:
    whole = pickle2({"data": DATA, "fine_labels": [0, 1, 2, 3]})
    for length in range(len(whole)):
        with pytest.raises(DataError, match=r"train: the batch .*fetch it"):
            batch(tmp_path / "train", whole[:length])
    with pytest.raises(DataError, match="train: the batch is missing; fetch it"):
        read_batch(tmp_path / "no/train", ("data",), "the batch", "fetch it")


def test_an_array_never_claims_more_than_its_data(tmp_path: Path) -> None:
    whole = pickle2({"data": DATA, "fine_labels": [0, 1, 2, 3]})
    assert whole.count(b"K\x04K\x06\x86") == 1  # the shape (4, 6)
    with pytest.raises(DataError, match="an array whose size is not that of its data"):
        batch(tmp_path / "train", whole.replace(b"K\x04K\x06\x86", b"K\x04K\x07\x86"))
