from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from keeplora.data import PictureSet, TaskData, load_task
from keeplora.data.benchmarks import names
from keeplora.errors import ConfigError, DataError
from tests.data.benchmarks import mini

A = ("fgvc-aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers102")
FLOWERS = [names.FLOWERS102[number - 1] for number in mini.FLOWERS]

#: Source -> class names in label order, and what `mini.picture` calls each class.
CLASSES: dict[str, tuple[list[str], list[str]]] = {
    "fgvc-aircraft": (["707-320", "A300B4", "F/A-18", "Yak-42"], list(mini.AIRCRAFT)),
    "caltech101": (
        ["off-center face", "accordion", "head of a crocodile", "yin and yang symbol"],
        list(mini.CALTECH),
    ),
    "cifar100": (["apple", "aquarium fish", "beaver", "maple tree"], list(mini.CIFAR)),
    "dtd": (["banded", "dotted", "polka-dotted", "zigzagged"], list(mini.DTD)),
    "eurosat": (["annual crop land", "forest", "lake or sea"], list(mini.EUROSAT)),
    "flowers102": (["pink primrose", "english marigold", "passion flower", "blackberry lily"], ["1", "5", "77", "102"]),
}
COUNTS = {
    "fgvc-aircraft": (12, 12),
    "caltech101": (30, 8),  # int(0.8 * 38)
    "cifar100": (32, 16),
    "dtd": (12, 12),
    "eurosat": (26, 7),  # int(0.8 * 33)
    "flowers102": (8, 16),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini.make_mini(tmp_path_factory.mktemp("data"), A)


@pytest.fixture
def own(trees: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one dataset's tree, to be damaged."""

    def copy(source: str) -> Path:
        shutil.copytree(trees / mini.PATHS[source], tmp_path / mini.PATHS[source])
        return tmp_path

    return copy


def load(root: Path, source: str, probe: bool = False, **keys: Any) -> TaskData:
    spec = {"name": source, "source": source, "path": mini.PATHS[source], "check": "full", **keys}
    return load_task(spec, root, probe=probe)


def which(pixels: np.ndarray, source: str, seed: int = 0) -> tuple[int, int]:
    """The (class number, index) of the mini picture that ``pixels`` show: the nearest of all of them."""
    height, width = pixels.shape[:2]
    seen = pixels[[height // 4, -height // 4]][:, [width // 4, -width // 4]].astype(int)
    distance = {
        (c, index): int(np.abs(mini.quarters(source, seed, label, index) - seen).max())
        for c, label in enumerate(CLASSES[source][1])
        for index in range(12)
    }
    best = min(distance, key=lambda key: distance[key])
    assert distance[best] <= 6, "not a picture of this tree"
    return best


def shown(pictures: PictureSet, source: str) -> list[tuple[int, int]]:
    return [which(np.asarray(pictures.picture(i)), source) for i in range(len(pictures))]


@pytest.mark.parametrize("source", A)
def test_labels_pictures_and_counts(trees: Path, source: str) -> None:
    task = load(trees, source)
    assert task.classes == CLASSES[source][0]
    assert (len(task.train), len(task.test)) == COUNTS[source]
    seen: set[tuple[int, int]] = set()
    for pictures in (task.train, task.test):
        found = shown(pictures, source)
        assert [label for label, _ in found] == pictures.labels  # the pixels are of the class that the label says
        assert len(set(pictures.keys)) == len(pictures)
        seen |= set(found)
        assert all(key.startswith("train/" if pictures is task.train else "test/") for key in pictures.keys)
        assert all(str(trees / mini.PATHS[source]) in pictures.where(i) for i in range(len(pictures)))
    assert len(seen) == sum(COUNTS[source])  # no picture twice
    known = {"caltech101": 101, "eurosat": 10, "flowers102": 102}.get(source)
    left_out = f"{known - len(task.classes)} declared class(es) without a picture were left out" if known else ""
    assert all(left_out and w.startswith(left_out) for w in task.warnings), task.warnings
    assert len(task.warnings) == (known is not None)


@pytest.mark.parametrize("source", A)
def test_the_same_on_another_root(trees: Path, tmp_path: Path, source: str) -> None:
    other = mini.make_mini(tmp_path / "elsewhere", [source])
    first, second = load(trees, source), load(other, source)
    assert first.train.keys == second.train.keys
    assert first.test.keys == second.test.keys
    assert first.fingerprint == second.fingerprint
    assert load(mini.make_mini(tmp_path / "seed", [source], seed=1), source).fingerprint != first.fingerprint


@pytest.mark.parametrize("source", A)
def test_probe_validation_caps_and_pickling(trees: Path, source: str) -> None:
    probe = load(trees, source, probe=True)
    task = load(trees, source, validation=0.25, max_test_per_class=1)
    assert (len(probe.train), len(probe.test)) == (0, COUNTS[source][1])
    assert task.validation is not None
    assert len(task.train) + len(task.validation) == COUNTS[source][0]
    assert max(np.bincount(task.test.labels)) == 1
    again = pickle.loads(pickle.dumps(task.train))
    assert again.fingerprint == task.train.fingerprint
    assert again.picture(3).tobytes() == task.train.picture(3).tobytes()


@pytest.mark.parametrize("source", A)
def test_own_splits_are_refused(trees: Path, source: str) -> None:
    with pytest.raises(ConfigError, match=r"has its official splits: remove `test: 0\.5`"):
        load(trees, source, test=0.5)
    with pytest.raises(DataError, match=r"no such folder"):
        load(trees, source, path="nowhere")


# --- the splits ----------------------------------------------------------------------------------------------------


def test_aircraft_and_dtd_take_the_official_lists_in_their_order(trees: Path) -> None:
    data = trees / "fgvc-aircraft-2013b/data"
    aircraft = load(trees, "fgvc-aircraft")
    dtd = load(trees, "dtd")
    for split in ("train", "test"):
        lines = (data / f"images_variant_{split}.txt").read_text().splitlines()
        pictures: PictureSet = getattr(aircraft, split)
        assert pictures.keys == [f"{split}/{line.split()[0]}" for line in lines]
        assert [aircraft.classes[label] for label in pictures.labels] == [line.split(" ", 1)[1] for line in lines]
        lines = (trees / f"dtd/dtd/labels/{split}1.txt").read_text().splitlines()
        assert getattr(dtd, split).keys == [f"{split}/{line}" for line in lines]
    assert {index % 3 for _, index in shown(aircraft.train, "fgvc-aircraft")} == {0}  # val, 1, is not used
    assert {index % 3 for _, index in shown(aircraft.test, "fgvc-aircraft")} == {2}
    assert {index % 3 for _, index in shown(dtd.train, "dtd")} == {0}


def test_aircraft_classes_follow_the_list_of_variants(own: Callable[[str], Path]) -> None:
    root = own("fgvc-aircraft")
    (root / "fgvc-aircraft-2013b/data/variants.txt").write_text("\n".join(reversed(mini.AIRCRAFT)))
    task = load(root, "fgvc-aircraft")
    assert task.classes == list(reversed(mini.AIRCRAFT))
    assert [3 - label for label, _ in shown(task.train, "fgvc-aircraft")] == task.train.labels


def test_flowers_take_the_official_sets_in_their_order(trees: Path) -> None:
    task = load(trees, "flowers102")
    sets = loadmat(trees / "flowers-102/setid.mat", squeeze_me=True)
    assert task.train.keys == [f"train/image_{number:05d}.jpg" for number in sets["trnid"]]
    assert task.test.keys == [f"test/image_{number:05d}.jpg" for number in sets["tstid"]]
    labels = loadmat(trees / "flowers-102/imagelabels.mat", squeeze_me=True)["labels"]
    wanted = [names.FLOWERS102[labels[number - 1] - 1] for number in sets["tstid"]]
    assert [task.classes[label] for label in task.test.labels] == wanted


def test_cifar_keeps_the_order_of_the_batch(trees: Path) -> None:
    batch = pickle.loads((trees / "cifar-100-python/test").read_bytes(), encoding="latin1")
    task = load(trees, "cifar100")
    assert task.test.labels == batch["fine_labels"]
    for row in range(len(task.test)):
        want = batch["data"][row].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(np.asarray(task.test.picture(row)), want)  # to the bit: nothing lossy on the way
    assert task.test.keys[3] == "test/00003"
    assert task.test.where(3) == f"{trees}/cifar-100-python/test, row 3"


def by_hand(listing: list[str]) -> tuple[list[str], list[str]]:
    parts = torch.utils.data.random_split(
        range(len(listing)),  # type: ignore[arg-type]
        [int(0.8 * len(listing)), len(listing) - int(0.8 * len(listing))],
        generator=torch.Generator().manual_seed(42),
    )
    train, test = ([f"{split}/{listing[i]}" for i in part.indices] for split, part in zip(("train", "test"), parts))
    return train, test


def test_caltech_is_listed_as_torchvision_lists_it(trees: Path) -> None:
    listing: list[str] = []
    folder = trees / "caltech101/101_ObjectCategories"
    for category in sorted(set(os.listdir(folder)) - {"BACKGROUND_Google"}):
        count = len(os.listdir(folder / category))
        listing += [f"{category}/image_{number:04d}.jpg" for number in range(1, count + 1)]
    task = load(trees, "caltech101")
    assert (task.train.keys, task.test.keys) == by_hand(listing)


def test_eurosat_is_listed_as_an_image_folder(trees: Path) -> None:
    numbers = ("1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    task = load(trees, "eurosat")
    assert (task.train.keys, task.test.keys) == by_hand([f"{c}/{c}_{n}.jpg" for c in mini.EUROSAT for n in numbers])


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("fgvc-aircraft", "fgvc-aircraft-2013b/data"),
        ("caltech101", "caltech101/101_ObjectCategories"),
        ("dtd", "dtd/dtd"),
        ("eurosat", "eurosat/2750"),
    ],
)
def test_the_inner_folder_may_be_named_too(trees: Path, source: str, path: str) -> None:
    assert load(trees, source, path=path).fingerprint == load(trees, source).fingerprint


def test_litter_of_systems_changes_nothing(own: Callable[[str], Path]) -> None:
    for source, folder in (("caltech101", "101_ObjectCategories"), ("eurosat", "2750")):
        root = own(source)
        before = load(root, source)
        base = root / mini.PATHS[source] / folder
        for place in (base, next(p for p in sorted(base.iterdir()) if p.is_dir())):
            (place / ".DS_Store").write_bytes(b"x")
            (place / "._image_0001.jpg").write_bytes(b"x")
        (base / ".hidden").mkdir()
        assert (after := load(root, source)).fingerprint == before.fingerprint
        assert after.warnings == before.warnings


# --- missing and damaged files -------------------------------------------------------------------------------------

AIR, CAL, CIF, TEX = "fgvc-aircraft-2013b/data", "caltech101/101_ObjectCategories", "cifar-100-python", "dtd/dtd"
SAT, FLO = "eurosat/2750", "flowers-102"

#: source, file or folder, what the sentence says after its path
MISSING = [
    ("fgvc-aircraft", AIR, "the data folder is missing; unpack fgvc-aircraft-2013b"),
    ("fgvc-aircraft", f"{AIR}/images", "the folder of pictures is missing; unpack"),
    ("fgvc-aircraft", f"{AIR}/variants.txt", "the list of variants is missing; unpack"),
    ("fgvc-aircraft", f"{AIR}/images_variant_train.txt", "the train list is missing; unpack"),
    ("fgvc-aircraft", f"{AIR}/images_variant_test.txt", "the test list is missing; unpack"),
    ("fgvc-aircraft", f"{AIR}/images/0000000.jpg", "does not exist; mend the path"),
    ("caltech101", CAL, "the folder of categories is missing; unpack 101_ObjectCategories"),
    ("caltech101", f"{CAL}/accordion/image_0003.jpg", "accordion: image_0003.jpg is missing, which shifts the split"),
    ("cifar100", f"{CIF}/meta", "the list of classes is missing; unpack cifar-100"),
    ("cifar100", f"{CIF}/train", "the train batch is missing; unpack cifar-100"),
    ("cifar100", f"{CIF}/test", "the test batch is missing; unpack cifar-100"),
    ("dtd", f"{TEX}/images", "the folder of pictures is missing; unpack dtd-r1.0.1"),
    ("dtd", f"{TEX}/labels/train1.txt", "the train list of split 1 is missing; unpack"),
    ("dtd", f"{TEX}/labels/test1.txt", "the test list of split 1 is missing; unpack"),
    ("dtd", f"{TEX}/images/dotted/dotted_0002.jpg", "does not exist; mend the path"),
    ("eurosat", SAT, "the folder of classes is missing; unpack EuroSAT.zip"),
    ("flowers102", f"{FLO}/jpg", "the folder of pictures is missing; unpack 102flowers"),
    ("flowers102", f"{FLO}/imagelabels.mat", "the table of labels is missing; fetch"),
    ("flowers102", f"{FLO}/setid.mat", "the table of splits is missing; fetch"),
    ("flowers102", f"{FLO}/jpg/image_00001.jpg", "does not exist; mend the path"),
]


def one_sentence(error: pytest.ExceptionInfo[DataError], source: str) -> str:
    text = str(error.value)
    assert text.startswith(f"task {source!r}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("source", "file", "message"), MISSING, ids=[file for _, file, _ in MISSING])
def test_missing(own: Callable[[str], Path], source: str, file: str, message: str) -> None:
    path = own(source) / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as error:
        load(path.parents[len(Path(file).parts) - 1], source)
    text = one_sentence(error, source)
    assert message in text
    assert str(path if "shifts" not in message else path.parent) in text


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no such thing \xff"], ids=["empty", "noise"])
@pytest.mark.parametrize(
    ("source", "file"),
    [(s, f) for s, f, _ in MISSING if "." in Path(f).name or s == "cifar100"]
    + [("eurosat", f"{SAT}/Forest/Forest_2.jpg")],
)
def test_damaged(own: Callable[[str], Path], source: str, file: str, content: bytes) -> None:
    root = own(source)
    assert (root / file).is_file()
    (root / file).write_bytes(content)
    with pytest.raises(DataError) as error:
        load(root, source, check="header")
    assert str(root / file) in one_sentence(error, source)


def change(file: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return apply


def mat(file: str, name: str, values: Any) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        kept = {k: v for k, v in loadmat(root / file).items() if not k.startswith("__")}
        savemat(root / file, {**kept, name: values})

    return apply


def cifar(split: str, key: str, value: Any) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        batch = pickle.loads((root / CIF / split).read_bytes(), encoding="latin1")
        (root / CIF / split).write_bytes(mini.pickle2({**batch, key: value(batch[key])}))

    return apply


def folder(path: str) -> Callable[[Path], None]:
    return lambda root: mini.write_jpeg(root / path, mini.picture("x", 0, "x", 0))


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "fgvc-aircraft",
        change(f"{AIR}/images_variant_train.txt", "A300B4", "A300B5"),
        r"train\.txt: the line '\d{7} A300B5' names no variant; did you mean 'A300B4'",
    ),
    ("fgvc-aircraft", change(f"{AIR}/images_variant_test.txt", " F/A-18", ""), r"names no variant"),
    ("fgvc-aircraft", change(f"{AIR}/variants.txt", "Yak-42\n", ""), r"Yak-42' names no variant"),
    ("dtd", change(f"{TEX}/labels/test1.txt", "dotted/", "dotted "), r"test1\.txt: the line .* is not <class>/<file>"),
    ("dtd", change(f"{TEX}/labels/train1.txt", "banded/", "../banded/"), r"the line .* is not <class>/<file>"),
    ("dtd", change(f"{TEX}/labels/test1.txt", "banded/", "bandit/"), "does not exist"),
    ("caltech101", folder(f"{CAL}/accordions/image_0001.jpg"), r"accordions: no category of .*mean 'accordion'"),
    ("caltech101", lambda root: (root / CAL / "ant").mkdir(), r"the class folder 'ant' holds no picture"),
    ("caltech101", lambda root: shutil.rmtree(root / CAL) or (root / CAL).mkdir(), r"holds no category of Caltech-101"),
    ("eurosat", folder(f"{SAT}/Lake/Lake_1.jpg"), r"Lake: no class of EuroSAT; did you mean 'SeaLake'"),
    ("eurosat", lambda root: (root / SAT / "River").mkdir(), r"the class folder 'River' holds no picture"),
    ("eurosat", lambda root: shutil.rmtree(root / SAT) or (root / SAT).mkdir(), r"holds no class of EuroSAT"),
    ("flowers102", mat(f"{FLO}/imagelabels.mat", "labels", [[0, 1, 2]]), r"'labels' holds 0 to 2, not 1 to 102"),
    ("flowers102", mat(f"{FLO}/imagelabels.mat", "labels", "text"), r"'labels' is not a list of whole numbers"),
    ("flowers102", mat(f"{FLO}/setid.mat", "tstid", [[1.5, 2]]), r"'tstid' is not a list of whole numbers"),
    ("flowers102", mat(f"{FLO}/setid.mat", "tstid", [[4, 33]]), r"'tstid' holds 4 to 33, not 1 to 32"),
    ("flowers102", mat(f"{FLO}/setid.mat", "tstid", [[]]), r"'tstid' is not a list of whole numbers"),
    ("flowers102", mat(f"{FLO}/setid.mat", "tstid", [[3, 4, 5]]), r"picture\(s\) 5 are in train and in test"),
    ("cifar100", cifar("train", "fine_labels", lambda v: v[:-1]), r"train: 'fine_labels' is not a list of 32 labels"),
    ("cifar100", cifar("test", "fine_labels", lambda v: [4, *v[1:]]), r"test, row 0: the label is 4, not 0 to 3"),
    ("cifar100", cifar("test", "fine_labels", lambda v: ["a", *v[1:]]), r"test, row 0: the label is b'a', not 0 to 3"),
    ("cifar100", cifar("train", "data", lambda v: v[:, 1:]), r"'data' is not an array of 32 x 32 RGB pictures"),
    ("cifar100", cifar("train", "data", lambda v: "text"), r"'data' is not an array of 32 x 32 RGB pictures"),
    ("cifar100", cifar("meta", "fine_label_names", lambda v: "apple"), r"meta: 'fine_label_names' is not a list"),
]


@pytest.mark.parametrize(("source", "damage", "message"), WRONG, ids=[f"{s}-{m[:24]}" for s, _, m in WRONG])
def test_wrong_contents(own: Callable[[str], Path], source: str, damage: Callable[[Path], None], message: str) -> None:
    root = own(source)
    damage(root)
    with pytest.raises(DataError, match=message) as error:
        load(root, source)
    one_sentence(error, source)


def test_a_gap_in_eurosat_is_told(own: Callable[[str], Path]) -> None:
    root = own("eurosat")
    (root / SAT / "Forest/Forest_4.jpg").unlink()
    warnings = [w for w in load(root, "eurosat").warnings if "seeded split" in w]
    assert len(warnings) == 1
    assert "Forest: Forest_4.jpg missing, so the seeded split is not the published one" in warnings[0]


def test_other_files_among_caltechs_are_told(own: Callable[[str], Path]) -> None:
    root = own("caltech101")
    before = load(root, "caltech101")
    Image.new("RGB", (8, 8)).save(root / CAL / "accordion/copy.jpg")
    after = load(root, "caltech101")
    assert after.fingerprint == before.fingerprint
    assert "1 file(s) that are no picture of Caltech-101 ignored: accordion/copy.jpg" in after.warnings


def test_a_harmful_batch_is_refused(own: Callable[[str], Path]) -> None:
    root = own("cifar100")
    (root / CIF / "train").write_bytes(b"cposix\nsystem\n(S'echo harm'\ntR.")
    with pytest.raises(DataError, match=r"train: the train batch asks for posix\.system, .* the file may be malicious"):
        load(root, "cifar100")


def test_all_miniature_trees_go_together(tmp_path: Path) -> None:
    mini.make_mini(tmp_path)
    for source in A:
        load(tmp_path, source)
