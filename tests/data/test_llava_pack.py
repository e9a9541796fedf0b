from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import encode

from keeplora.data import load_task
from keeplora.errors import DataError


def row(number: int, split: str, **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": str(number)}]
    return {
        "split": split, "id": f"r{number}", "image": encode(number), "conversations": json.dumps(turns), "kind": "count",
        "origin": "here", "licence": "MIT" if number % 2 else "CC0", **keys,
    }  # fmt: skip


def pack(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    return folder


def load(folder: Path, **keys: Any) -> Any:
    probe = keys.pop("probe", False)
    return load_task({"name": "t", "source": "llava-pack", "path": "p.parquet", **keys}, folder, probe=probe)


def test_a_pack(tmp_path: Path):
    pack(tmp_path, [row(1, "train"), row(2, "train"), row(3, "test"), row(4, "validation")])
    task = load(tmp_path, prompt="Answer with a number.")
    assert (task.train.keys, task.test.keys, task.validation.keys) == (
        ["train/r1", "train/r2"], ["test/r3"], ["validation/r4"]
    )  # fmt: skip
    assert task.licence == "CC0, MIT"
    told = task.test.conversation(0)
    assert (told.question, told.references, told.kind) == ("How many?\nAnswer with a number.", ("3",), "count")
    assert told.where == f"{tmp_path}/p.parquet, row 2 (id 'r3')"
    assert task.test.pictures(0)[0].size == (12, 10)
    pack(tmp_path, [row(1, "train", conversations="["), row(3, "test")])
    assert load(tmp_path, probe=True).test.keys == ["test/r3"]  # what is not asked for is not even read


def test_several_pictures_in_a_row(tmp_path: Path):
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "left"}]
    rows = [
        row(n, s, images=[encode(n), encode(n + 9)], conversations=json.dumps(turns))
        for n, s in ((1, "train"), (2, "test"))
    ]
    for each in rows:
        del each["image"]
    assert len(load(pack(tmp_path, rows)).test.pictures(0)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, "train"), row(2, "tset")], "row 1: split 'tset'"),
        ([row(1, "test")], "holds no rows of train; use it as a probe"),
        ([row(1, "train", conversations="[")], "row 0: `conversations` is not JSON"),
        ([row(1, "train", image=b"")], r"row 0 \(id 'r1'\): 1 '<image>' in the text but 0 picture"),
        ([{"split": "train", "id": "a"}], "the column\\(s\\) conversations, kind, origin, licence, image are missing"),
    ],
)
def test_a_bad_pack(tmp_path: Path, rows: list[dict[str, Any]], message: str):
    pack(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        load(tmp_path)
