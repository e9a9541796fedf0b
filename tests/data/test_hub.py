from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from picture_files import encode

from keeplora.data import TaskData, load_task
from keeplora.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def quiet_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def split(count: int, start: int, names: tuple[str, ...] = ("zebra", "sea_lion", "owl")) -> datasets.Dataset:
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "photo": datasets.Image(),
            "animal": datasets.ClassLabel(names=list(names)),
            "text": datasets.Value("string"),
        }
    )
    rows = [
        {"id": i, "photo": {"bytes": encode(start + i), "path": None}, "animal": i % 3, "text": ["x", "y", "z"][i % 3]}
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def load(root: Path, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "animals", "source": "datasets", "path": "animals", **spec}, root, probe=probe)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    datasets.DatasetDict({"train": split(9, 0), "test": split(6, 100)}).save_to_disk(tmp_path / "animals")
    return tmp_path


def test_saved_dataset(animals: Path) -> None:
    task = load(animals)
    assert task.classes == ["zebra", "sea lion", "owl"]  # the dataset's own order
    assert task.train.labels == [0, 1, 2] * 3
    assert task.test.keys[:2] == ["test[0]", "test[1]"]
    assert task.train.picture(4).size == (12, 10)
    assert task.warnings == []
    named = load(animals, label_column="text", image_column="photo", classes={"x": "ex"})
    assert named.classes == ["ex", "y", "z"]
    # loader workers get a copy
    assert pickle.loads(pickle.dumps(task.train)).picture(4).tobytes() == task.train.picture(4).tobytes()


def test_columns_and_splits_have_hints(animals: Path) -> None:
    with pytest.raises(DataError, match=r"animals, split 'train': no column 'foto' for `image_column`; did you mean"):
        load(animals, image_column="foto")
    with pytest.raises(DataError, match=r"animals: no split 'tset' for `test`; did you mean 'test'"):
        load(animals, test="tset")
    with pytest.raises(DataError, match=r"row 0: the picture is missing|row 0: not a picture|x: does not exist"):
        load(animals, image_column="text")


def test_parquet_file_and_fraction(animals: Path) -> None:
    split(9, 0).to_parquet(animals / "a.parquet")
    task = load(animals, path="a.parquet", test=0.34)
    assert (len(task.train), len(task.test)) == (6, 3)
    assert task.classes == ["zebra", "sea lion", "owl"]


def test_folder_of_pictures(animals: Path) -> None:
    for part, start in (("train", 0), ("test", 50)):
        for index, name in enumerate(("cat", "dog")):
            folder = animals / "pets" / part / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(encode(start + index))
    task = load(animals, path="pets")
    assert task.classes == ["cat", "dog"]
    assert task.test.picture(1).size == (12, 10)


def test_train_and_validation_only(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": split(9, 0), "validation": split(6, 100)}).save_to_disk(tmp_path / "animals")
    with pytest.raises(DataError, match=r"has the splits train, validation and none is called test"):
        load(tmp_path)
    task = load(tmp_path, test="validation")
    assert (len(task.test), task.validation) == (6, None)


def test_hidden_labels_and_unused_classes(tmp_path: Path) -> None:
    good = split(9, 0, ("zebra", "sea_lion", "owl", "never"))
    hidden = split(3, 100, ("zebra", "sea_lion", "owl", "never")).map(lambda row: {"animal": -1})
    datasets.DatasetDict({"train": good, "test": hidden}).save_to_disk(tmp_path / "animals")
    with pytest.raises(DataError, match=r"animals, split 'test', row 0: the label is missing"):
        load(tmp_path)
    task = load(tmp_path, test=0.34)
    assert task.classes == ["zebra", "sea lion", "owl"]
    assert any("without a picture were left out: never" in w for w in task.warnings)


def test_bad_pictures_are_named_by_row(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": encode(i) if i != 3 else b"oops", "path": None}, "label": "ab"[i % 2]} for i in range(8)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "animals")
    with pytest.raises(DataError, match=r"animals, split 'train', row 3: not a picture"):
        load(tmp_path)
    assert len(load(tmp_path, on_error="skip", max_skipped=0.9, test=0.25).train) == 5


def test_paths_and_names_that_lead_nowhere(animals: Path) -> None:
    with pytest.raises(DataError, match=rf"{animals}/gone\.parquet: no such file"):
        load(animals, path="gone.parquet")
    with pytest.raises(DataError, match=r"dataset 'no-such/dataset': `datasets` cannot load it .*check the name"):
        load(animals, path="no-such/dataset")
    (animals / "t.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"t\.csv: not a parquet file; use `source: table`"):
        load(animals, path="t.csv")
    with pytest.raises(ConfigError, match="needs `path`"):
        load(animals, path=None, train="train")


def test_probe_uses_test_alone(animals: Path) -> None:
    probe = load(animals, probe=True)
    assert (len(probe.train), len(probe.test), probe.classes) == (0, 6, ["zebra", "sea lion", "owl"])
