from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import random_split

from keeplora.data import PictureSet, TaskData, load_task
from keeplora.data.benchmarks.sun397 import ORDER_WARNING
from keeplora.errors import ConfigError, DataError
from tests.data.benchmarks.mini_b import (
    CARS,
    FOODS,
    MAKERS_B,
    PETS,
    SCENES,
    TEST,
    TRAIN,
    colour_of,
    digits,
    idx_bytes,
    save_annotations,
)

FOLDERS = {
    "food101": "food-101",
    "mnist": "MNIST",
    "oxford-pet": "oxford-iiit-pet",
    "stanford-cars": "stanford_cars",
    "sun397": "SUN397",
}
#: Every official file and folder that a loader reads, without the pictures.
FILES = {
    "food101": ["meta/classes.txt", "meta/train.txt", "meta/test.txt", "images/"],
    "mnist": [f"raw/{p}-{kind}-ubyte" for p in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")] + ["raw/"],
    "oxford-pet": ["annotations/trainval.txt", "annotations/test.txt", "images/"],
    "stanford-cars": [
        "devkit/cars_meta.mat",
        "devkit/cars_train_annos.mat",
        "cars_test_annos_withlabels.mat",
        "cars_train/",
        "cars_test/",
    ],
    "sun397": ["ClassName.txt", "c/church/outdoor/"],
}
SEED = 3


def load(root: Path, source: str, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "t", "source": source, "path": FOLDERS[source], **spec}, root, probe=probe)


@pytest.fixture(params=FOLDERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    MAKERS_B[request.param](tmp_path, SEED)
    return request.param


def made(source: str, root: Path) -> Path:
    MAKERS_B[source](root, SEED)
    return root / FOLDERS[source]


def near(pictures: PictureSet, index: int, colour: tuple[int, int, int]) -> bool:
    found = np.asarray(pictures.picture(index)).reshape(-1, 3).mean(0)
    return bool(np.abs(found - colour).max() < 3)


def labelled(pictures: PictureSet) -> Iterator[tuple[int, str, int]]:
    """(index, file name, label) of every picture."""
    for index, (key, label) in enumerate(zip(pictures.keys, pictures.labels, strict=True)):
        yield index, key.rpartition("/")[2], label


# --- one dataset each -------------------------------------------------------------------------------------------------


def test_food101(tmp_path: Path) -> None:
    made("food101", tmp_path)
    task = load(tmp_path, "food101")
    assert task.classes == ["apple pie", "baby back ribs", "baklava"]
    assert task.train.labels == [0] * TRAIN + [1] * TRAIN + [2] * TRAIN
    assert task.test.labels == [0] * TEST + [1] * TEST + [2] * TEST
    assert task.train.keys[:2] == ["train/apple_pie/1000.jpg", "train/apple_pie/1001.jpg"]
    assert task.test.keys[-1] == "test/baklava/2002.jpg"
    assert task.train.where(0) == str(tmp_path / "food-101/images/apple_pie/1000.jpg")
    for pictures in (task.train, task.test):
        assert all(near(pictures, i, colour_of(FOODS[label], name, SEED)) for i, name, label in labelled(pictures))
    assert task.warnings == []


def test_oxford_pet(tmp_path: Path) -> None:
    made("oxford-pet", tmp_path)
    task = load(tmp_path, "oxford-pet")
    # by class id, although the lists start with class 3
    assert task.classes == ["Abyssinian", "American Bulldog", "American Pit Bull Terrier"]
    assert task.train.labels == [2] * TRAIN + [0] * TRAIN + [1] * TRAIN
    assert task.train.keys[0] == "train/american_pit_bull_terrier_1.jpg"
    assert len(task.test) == 3 * TEST
    assert "test/Abyssinian_6.jpg" in task.test.keys
    for pictures in (task.train, task.test):
        assert all(near(pictures, i, colour_of(PETS[label + 1], name, SEED)) for i, name, label in labelled(pictures))
    assert task.warnings == []


def test_stanford_cars(tmp_path: Path) -> None:
    root = made("stanford-cars", tmp_path)
    task = load(tmp_path, "stanford-cars")
    assert task.classes == list(CARS)
    assert task.train.labels == [0, 1, 2] * TRAIN
    assert task.test.labels == [0, 1, 2] * TEST
    assert (task.train.keys[0], task.test.keys[0]) == ("train/00001.jpg", "test/00001.jpg")
    for pictures, seed in ((task.train, SEED), (task.test, SEED + 1)):
        assert all(near(pictures, i, colour_of(CARS[label], name, seed)) for i, name, label in labelled(pictures))
    assert task.warnings == []
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit/cars_test_annos_withlabels.mat")
    assert load(tmp_path, "stanford-cars").fingerprint == task.fingerprint


def test_one_annotation_is_not_squeezed_away(tmp_path: Path) -> None:
    root = made("stanford-cars", tmp_path)
    save_annotations(root / "cars_test_annos_withlabels.mat", [("00002.jpg", 2)])
    assert load(tmp_path, "stanford-cars").test.labels == [1]


def test_sun397(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("sun397", tmp_path)
    task = load(tmp_path, "sun397")
    assert task.classes == ["abbey", "airplane cabin", "church/indoor", "church/outdoor"]
    every = sorted(p.relative_to(root).parts for p in root.rglob("sun_*.jpg"))
    assert len(every) == 32
    cut = random_split(every, [25, 7], generator=torch.Generator().manual_seed(42))  # type: ignore[arg-type]
    for pictures, split, part in ((task.train, "train", cut[0]), (task.test, "test", cut[1])):
        assert pictures.keys == ["/".join((split, *every[i])) for i in part.indices]
        assert pictures.labels == [SCENES.index("/".join(every[i][:-1])) for i in part.indices]
        assert all(near(pictures, i, colour_of(SCENES[label], name, SEED)) for i, name, label in labelled(pictures))
    assert task.warnings == [ORDER_WARNING]
    (root / "ClassName.txt").write_text("".join(f"/{scene}\n" for scene in reversed(SCENES)))
    turned = load(tmp_path, "sun397")
    assert turned.classes == task.classes[::-1]
    assert turned.train.keys == task.train.keys
    (root / "ClassName.txt").write_text("".join(f"/{scene}\n" for scene in SCENES))
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listing(path), reverse=True))
    assert load(tmp_path, "sun397").fingerprint == task.fingerprint


