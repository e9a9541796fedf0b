from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from picture_files import encode

from keeplora.data import load_task
from keeplora.errors import DataError, KeepLoraError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / f"photos/{number}.png").write_bytes(encode(number))
    rows = [f"photos/{n}.png,How many?,{n % 3}" for n in range(10)]
    (tmp_path / "own.csv").write_text("\n".join(["image,question,answer", *rows]))
    return tmp_path


def load(root: Path, **keys: Any) -> Any:
    return load_task({"name": "t", "source": "vqa-table", "path": "own.csv", **keys}, root)


def test_one_table_is_cut(root: Path):
    task = load(root, test=0.2, scorer="vqa")
    assert (len(task.train), len(task.test), task.warnings) == (8, 2, [])
    told = task.train.conversation(0)
    assert (told.key, told.turns[0].text, told.references) == ("train/2", "<image>\nHow many?", ("0",))
    assert told.where == f"{root}/own.csv, line 2"


def test_splits_columns_and_kinds(root: Path):
    (root / "own.tsv").write_text(
        "foto\tfrage\tantwort\tsplit\tid\tcategory\n"
        "0.png\tWas?\teins\ttrain\ta\tx\n1.png\tWas?\tzwei\ttrain\tb\ty\n2.png\tWas?\tdrei\ttest\tc\tx\n"
    )
    columns = {"image_column": "foto", "question_column": "frage", "answer_column": "antwort"}
    task = load(root, path="own.tsv", images="photos", **columns)
    assert (task.train.keys, task.train.labels, task.test.keys) == (["train/a", "train/b"], [0, 1], ["test/c"])
    assert task.test.conversation(0).references == ("drei",)


def test_captions_without_a_question(root: Path):
    rows = [{"image": f"photos/{n}.png", "caption": f"picture {n} {m}"} for n in range(4) for m in range(2)]
    for name, part in (("train", rows[:4]), ("test", rows[4:])):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    keys = {"path": None, "train": "train.jsonl", "test": "test.jsonl", "prompt": "Describe the picture."}
    task = load(root, **keys, scorer="cider")
    assert len(task.train) == 4
    assert [c.references for c in task.test.conversations] == [
        ("picture 2 0", "picture 2 1"),
        ("picture 3 0", "picture 3 1"),
    ]
    assert task.test.conversation(0).turns[0].text == "<image>\nDescribe the picture."
    with pytest.raises(DataError, match="which column is `question_column`"):
        load(root, **{**keys, "prompt": None})


def test_rows_without_a_picture_and_with_several(root: Path):
    rows = [
        {"image": None, "question": "Is 3 odd?", "answer": "yes"},
        {"image": ["photos/1.png", "photos/2.png"], "question": "Alike?", "answers": ["no", "not"]},
    ]
    for row in rows:
        row.setdefault("answer", row.get("answers"))
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "test.jsonl").write_text(json.dumps(rows[0]))
    task = load(root, path=None, train="own.jsonl", test="test.jsonl")
    assert [len(c.pictures) for c in task.train.conversations] == [0, 2]
    assert task.train.conversation(1).references == ("no", "not")
    assert task.warnings[0].startswith("1 question(s) of train are also in test")


@pytest.mark.parametrize(
    ("keys", "text", "message"),
    [
        ({"question_column": "qestion"}, None, "no column 'qestion' for `question_column`; did you mean 'question'"),
        ({"answer_column": "question"}, None, "one column cannot be picture or video, question and answer at once"),
        ({"label_column": "x"}, None, "unknown key 'label_column' for source 'vqa-table'"),
        ({}, "image,question\na,b\n", "which column is `answer_column`"),
        ({}, "image,question,answer\nphotos/1.png,What?,\n", "line 2: has no answer"),
        ({}, "image,question,answer\nphotos/1.png,,3\n", "line 2: has no question"),
        (
            {},
            "image,question,answer\nphotos/99.png,What?,3\nphotos/1.png,What?,3\n",
            r"99.png \(.*line 2\): does not exist",
        ),
    ],
)
def test_mistakes(root: Path, keys: dict[str, Any], text: str | None, message: str):
    if text is not None:
        (root / "own.csv").write_text(text)
    with pytest.raises(KeepLoraError, match=message):
        load(root, **{"test": 0.2, **keys})
