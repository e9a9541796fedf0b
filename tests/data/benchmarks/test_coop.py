from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keeplora.data import TaskData, load_task
from keeplora.data.benchmarks.coop import few_shots
from keeplora.errors import ConfigError, DataError
from tests.data.benchmarks.mini_b import AIRCRAFT, COOP_CLASSES, COOP_LAYOUT, LANDS, TEST, TRAIN, colour_of, make_coop

SEED = 5


def load(root: Path, dataset: str, **spec: Any) -> TaskData:
    path, split_file, images = COOP_LAYOUT[dataset]
    given = {"name": "t", "source": "coop", "path": path, "split_file": split_file, "images": images, **spec}
    return load_task(given, root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    root = tmp_path_factory.mktemp("x-tail")
    make_coop(root, SEED)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_coop(tmp_path, SEED)
    return tmp_path


@pytest.mark.parametrize("dataset", COOP_LAYOUT)
def test_each_domain(dataset: str, whole: Path) -> None:
    task = load(whole, dataset)
    names = COOP_CLASSES.get(dataset, AIRCRAFT)
    assert task.classes == [name.replace("_", " ") for name in names]
    assert (len(task.train), len(task.test)) == (TRAIN * len(names), TEST * len(names))  # `val` is in neither
    folder, _, images = COOP_LAYOUT[dataset]
    for pictures, split in ((task.train, "train"), (task.test, "test")):
        for index, (key, label) in enumerate(zip(pictures.keys, pictures.labels, strict=True)):
            inside = key.removeprefix(f"{split}/")
            assert Path(pictures.where(index)) == whole / folder / images / inside
            wanted = colour_of(names[label], Path(inside).name, SEED)
            assert np.abs(np.asarray(pictures.picture(index)).reshape(-1, 3).mean(0) - wanted).max() < 3
    assert task.warnings == []
    assert load(whole, dataset).fingerprint == task.fingerprint


def test_the_order_of_a_split_file_is_kept(whole: Path) -> None:
    listed = json.loads((whole / "oxford_flowers/split_zhou_OxfordFlowers.json").read_text())
    task = load(whole, "flowers")
    assert task.train.keys == [f"train/{picture}" for picture, _, _ in listed["train"]]
    assert task.train.labels == [label for _, label, _ in listed["train"]] != sorted(task.train.labels)


@pytest.mark.parametrize(("dataset", "shots"), [("flowers", 3), ("eurosat", 4), ("aircraft", 2)])
def test_shots_are_drawn_as_coop_does(dataset: str, shots: int, whole: Path) -> None:
    every = load(whole, dataset)
    random.seed(42)
    groups: dict[int, list[str]] = {}
    for key, label in zip(every.train.keys, every.train.labels, strict=True):
        groups.setdefault(label, []).append(key)
    wanted = [key for found in groups.values() for key in random.sample(found, shots)]
    task = load(whole, dataset, shots=shots, split_seed=42)
    assert task.train.keys == wanted
    assert task.test.keys == every.test.keys
    assert task.classes == every.classes
    (warning,) = task.warnings
    assert warning.startswith(f"not paper-comparable: the {shots} shots per class are drawn with seed 42")
    assert load(whole, dataset, shots=shots, split_seed=43).train.keys != wanted


def test_a_class_with_fewer_pictures_is_drawn_from_with_repetition(whole: Path) -> None:
    task = load(whole, "dtd", shots=16, split_seed=42, expect={"train": 48, "test": 9, "classes": 3})
    assert [task.train.labels.count(label) for label in range(3)] == [16] * 3
    assert len(set(task.train.keys)) == 48
    assert any(key.endswith("#2") for key in task.train.keys)
    assert len({key.partition("#")[0] for key in task.train.keys}) <= 3 * TRAIN
    assert len(task.warnings) == 1  # the shots; repeated pictures are no damage, and 48 are expected


def test_few_shots_of_known_classes() -> None:
    # CPython's generator is the same on all platforms and versions; these are its draws for seed 42
    assert few_shots(["b", "b", "a", "b"], 2, seed=42) == [3, 0, 2, 2]
    assert few_shots([0] * 100, 3, seed=42) == [81, 14, 3]


def test_classes_may_be_renamed(whole: Path) -> None:
    names = {name: f"{name} satellite location" for name in LANDS.values()}
    assert load(whole, "eurosat", classes=names).classes == list(names.values())


@pytest.mark.parametrize("shots", [0, -1, 1.5, True, "16"])
def test_shots_that_are_no_number(shots: object, whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"`shots` is .*: give a whole number, 1 or more"):
        load(whole, "dtd", shots=shots)


def fails(root: Path, dataset: str, *parts: object, **spec: Any) -> None:
    with pytest.raises(DataError) as error:
        load(root, dataset, **spec)
    text = str(error.value)
    assert text.startswith("task 't': "), text
    assert len(text.splitlines()) == 1, text
    for part in ("; ", *parts):
        assert str(part) in text, (part, text)


FILES = [
    *(("aircraft", name) for name in ("variants.txt", "images_variant_train.txt", "images_variant_test.txt")),
    *((dataset, file) for dataset, (_, file, _) in COOP_LAYOUT.items() if file is not None),
]


@pytest.mark.parametrize(("dataset", "file"), FILES)
def test_every_missing_or_damaged_file_is_named(dataset: str, file: str, root: Path) -> None:
    path = root / COOP_LAYOUT[dataset][0] / file
    whole = path.read_bytes()
    path.unlink()
    fails(root, dataset, path, "is missing")
    for content in (b"", whole[: len(whole) // 2 + 1] + b"\xff", b"\xff\xfe\x00rubbish"):
        path.write_bytes(content)
        fails(root, dataset, path)


@pytest.mark.parametrize("dataset", [d for d in COOP_LAYOUT if d != "cars"])
def test_a_missing_picture_folder_is_named(dataset: str, root: Path) -> None:
    folder, _, images = COOP_LAYOUT[dataset]
    (root / folder / images).rename(root / "gone")
    fails(root, dataset, root / folder / images, "is missing; set `images`")


def test_a_missing_picture_is_named(root: Path) -> None:
    (root / "stanford_cars/cars_test/00008.jpg").unlink()
    fails(root, "cars", root / "stanford_cars/cars_test/00008.jpg", "does not exist")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda split: split.pop("test"), "no list of test pictures"),
        (lambda split: split["train"].clear(), "no list of train pictures"),
        (lambda split: split["train"].append(["a.jpg", 0]), "entry 15 of train: ['a.jpg', 0] is not [picture, label,"),
        (lambda split: split["train"].append("a.jpg"), "entry 15 of train"),
        (lambda split: split["test"].append(["a.jpg", "0", "banded"]), "entry 9 of test"),
        (lambda split: split["test"].append(["a.jpg", True, "banded"]), "entry 9 of test"),
        (lambda split: split["test"].append(["a.jpg", 0, " "]), "entry 9 of test"),
        (lambda split: split["test"].append(["a.jpg", 1, "banded"]), "'a.jpg' has label 1 and class 'banded'"),
        (lambda split: split["test"].append(["a.jpg", 7, "banded"]), "'a.jpg' has label 7 and class 'banded'"),
        (lambda split: split["test"].append(["a.jpg", 0, "spotted"]), "'a.jpg' has label 0 and class 'spotted'"),
        (lambda split: split["test"].append(split["test"][0]), "listed twice in test"),
        (lambda split: split["train"].append(split["train"][0]), "listed twice in train"),
    ],
)
def test_a_wrong_split_file(change: Callable[[dict[str, list[Any]]], object], told: str, root: Path) -> None:
    path = root / "dtd/split_zhou_DescribableTextures.json"
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))
    fails(root, "dtd", root / "dtd", told)


def test_a_split_file_that_is_a_list(root: Path) -> None:
    (root / "dtd/split_zhou_DescribableTextures.json").write_text("[]")
    fails(root, "dtd", "no list of train pictures")


def test_an_unknown_variant(root: Path) -> None:
    table = root / "fgvc_aircraft/images_variant_test.txt"
    table.write_text(f"{table.read_text()}0000001 Spitfire\n")
    fails(root, "aircraft", table, "'0000001 Spitfire' is not `picture variant`")