def test_mnist(tmp_path: Path) -> None:
    root = made("mnist", tmp_path)
    task = load(tmp_path, "mnist")
    assert task.classes[0] == "0 - zero"
    assert task.classes[9] == "9 - nine"
    assert len(task.classes) == 10
    for pictures, number, count in ((task.train, 2 * SEED, TRAIN), (task.test, 2 * SEED + 1, TEST)):
        arrays, labels = digits(number, count)
        assert pictures.labels == labels.tolist()
        assert len(pictures) == 10 * count
        for index, array in enumerate(arrays):
            grey = np.asarray(pictures.picture(index))
            assert grey.shape == (28, 28, 3)
            assert (grey == array[..., None]).all()
    assert task.train.keys[7] == "train/00007"
    assert task.train.where(7) == f"{root}/raw/train-images-idx3-ubyte, picture 7"
    assert task.warnings == []
    for file in (root / "raw").iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = load(tmp_path, "mnist")
    assert packed.fingerprint == task.fingerprint
    assert ".gz, picture 7" in packed.train.where(7)


def test_mnist_shots_are_numpys_choice_digit_by_digit(tmp_path: Path) -> None:
    made("mnist", tmp_path)
    labels = np.array(load(tmp_path, "mnist").train.labels)
    np.random.seed(42)
    wanted = [int(i) for digit in range(10) for i in np.random.choice(np.where(labels == digit)[0], 3, replace=False)]
    task = load(tmp_path, "mnist", shots=3, split_seed=42)
    assert task.train.keys == [f"train/{i:05d}" for i in wanted]
    assert task.train.labels == [digit for digit in range(10) for _ in range(3)]
    assert len(task.test) == 10 * TEST
    assert load(tmp_path, "mnist", shots=3, split_seed=43).train.keys != task.train.keys
    assert len(load(tmp_path, "mnist", shots=99).train) == 10 * TRAIN  # no digit has more


# --- what all have in common ------------------------------------------------------------------------------------------


def test_loading_twice_gives_the_same_and_a_probe_is_the_test_set(source: str, tmp_path: Path) -> None:
    task, again = load(tmp_path, source), load(tmp_path, source)
    assert (task.fingerprint, task.train.keys) == (again.fingerprint, again.train.keys)
    assert not set(task.train.keys) & set(task.test.keys)
    probe = load(tmp_path, source, probe=True)
    assert len(probe.train) == 0
    assert probe.test.keys == task.test.keys
    assert {probe.classes[label] for label in probe.test.labels} == {task.classes[label] for label in task.test.labels}


def sentence(error: pytest.ExceptionInfo[DataError], *parts: object) -> None:
    """One sentence, of the task, with every part, and with the way to mend it."""
    text = str(error.value)
    assert text.startswith("task 't': "), text
    assert len(text.splitlines()) == 1, text
    for part in ("; ", *parts):
        assert str(part) in text, (part, text)


@pytest.mark.parametrize(("source", "name"), [(s, name) for s, names in FILES.items() for name in names])
def test_every_missing_file_is_named(source: str, name: str, tmp_path: Path) -> None:
    path = made(source, tmp_path) / name
    path.rename(path.with_name("gone"))
    with pytest.raises(DataError) as error:
        load(tmp_path, source)
    sentence(error, path, "is missing")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00rubbish" * 20], ids=["empty", "rubbish"])
@pytest.mark.parametrize(("source", "name"), [(s, n) for s, names in FILES.items() for n in names if n[-1] != "/"])
def test_every_damaged_file_is_named(source: str, name: str, content: bytes, tmp_path: Path) -> None:
    path = made(source, tmp_path) / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load(tmp_path, source)
    sentence(error, path)


