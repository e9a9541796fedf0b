from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import encode

from keeplora.data import TaskData, load_task
from keeplora.errors import ConfigError, DataError


def rows(task: str = "emoji", **change: Any) -> list[dict[str, Any]]:
    made = []
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("smile_y", "Food", "animal")):
            for index in range(count):
                made.append(
                    {"task": task, "split": split, "label": label, "class_name": name, "item": f"u{index // 2}"}
                    | {"origin": "pkg", "licence": "MIT", "image": encode(len(made) + len(task) * 1000, "WEBP")}
                )
    made[0].update(change)
    return made


def write(path: Path, made: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(made), path)


def load(root: Path, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "emoji", "source": "pack", "path": "demo", **spec}, root, probe=probe)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write(tmp_path / "demo/a.parquet", rows("digits") + rows("emoji"))
    write(tmp_path / "demo/b.parquet", [r for r in rows("clip") if r["split"] == "test"])
    return tmp_path


def test_one_task_of_a_pack(demo: Path) -> None:
    task = load(demo)
    assert task.classes == ["smile_y", "Food", "animal"]  # in label order, names as written
    assert task.train.labels == [0] * 3 + [1] * 3 + [2] * 3
    assert task.train.keys[:3] == [
        "train/smile_y/pkg/u0",
        "train/smile_y/pkg/u0#2",
        "train/smile_y/pkg/u1",
    ]
    assert (task.licence, task.warnings) == ("MIT", [])
    assert task.train.picture(0).size == (12, 10)
    assert "row 15" in task.train.where(0)
    file = load(demo, path="demo/a.parquet", name="emotions", task="emoji", max_train_per_class=2)
    assert len(file.train) == 6


def test_probe_pack(demo: Path) -> None:
    probe = load(demo, name="clip", probe=True)
    assert (len(probe.train), len(probe.test)) == (0, 6)
    with pytest.raises(DataError, match="'clip' has no training pictures; use it as a probe"):
        load(demo, name="clip")


def test_unknown_task(demo: Path) -> None:
    with pytest.raises(DataError, match=r"demo: no task 'emojy' in the pack; did you mean 'emoji'"):
        load(demo, task="emojy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, r"bad\.parquet, row \d+: label 1 is"),
        ({"split": "dev"}, r"bad\.parquet, row 0: split 'dev'"),
        ({"class_name": None}, r"bad\.parquet, row 0: .*class None"),
        ({"image": b"oops"}, r"bad\.parquet, row 0 .*not a picture"),
        ({"image": None}, r"bad\.parquet, row 0 .*empty"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "demo/bad.parquet", rows(**change))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(DataError, match=r"demo: holds no \.parquet"):
        load(tmp_path)
    (tmp_path / "demo/cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read as parquet"):
        load(tmp_path)
    write(tmp_path / "demo/cut.parquet", [{"task": "emoji"}])
    with pytest.raises(DataError, match=r"cut\.parquet: not a pack, the column\(s\) split, label"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="knows its own splits"):
        load(tmp_path, train="train", test="test")


def test_two_labels_of_one_name(tmp_path: Path) -> None:
    made = rows()
    for row in made:
        row["class_name"] = "same"
    write(tmp_path / "demo/bad.parquet", made)
    with pytest.raises(DataError, match="two labels of 'emoji' have one class name"):
        load(tmp_path)


def test_skip_in_a_pack(tmp_path: Path) -> None:
    write(tmp_path / "demo/bad.parquet", rows(image=b"oops"))
    task = load(tmp_path, on_error="skip", max_skipped=0.9)
    assert len(task.train) == 8
    assert "bad.parquet, row 0" in task.warnings[0]
