from __future__ import annotations

import json
from typing import Any

import pytest
from picture_files import Tree

from keeplora.data import TaskData, load_task
from keeplora.data.pictures import PictureError
from keeplora.errors import ConfigError, DataError


def load(tree: Tree, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "signs", "source": "table", **spec}, tree.root, probe=probe)


@pytest.fixture
def signs(tree: Tree) -> Tree:
    """in/train.csv (6 rows) and in/test.csv (3 rows) over pictures in in/img, classes b, a, c_d."""
    for split, count in (("train", 2), ("test", 1)):
        lines = ["path,label"]
        for name in ("b", "a", "c_d"):
            for index in range(count):
                tree.write(f"in/img/{split}-{name}-{index}.png")
                lines.append(f"img/{split}-{name}-{index}.png,{name}")
        tree.write(f"in/{split}.csv", "\n".join(lines).encode())
    return tree


def both(**spec: Any) -> dict[str, Any]:
    return {"train": "in/train.csv", "test": "in/test.csv", **spec}


def test_two_tables(signs: Tree) -> None:
    task = load(signs, **both())
    assert task.classes == ["a", "b", "c d"]
    assert task.train.labels == [1, 1, 0, 0, 2, 2]  # rows keep their order
    assert task.test.keys == ["test/img/test-b-0.png", "test/img/test-a-0.png", "test/img/test-c_d-0.png"]
    assert task.train.picture(0).mode == "RGB"
    assert task.warnings == []


def test_tsv_jsonl_and_byte_order_mark_say_the_same(signs: Tree) -> None:
    expected = load(signs, **both())
    text = (signs.root / "in/train.csv").read_text()
    signs.write("in/train.tsv", ("\ufeff" + text.replace(",", "\t").replace("\n", "\r\n")).encode())
    rows = [dict(zip(("path", "label"), line.split(","))) for line in text.splitlines()[1:]]
    signs.write("in/train.jsonl", "\n".join(json.dumps({**row, "extra": None}) for row in rows).encode())
    for name in ("in/train.tsv", "in/train.jsonl"):
        assert load(signs, **both(train=name)).fingerprint == expected.fingerprint


def test_one_table_with_a_split_column(signs: Tree) -> None:
    rows = ["file,kind,part"]
    for split in ("train", "test"):
        for line in (signs.root / f"in/{split}.csv").read_text().splitlines()[1:]:
            rows.append(f"{line},{split}")
    signs.write("in/all.csv", "\n".join(rows).encode())
    columns = {"path": "in/all.csv", "label_column": "kind"}
    task = load(signs, split_column="part", **columns)
    assert (len(task.train), len(task.test)) == (6, 3)
    swapped = load(signs, split_column="part", train="test", test="train", **columns)
    assert (len(swapped.train), len(swapped.test)) == (3, 6)
    with pytest.raises(DataError, match=r"all\.csv: no split 'tets' for `test`; did you mean 'test'"):
        load(signs, split_column="part", test="tets", **columns)
    with pytest.raises(DataError, match=r"all\.csv: no column 'prt' for `split_column`; did you mean 'part'"):
        load(signs, split_column="prt", **columns)
    with pytest.raises(ConfigError, match=r"all\.csv: has no split column to find `test: test`"):
        load(signs, test="test", **columns)


def test_one_table_is_cut(signs: Tree) -> None:
    task = load(signs, path="in/train.csv", test=0.5)
    assert (len(task.train), len(task.test)) == (3, 3)


def test_columns(signs: Tree) -> None:
    text = (signs.root / "in/train.csv").read_text()
    signs.write("in/odd.csv", text.replace("path,label", "bild,klasse").encode())
    with pytest.raises(DataError, match=r"odd\.csv: which column is `image_column`\? It has bild, klasse"):
        load(signs, **both(train="in/odd.csv"))
    with pytest.raises(DataError, match=r"odd\.csv: no column 'klase' for `label_column`; did you mean 'klasse'"):
        load(signs, path="in/odd.csv", image_column="bild", label_column="klase")
    assert len(load(signs, path="in/odd.csv", test=0.5, image_column="bild", label_column="klasse").train) == 3