# SUN397 has no list of pictures: a missing one is told by `expect`
@pytest.mark.parametrize(
    ("source", "cut"),
    [(s, cut) for s in FOLDERS for cut in (False, True) if s != "mnist" and (cut or s != "sun397")],
)
def test_a_missing_or_cut_picture_is_named(source: str, cut: bool, tmp_path: Path) -> None:
    path = sorted(made(source, tmp_path).rglob("*.jpg"))[0]
    if cut:
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(DataError) as error:
        load(tmp_path, source)
    sentence(error, path)


def test_the_folder_and_the_official_splits_are_insisted_on(tmp_path: Path) -> None:
    made("food101", tmp_path)
    with pytest.raises(DataError, match="did you mean 'food-101'"):
        load(tmp_path, "food101", path="food101")
    with pytest.raises(ConfigError, match=r"official splits: remove `test: 0\.2`"):
        load(tmp_path, "food101", test=0.2)
    with pytest.raises(ConfigError, match="unknown key 'shots' for source 'food101'"):
        load(tmp_path, "food101", shots=3)


# --- damage that only one format can have -----------------------------------------------------------------------------


def append(line: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(f"{path.read_text()}{line}\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cars(*rows: tuple[str, int], labelled: bool = True) -> Callable[[Path], object]:
    return lambda path: save_annotations(path, list(rows), labelled=labelled)


def packed(keep: int) -> Callable[[Path], object]:
    def pack(path: Path) -> None:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:keep])
        path.unlink()

    return pack


@pytest.mark.parametrize(
    ("source", "name", "damage", "told"),
    [
        ("food101", "meta/train.txt", append("sushi/7"), "'sushi/7' is not `class/number`"),
        ("food101", "meta/train.txt", append("apple_pie"), "'apple_pie' is not `class/number`"),
        ("food101", "meta/test.txt", append("apple_pie/2000"), "listed twice in test"),
        ("oxford-pet", "annotations/test.txt", append("Abyssinian_9 1 1"), "'Abyssinian_9 1 1' is not `Breed_number"),
        ("oxford-pet", "annotations/test.txt", append("Abyssinian_9 one 1 1"), "is not `Breed_number"),
        (
            "oxford-pet",
            "annotations/test.txt",
            append("Beagle_9 1 1 1"),
            "class 1 is 'Beagle' here, 'Abyssinian' above",
        ),
        ("oxford-pet", "annotations/test.txt", append("Abyssinian_9 9 1 1"), "two class ids have one breed"),
        ("stanford-cars", "devkit/cars_train_annos.mat", cars(("00001.jpg", 4)), "of class 4, cars_meta.mat has 3"),
        ("stanford-cars", "devkit/cars_train_annos.mat", cars(("00001.jpg", 0)), "of class 0, cars_meta.mat has 3"),
        ("stanford-cars", "cars_test_annos_withlabels.mat", cars(("1.jpg", 1), labelled=False), "have no class; fetch"),
        ("stanford-cars", "devkit/cars_meta.mat", cars(("1.jpg", 1)), "lacks the variable(s) class_names"),
        ("sun397", "ClassName.txt", append("/x/nowhere"), "x/nowhere: a class folder is missing"),
        ("sun397", "ClassName.txt", append("/a/abbey"), "'/a/abbey' is not `/letter/class`, or is there twice"),
        ("sun397", "ClassName.txt", append("/../x/y"), "is not `/letter/class`"),
        ("sun397", "ClassName.txt", lambda p: p.write_text("/a/abbey\n/c/church/indoor\n"), "is no class of ClassName"),
        ("mnist", "raw/train-images-idx3-ubyte", cut, "39,199 bytes where the header says 39,200"),
        ("mnist", "raw/train-labels-idx1-ubyte", cut, "49 bytes where the header says 50"),
        ("mnist", "raw/t10k-images-idx3-ubyte", packed(90), "t10k-images-idx3-ubyte.gz: the test pictures cannot be"),
        ("mnist", "raw/t10k-labels-idx1-ubyte", packed(5), "t10k-labels-idx1-ubyte.gz: the test labels cannot be"),
        (
            *("mnist", "raw/t10k-labels-idx1-ubyte"),
            *(lambda path: path.write_bytes(idx_bytes(np.zeros(29, np.uint8))), "29 labels for the 30 pictures"),
        ),
        (
            *("mnist", "raw/t10k-labels-idx1-ubyte"),
            *(lambda path: path.write_bytes(idx_bytes(np.full(30, 10, np.uint8))), "the label 10, not a digit"),
        ),
        (
            *("mnist", "raw/train-images-idx3-ubyte"),
            *(lambda path: path.write_bytes(idx_bytes(np.zeros(50, np.uint8))), "an IDX file of bytes with 3 axes"),
        ),
        (
            *("mnist", "raw/t10k-images-idx3-ubyte"),
            *(lambda path: path.write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8))), "0 bytes where the header"),
        ),
    ],
)
def test_damage_of_one_format(
    source: str, name: str, damage: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    root = made(source, tmp_path)
    damage(root / name)
    with pytest.raises(DataError) as error:
        load(tmp_path, source)
    sentence(error, root, told)
