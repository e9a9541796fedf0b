from __future__ import annotations

import shutil
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pytest
from picture_files import Tree, encode

from keeplora.data import TaskData, load_task
from keeplora.data.pictures import PictureError
from keeplora.errors import ConfigError, DataError


def load(tree: Tree, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "pets", "source": "folder", "path": "pets", **spec}, tree.root, probe=probe)


def test_train_and_test_folders(pets: Tree) -> None:
    task = load(pets)
    assert task.classes == ["cat", "dog"]
    assert task.train.labels == [0] * 4 + [1] * 4
    assert task.test.keys == [f"test/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)]
    assert (task.validation, task.warnings, task.licence) == (None, [], None)
    assert task.templates == ["a photo of a {c}."]
    assert task.train.picture(0).size == (12, 10)


def test_named_folders_without_path(pets: Tree) -> None:
    task = load(pets, path=None, train="pets/train", test=str(pets.root / "pets/test"))
    assert task.fingerprint == load(pets).fingerprint


def test_fingerprint_is_of_content_not_place(pets: Tree, tmp_path: Path) -> None:
    first = load(pets)
    shutil.copytree(pets.root / "pets", pets.root / "elsewhere" / "pets2")
    moved = load(pets, path="elsewhere/pets2", name="other")
    assert moved.fingerprint == first.fingerprint
    assert load(pets, templates="a {}").fingerprint != first.fingerprint
    pets.write("pets/train/cat/0.png")
    changed = load(pets)
    assert changed.fingerprint != first.fingerprint
    assert changed.test.fingerprint == first.test.fingerprint


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_folder(pets: Tree, name: str) -> None:
    pets.classes(f"pets/{name}", "cat dog", 1)
    task = load(pets)
    assert task.validation is not None
    assert task.validation.labels == [0, 1]


def test_validation_fraction_and_named_folder(pets: Tree) -> None:
    task = load(pets, validation=0.25)
    assert task.validation is not None
    assert (len(task.train), len(task.validation)) == (6, 2)
    pets.classes("pets/extra", "cat dog", 1)
    named = load(pets, validation="extra")
    assert named.validation is not None
    assert named.validation.keys[0] == "validation/cat/0.png"


def test_flat_folder_is_split_and_says_so(tree: Tree) -> None:
    tree.classes("pets", "cat dog", 10)
    task = load(tree, test=0.3)
    assert (len(task.train), len(task.test)) == (14, 6)
    assert task.warnings == []
    assert load(tree, test=0.3).test.keys == task.test.keys
    assert load(tree, test=0.3, split_seed=1).test.keys != task.test.keys
    default = load(tree)
    assert len(default.test) == 4
    assert "no test pictures were named: 20%" in default.warnings[0]


def test_flat_split_keeps_copies_on_one_side(tree: Tree) -> None:
    tree.classes("pets", "cat dog", 6)
    for index in range(5):
        tree.write(f"pets/cat/copy{index}.png", encode(999))
    for seed in range(8):
        task = load(tree, test=0.4, split_seed=seed)
        assert not any("also in" in w for w in task.warnings)


def test_parent_folder_given_as_train(pets: Tree) -> None:
    with pytest.raises(DataError, match=r"pets: `train` names a folder that holds test, train, not classes; .*`path:`"):
        load(pets, path=None, train="pets", test="pets/test")


def test_train_and_val_without_test(pets: Tree) -> None:
    (pets.root / "pets/test").rename(pets.root / "pets/val")
    with pytest.raises(DataError, match=r"no test folder; set `test: val`"):
        load(pets)
    named = load(pets, test="val")
    assert (len(named.test), named.validation) == (4, None)
    cut = load(pets, test=0.25)
    assert (len(cut.train), len(cut.test), len(cut.validation or [])) == (6, 2, 4)


def test_fraction_beside_a_test_folder(pets: Tree) -> None:
    with pytest.raises(ConfigError, match=r"`test` is 0\.2, but .*test exists"):
        load(pets, test=0.2)


def test_a_class_may_be_called_train(tree: Tree) -> None:
    tree.classes("pets", "bus test train", 3)
    assert load(tree, test=0.3).classes == ["bus", "test", "train"]
    tree.write("pets/train/steam/9.png")
    assert load(tree, test=0.3).classes == ["bus", "test", "train"]


def test_cutting_tests_every_class(tree: Tree) -> None:
    tree.classes("pets", "cat dog", 20)
    tree.classes("pets", "owl", 2)
    task = load(tree, test=0.1)
    assert [task.test.labels.count(c) for c in range(3)] == [2, 2, 1]


def test_splits_without_class_folders(tree: Tree) -> None:
    for name in ("train/1.png", "train/2.png", "test/3.png"):
        tree.write(f"pets/{name}")
    with pytest.raises(DataError, match=r"pets: holds only test, train, without .* class folders"):
        load(tree)


def test_two_train_folders(pets: Tree) -> None:
    pets.classes("pets/training", "cat dog", 1)
    with pytest.raises(DataError, match="both train and training"):
        load(pets)


def test_one_level_too_high(pets: Tree) -> None:
    with pytest.raises(DataError, match=r"did you mean `path: .*pets`"):
        load(pets, path=".", test=0.2)


def test_missing_path_is_absolute_and_has_a_hint(pets: Tree) -> None:
    with pytest.raises(DataError) as caught:
        load(pets, path="petz")
    assert f"{pets.root}/petz: no such folder; did you mean 'pets'?" in str(caught.value)
    pets.write("readme.txt", b"hello")
    with pytest.raises(DataError, match=r"readme\.txt: a file, not a folder"):
        load(pets, path="readme.txt")


def test_no_class_folders(tree: Tree) -> None:
    tree.write("pets/a.png")
    with pytest.raises(DataError, match=r"pets: holds 1 picture\(s\) but no class folders"):
        load(tree)


def test_empty_class_folder(pets: Tree) -> None:
    (pets.root / "pets/train/cow").mkdir()
    with pytest.raises(DataError, match=r"train/cow: the class folder 'cow' holds no picture"):
        load(pets)
    (pets.root / "pets/train/cow").rmdir()
    (pets.root / "pets/test/cow").mkdir()
    assert any("test/cow" in w for w in load(pets).warnings)


def test_class_in_test_but_not_in_train(pets: Tree) -> None:
    pets.write("pets/test/dogs/7.png")
    with pytest.raises(DataError, match=r"dogs/7\.png: class 'dogs' is in test but not in train; .*did you mean 'dog'"):
        load(pets)


def test_class_in_train_but_not_in_test(pets: Tree) -> None:
    pets.classes("pets/train", "cow", 2)
    task = load(pets)
    assert task.classes == ["cat", "cow", "dog"]
    assert any("no picture in test: cow" in w for w in task.warnings)


def test_one_class_only(tree: Tree) -> None:
    tree.classes("pets/train", "cat", 3)
    tree.classes("pets/test", "cat", 3)
    with pytest.raises(DataError, match=r"only the class 'cat' in .*cat/0\.png.*at least two classes"):
        load(tree)


def bad_pictures(tree: Tree) -> None:
    tree.write("pets/train/cat/cut.jpg", encode(50, "JPEG", (40, 40))[:-300])
    tree.write("pets/train/dog/none.png", b"")
    tree.write("pets/test/dog/text.png", b"hello")


def test_bad_pictures_are_refused_by_name(pets: Tree) -> None:
    bad_pictures(pets)
    with pytest.raises(PictureError, match=r"^task 'pets': /.*train/cat/cut\.jpg: .*on_error: skip.*\(1 more picture"):
        load(pets)


def test_bad_pictures_are_skipped_and_counted(pets: Tree) -> None:
    clean = load(pets)
    bad_pictures(pets)
    (pets.root / "pets/train/cat/lost.png").symlink_to("nowhere.png")
    task = load(pets, on_error="skip", max_skipped=0.9)
    assert task.train.fingerprint == clean.train.fingerprint
    assert (task.train.skipped, task.test.skipped) == (0, 1)
    assert task.test.fingerprint != clean.test.fingerprint  # another test: one picture of it counts as wrong
    train, test = task.warnings
    assert train.startswith("3 unusable picture(s) of train skipped:")
    assert all(name in train for name in ("cut.jpg", "none.png", "lost.png"))
    assert "text.png" in test


def test_skip_decodes_in_full(pets: Tree) -> None:
    # the checksums are right, but what they cover is no picture: only decoding tells
    chunks = [(b"IHDR", b"\0\0\0\x10\0\0\0\x10\x08\2\0\0\0"), (b"IDAT", b"not compressed data"), (b"IEND", b"")]
    data = b"".join(
        len(d).to_bytes(4, "big") + kind + d + zlib.crc32(kind + d).to_bytes(4, "big") for kind, d in chunks
    )
    pets.write("pets/train/cat/hole.png", b"\x89PNG\r\n\x1a\n" + data)
    quick = load(pets)
    with pytest.raises(PictureError, match=r"cat/hole\.png: damaged"):
        quick.train.picture(quick.train.keys.index("train/cat/hole.png"))
    with pytest.raises(PictureError, match=r"cat/hole\.png: damaged"):
        load(pets, check="full")
    assert "train/cat/hole.png" not in load(pets, on_error="skip", max_skipped=0.9).train.keys


def test_class_lost_to_skipping(pets: Tree) -> None:
    for path in (pets.root / "pets/train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"class 'dog' has no usable picture left in train \(one was .*dog/0\.png"):
        load(pets, on_error="skip", max_skipped=0.9)


def test_huge_picture(pets: Tree) -> None:
    pets.write("pets/test/cat/big.png", encode(1, "PNG", (40, 30)))
    with pytest.raises(PictureError, match=r"big\.png: 40 x 30 pixels, more than max_pixels \(1,000\)"):
        load(pets, max_pixels=1000)


@pytest.fixture
def copied(pets: Tree) -> Tree:
    """One training picture is also in test."""
    pets.write("pets/train/cat/copy.png", (pets.root / "pets/test/cat/0.png").read_bytes())
    return pets


def test_duplicates_warn(copied: Tree) -> None:
    task = load(copied)
    assert len(task.train) == 9
    assert len(task.warnings) == 1
    assert "copy.png = " in task.warnings[0]
    assert "test/cat/0.png" in task.warnings[0]


def test_duplicates_refuse(copied: Tree) -> None:
    with pytest.raises(DataError, match=r"train/cat/copy\.png = .*test/cat/0\.png; delete one"):
        load(copied, duplicates="refuse")


def test_duplicates_drop(copied: Tree) -> None:
    task = load(copied, duplicates="drop")
    assert "train/cat/copy.png" not in task.train.keys
    assert (len(task.train), len(task.test)) == (8, 4)
    assert "copy.png" in task.warnings[0]


def test_duplicates_after_decoding(pets: Tree) -> None:
    pets.write("pets/train/cat/a.png", encode(70, "PNG"))
    pets.write("pets/test/cat/b.bmp", encode(70, "BMP"))
    assert load(pets).warnings == []
    assert "a.png = " in load(pets, check="full").warnings[0]


def test_validation_copies_and_two_classes(pets: Tree) -> None:
    pets.classes("pets/val", "cat dog", 1)
    pets.write("pets/train/dog/again.png", (pets.root / "pets/val/cat/0.png").read_bytes())
    pets.write("pets/train/cat/again.png", (pets.root / "pets/val/cat/0.png").read_bytes())
    warnings = load(pets).warnings
    assert any("also in validation" in w for w in warnings)
    assert any("under two classes" in w and "dog/again.png" in w for w in warnings)


def test_other_files_are_ignored_aloud_and_hidden_ones_in_silence(pets: Tree) -> None:
    clean = load(pets)
    for name in (".DS_Store", "train/.hidden.png", "train/.git/x/y.png", "train/cat/._0.png", "train/cat/Thumbs.db"):
        pets.write(f"pets/{name}", b"x")
    assert load(pets).warnings == []
    pets.write("pets/train/cat/notes.txt", b"x")
    pets.write("pets/train/cat/phone.heic", b"x")
    pets.write("pets/train/loose.png")
    task = load(pets)
    assert task.fingerprint == clean.fingerprint
    assert any("outside the class folders" in w and "loose.png" in w for w in task.warnings)
    assert any("1 .heic, 1 .txt" in w and "notes.txt" in w and "convert .heic" in w for w in task.warnings)


def test_links(pets: Tree) -> None:
    pets.write("other disk/0.png", encode(80))
    pets.write("other disk/deep/1.PNG", encode(81))
    (pets.root / "pets/train/cow").symlink_to(pets.root / "other disk")
    assert load(pets).train.keys[4:6] == ["train/cow/0.png", "train/cow/deep/1.PNG"]
    (pets.root / "other disk/deep/up").symlink_to(pets.root / "other disk")
    with pytest.raises(DataError, match=r"deep/up: the link leads back"):
        load(pets)


def test_broken_link(pets: Tree) -> None:
    (pets.root / "pets/train/cat/lost.png").symlink_to("nowhere.png")
    with pytest.raises(PictureError, match=r"lost\.png: the link points to a file that does not exist"):
        load(pets)


def test_unicode_names_are_one_spelling(tree: Tree) -> None:
    composed, split = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    tree.write(f"a/train/{composed}/é.png", encode(1))
    tree.write("a/train/猫/1.png", encode(2))
    tree.write(f"b/train/{split}/{unicodedata.normalize('NFD', 'é')}.png", encode(1))
    tree.write("b/train/猫/1.png", encode(2))
    for root in "ab":
        shutil.copytree(tree.root / root / "train", tree.root / root / "test")
    first, second = load(tree, path="a"), load(tree, path="b")
    assert first.classes == [composed, "猫"]
    assert first.fingerprint == second.fingerprint
    tree.write(f"b/train/{composed}/é.png", encode(1))
    with pytest.raises(DataError, match="two Unicode spellings"):
        load(tree, path="b")


def test_underscores_and_names(tree: Tree) -> None:
    tree.classes("pets/train", "golden_retriever Cat n02", 2)
    tree.classes("pets/test", "golden_retriever Cat n02", 1)
    assert load(tree).classes == ["Cat", "golden retriever", "n02"]
    assert load(tree, classes={"n02": "hamster"}).classes == ["Cat", "golden retriever", "hamster"]
    ordered = load(tree, classes=["n02", "golden retriever", "Cat"])
    assert ordered.classes == ["n02", "golden retriever", "Cat"]
    assert ordered.train.labels == [2, 2, 1, 1, 0, 0]
    with pytest.raises(DataError, match=r"renames 'n03', .*did you mean 'n02'"):
        load(tree, classes={"n03": "hamster"})
    with pytest.raises(DataError, match=r"names 'n03', which has no picture.*did you mean 'n02'"):
        load(tree, classes=["n03", "golden retriever", "Cat"])
    with pytest.raises(DataError, match=r"Cat/0\.png: label 'Cat' is not in `classes`"):
        load(tree, classes=["n02", "golden_retriever"])
    with pytest.raises(DataError, match="'Cat' and 'n02' would both be called 'Cat'"):
        load(tree, classes={"n02": "Cat"})


def test_caps(tree: Tree) -> None:
    tree.classes("pets/train", "cat dog", 6)
    tree.classes("pets/test", "cat dog", 4)
    task = load(tree, max_train_per_class=3, max_test_per_class=2)
    assert task.train.labels == [0, 0, 0, 1, 1, 1]
    assert task.test.labels == [0, 0, 1, 1]
    assert load(tree, max_train_per_class=3, split_seed=4).train.keys != task.train.keys


def test_probe(pets: Tree) -> None:
    probe = load(pets, probe=True)
    assert (len(probe.train), len(probe.test), probe.classes) == (0, 4, ["cat", "dog"])
    flat = load(pets, path="pets/train", probe=True)
    assert len(flat.test) == 8
    assert flat.warnings == []
    some = load(pets, path="pets/train", test=0.5, probe=True)
    assert (len(some.train), len(some.test)) == (0, 4)
    alone = load(pets, path=None, test="pets/test", probe=True)
    assert alone.fingerprint == probe.fingerprint
    with pytest.raises(ConfigError, match="no training pictures named"):
        load(pets, path=None, test="pets/test")


def test_a_picture_that_changes_later_is_named(pets: Tree) -> None:
    task = load(pets)
    (pets.root / "pets/train/cat/0.png").unlink()
    with pytest.raises(PictureError, match=r"cat/0\.png: does not exist"):
        task.train.picture(0)