def test_numbers_are_sorted_by_value_and_named_by_a_list(tree: Tree) -> None:
    rows = [{"image": tree.write(f"{i}.png").name, "label": float(i % 11)} for i in range(22)]
    tree.write("t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert load(tree, path="t.jsonl", test=0.5).classes == [str(i) for i in range(11)]
    names = [f"name {i}" for i in range(11)]
    task = load(tree, path="t.jsonl", test=0.5, classes=names)
    assert task.classes == names
    assert sorted(task.train.labels) == list(range(11))
    with pytest.raises(DataError, match=r"21\.png .*line 22.*label '10' is not in `classes`"):
        load(tree, path="t.jsonl", test=0.5, classes=names[:10])
    with pytest.raises(DataError, match=r"'name 11', which has no picture"):
        load(tree, path="t.jsonl", test=0.5, classes=[*names, "name 11"])


@pytest.mark.parametrize(
    "row", [{"image": "0.png"}, {"image": "0.png", "label": None}, {"image": "0.png", "label": " "}]
)
def test_missing_label(tree: Tree, row: dict[str, Any]) -> None:
    tree.write("t.jsonl", "\n".join(map(json.dumps, [{"image": "1.png", "label": "a"}, row])).encode())
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: the label is missing; fill it in"):
        load(tree, path="t.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"", "holds no rows"),
        ("t.csv", b"path,label\n", "holds no rows"),
        ("t.csv", b"path;label\na.png;x", "seem to be separated by ';'"),
        ("t.csv", b"path,label\na.png,x,y\n", "line 2: 3 fields under 2 columns"),
        ("t.csv", b'path,label\n"a.png,x\n', "line 2: .*mend the quotes"),
        ("t.csv", b"path,label,path\na.png,x,y\n", "column 'path' is there twice"),
        ("t.csv", b"path,label\n,x\n", "line 2: column 'path' is ''"),
        ("t.csv", b"path,label\nhttps://a.b/c.png,x\n", "line 2: .*is an address, not a file"),
        ("t.csv", b"path,label\na.png,x\na.png,y\n", "line 3: 'a.png' is labelled 'y' here and 'x' in another row"),
        ("t.csv", b"path,label\ncaf\xe9.png,x\n", "byte 14 is not UTF-8"),
        ("t.jsonl", b'{"path": "a"}\n{"path"\n', "line 2: not JSON"),
        ("t.jsonl", b"[1, 2]\n", "line 1: not a JSON object"),
        ("t.jsonl", b'{"path": "a.png", "label": ["x", "y"]}\n', "line 1: the label is .*one class per picture"),
        ("t.xlsx", b"PK", "not a .csv, .tsv or .jsonl table"),
    ],
)
def test_broken_tables(tree: Tree, name: str, data: bytes, message: str) -> None:
    tree.write(name, data)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        load(tree, path=name)


def test_delimiter(signs: Tree) -> None:
    text = (signs.root / "in/train.csv").read_text().replace(",", ";")
    signs.write("in/train2.csv", text.encode())
    assert len(load(signs, path="in/train2.csv", delimiter=";", test=0.5).train) == 3
    with pytest.raises(ConfigError, match="delimiter"):
        load(signs, path="in/train2.csv", delimiter=";;")


def test_missing_picture_names_file_and_line(signs: Tree) -> None:
    (signs.root / "in/img/train-a-0.png").unlink()
    with pytest.raises(PictureError, match=r"img/train-a-0\.png.*does not exist"):
        load(signs, **both())
    task = load(signs, **both(on_error="skip", max_skipped=0.9))
    assert len(task.train) == 5
    assert "train-a-0.png" in task.warnings[0]


def test_repeated_rows_count_once(signs: Tree) -> None:
    text = (signs.root / "in/train.csv").read_text()
    signs.write("in/train.csv", f"{text}\n{text.splitlines()[1]}\n".encode())
    task = load(signs, **both())
    assert len(task.train) == 6
    assert task.warnings == [f"1 repeated row(s) of train ignored: {signs.root}/in/train.csv, line 8"]


def test_missing_table_and_missing_train(signs: Tree) -> None:
    with pytest.raises(DataError, match=r"in/trian\.csv: no such table; did you mean 'train.csv'"):
        load(signs, **both(train="in/trian.csv"))
    with pytest.raises(ConfigError, match="no training table named"):
        load(signs, test="in/test.csv")
    probe = load(signs, test="in/test.csv", probe=True)
    assert (len(probe.train), len(probe.test)) == (0, 3)


def test_label_of_test_unknown_to_train(signs: Tree) -> None:
    text = (signs.root / "in/test.csv").read_text().replace("c_d\n", "c-d\n").replace(",b", ",bb")
    signs.write("in/test.csv", text.encode())
    with pytest.raises(DataError, match=r"test-b-0\.png .*line 2\): class 'bb' is in test but not in train"):
        load(signs, **both())
