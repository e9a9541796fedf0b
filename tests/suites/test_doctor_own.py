"""The doctor on a person's own folders: sizes, damage, limits, classes, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.suites.examined import cache, look_over, text  # noqa: F401 (cache is a fixture)


@pytest.fixture
def pets_spec(tmp_path: Path) -> dict[str, Any]:
    """A task of a person's own, as class folders."""
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for i in range(count):
                value = np.random.default_rng([len(split), len(label) + ord(label[0]), i]).integers(0, 256, (9, 7, 3))
                Image.fromarray(value.astype(np.uint8)).save(tmp_path / "pets" / split / label / f"{i}.png")
    return {"name": "pets", "source": "folder", "path": "pets"}


def test_damage_in_the_middle_is_found_by_the_full_check_alone(tmp_path, pets_spec):
    file = tmp_path / "pets/train/cat/0.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    assert look_over(pets_spec, tmp_path).ok
    assert f"{file}: damaged or cut short" in text(look_over(pets_spec, tmp_path, full=True))


def test_a_class_without_pictures_is_a_problem(tmp_path, pets_spec):
    (tmp_path / "pets/train/emu").mkdir()
    assert "the class folder 'emu' of train holds no picture" in text(look_over(pets_spec, tmp_path))


def test_sources_of_ones_own(tmp_path, pets_spec):
    check = look_over(pets_spec, tmp_path)
    assert (check.ok, check.classes, check.pictures) == (True, 2, {"train": 8, "test": 4})
    assert check.smallest is not None
    assert check.smallest[:2] == (7, 9)
    assert look_over({**pets_spec, "expect": {"classes": 2, "test": 5}}, tmp_path).problems == [
        "2 classes, 4 test found, where 2, 5 are expected"
    ]
    flat = {**pets_spec, "path": "pets/train", "test": 0.25}  # cut when it is loaded: only the sum is known
    assert look_over({**flat, "expect": {"train": 6, "test": 2}}, tmp_path).ok
    assert look_over({**flat, "expect": {"train": 6, "test": 3}}, tmp_path).problems == [
        "8 train and test found, where 9 are expected"
    ]
    assert look_over({**pets_spec, "split_classes": {"tasks": 2}}, tmp_path).ok  # the whole dataset is looked at
    assert "did you mean 'classes'" in text(look_over({**pets_spec, "clases": []}, tmp_path))
    probe = look_over(pets_spec, tmp_path, probe=True)
    assert (probe.ok, probe.classes) == (True, 2)


def test_the_smallest_and_the_largest_picture_are_named(tmp_path, pets_spec):
    small, large = tmp_path / "pets/train/dog/2.png", tmp_path / "pets/test/cat/1.png"
    Image.new("RGB", (30, 2)).save(small)  # wider than all others, and yet of the fewest pixels
    Image.new("RGB", (8, 9)).save(large)
    check = look_over(pets_spec, tmp_path)
    assert (check.smallest, check.largest) == ((30, 2, str(small)), (8, 9, str(large)))


def test_pictures_that_are_to_be_skipped_are_a_note(tmp_path, pets_spec):
    (tmp_path / "pets/train/cat/0.png").write_bytes(b"x")
    assert not look_over(pets_spec, tmp_path).ok
    check = look_over({**pets_spec, "on_error": "skip", "max_skipped": 0.9}, tmp_path)
    assert check.ok
    (note,) = [note for note in check.notes if "0.png: not a picture" in note]
    assert note.endswith("; it will be left out")
    assert check.pictures["train"] == look_over(pets_spec, tmp_path).pictures["train"] - 1


def test_a_picture_that_loading_would_refuse_by_its_size_is_told(tmp_path, pets_spec):
    assert "more than max_pixels (50)" in text(look_over({**pets_spec, "max_pixels": 50}, tmp_path))
    Image.new("RGB", (300, 1)).save(tmp_path / "pets/train/cat/0.png")
    assert "a strip longer than 100 times its width" in text(look_over(pets_spec, tmp_path))
