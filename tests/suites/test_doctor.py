"""The doctor on miniature benchmark trees: sound ones pass, and whatever is broken is told, each by its name."""

from __future__ import annotations

import copy
import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keeplora.data import SOURCES, digests, load_task
from keeplora.data.benchmarks import dtd, flowers102, mnist
from keeplora.data.doctor import look, summary
from keeplora.data.doctor.layouts import LAYOUTS, needed
from keeplora.data.spec import parse_spec
from keeplora.errors import DataError
from keeplora.suites import load_suite
from tests.data.benchmarks.mini import MAKERS, make_mini
from tests.suites.examined import cache, look_over, text  # noqa: F401 (cache is a fixture)

KEYS = {name: source.keys for name, source in SOURCES.items()}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trees")
    return {
        "mtil": make_mini(root / "mtil", [source for source in MAKERS if source != "coop"]),
        "x-tail": make_mini(root / "x-tail", ["coop"]),
    }


@pytest.fixture(scope="module")
def specs(trees: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The packaged tasks, expecting the counts that the loaders find in the miniature trees."""
    fitted: dict[str, list[dict[str, Any]]] = {}
    for name, root in trees.items():
        fitted[name] = copy.deepcopy(load_suite(name)["tasks"])
        for spec in fitted[name]:
            task = load_task(spec, root)
            spec["expect"] = {"classes": len(task.classes), "train": len(task.train), "test": len(task.test)}
    return fitted


def spec_of(specs: dict[str, list[dict[str, Any]]], task: str, suite: str = "mtil") -> dict[str, Any]:
    return next(spec for spec in specs[suite] if spec["name"] == task)


@pytest.fixture
def copied(trees: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the MTIL tree."""
    return Path(shutil.copytree(trees["mtil"], tmp_path / "mtil"))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("suite", ["mtil", "x-tail"])
def test_sound_trees_pass(trees, specs, suite, full):
    for spec in specs[suite]:
        check = look_over(spec, trees[suite], full=full)
        assert check.ok, check
        assert (check.missing, check.fetch) == ([], "")
        assert {"classes": check.classes, **check.pictures} == spec["expect"]
        assert Path(check.folder) == trees[suite] / spec["path"]
        assert check.found
        task = load_task(spec, trees[suite])
        encoded = [e.source.read() for s in (task.train, task.test) for e in s.entries]
        assert check.bytes == sum(map(len, encoded))
        areas = [image.width * image.height for s in (task.train, task.test) for image in map(s.picture, range(len(s)))]
        assert check.smallest is not None
        assert check.largest is not None
        assert check.smallest[0] * check.smallest[1] == min(areas)
        assert check.largest[0] * check.largest[1] == max(areas)


@pytest.mark.parametrize("suite", ["mtil", "x-tail"])
def test_published_counts_are_missed_by_miniature_trees(trees, suite):
    for spec in load_suite(suite)["tasks"]:
        check = look_over(spec, trees[suite])
        (problem,) = check.problems
        assert problem.endswith(f"where {', '.join(f'{n:,}' for n in spec['expect'].values())} are expected")
        assert not check.fetch  # the data is there; it is other data


def test_every_benchmark_source_has_a_layout():
    sources = {spec["source"] for name in ("mtil", "x-tail") for spec in load_suite(name)["tasks"]}
    assert sources - {"coop"} == set(LAYOUTS)
    assert sources <= set(SOURCES)


def layout_cases() -> list[tuple[str, str, str]]:
    return [
        (suite, spec["name"], name)
        for suite in ("mtil", "x-tail")
        for spec in load_suite(suite)["tasks"]
        for name in needed(parse_spec(spec, KEYS))
        if not name.endswith("./")  # Stanford Cars as CoOp has it: the dataset's own folder
    ]


@pytest.mark.parametrize(("suite", "task", "name"), layout_cases())
def test_what_a_layout_names_is_told_as_missing_and_its_loader_needs_it(trees, specs, tmp_path, suite, task, name):
    spec = spec_of(specs, task, suite)
    shutil.copytree(trees[suite] / spec["path"], tmp_path / spec["path"])
    for choice in name.split("|"):
        path = tmp_path / spec["path"] / choice
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with pytest.raises(DataError):
        load_task(spec, tmp_path)
    check = look_over(spec, tmp_path)
    assert check.missing == [name.replace("|", " or ")]
    assert check.problems == [f"{tmp_path / spec['path']}: lacks {name.replace('|', ' or ')}"]
    assert check.fetch == "from the cellar"


@pytest.mark.parametrize("task", [spec["name"] for spec in load_suite("mtil")["tasks"]])
def test_every_list_that_a_loader_needs_is_in_its_layout(specs, copied, task):
    spec = spec_of(specs, task)
    lists = [p for p in sorted((copied / spec["path"]).rglob("*")) if p.is_file() and p.suffix != ".jpg"]
    for file in lists:
        away = file.rename(copied / "away")
        try:
            load_task(spec, copied)
        except DataError:
            name = file.relative_to(copied / spec["path"]).as_posix()
            missing = [part for entry in look_over(spec, copied).missing for part in entry.split(" or ")]
            assert name in missing, name
        away.rename(file)


def test_everything_that_is_missing_is_told_at_once(specs, copied):
    shutil.rmtree(copied / "flowers-102/jpg")
    (copied / "flowers-102/setid.mat").unlink()
    check = look_over(spec_of(specs, "Flowers"), copied)
    assert (check.found, check.missing) == (["imagelabels.mat"], ["jpg/", "setid.mat"])


def test_a_folder_that_is_not_there(specs, tmp_path):
    check = look_over(spec_of(specs, "Aircraft"), tmp_path)
    assert check.problems == [f"{tmp_path}/fgvc-aircraft-2013b: no such folder"]
    assert (check.missing, check.fetch) == (["fgvc-aircraft-2013b/"], "from the cellar")
    (tmp_path / "fgvc_aircraft_2013b").mkdir()
    assert "is it 'fgvc_aircraft_2013b' beside it?" in text(look_over(spec_of(specs, "Aircraft"), tmp_path))


def test_an_archive_unpacked_one_folder_too_deep(specs, copied):
    (copied / "flowers-102").rename(copied / "oxford")
    (copied / "flowers-102").mkdir()
    (copied / "oxford").rename(copied / "flowers-102/oxford")
    check = look_over(spec_of(specs, "Flowers"), copied)
    assert len(check.missing) == 3
    assert all("(it lies in oxford/: move what oxford/ holds one folder up)" in problem for problem in check.problems)


@pytest.mark.parametrize(
    ("task", "path"),
    [("Aircraft", "fgvc-aircraft-2013b/data"), ("EuroSAT", "eurosat/2750"), ("DTD", "dtd/dtd")],
)
def test_a_path_may_name_the_inner_folder_as_for_the_loaders(trees, specs, task, path):
    check = look_over({**spec_of(specs, task), "path": path}, trees["mtil"])
    assert check.ok, check


def test_other_ways_to_keep_a_file_are_no_problem(specs, copied):
    raw = copied / "MNIST/raw/train-images-idx3-ubyte"
    raw.with_name(f"{raw.name}.gz").write_bytes(gzip.compress(raw.read_bytes()))
    raw.unlink()
    cars = copied / "stanford_cars"
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit/cars_test_annos_withlabels.mat")
    for task in ("MNIST", "StanfordCars"):
        assert look_over(spec_of(specs, task), copied).ok


def pictures(root: Path) -> list[Path]:
    return sorted(root.rglob("*.jpg"))


def test_unusable_pictures_are_named_with_what_is_wrong(specs, copied):
    files = pictures(copied / "flowers-102/jpg")
    files[0].write_bytes(files[0].read_bytes()[:-40])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"<html>404 not found</html>")
    files[3].unlink()
    files[4].unlink()
    files[4].symlink_to("nowhere.jpg")
    raw = flowers102.read(parse_spec(spec_of(specs, "Flowers"), KEYS), copied, False)
    used = {entry.where for entries in raw.splits.values() for entry in entries}
    check = look_over(spec_of(specs, "Flowers"), copied)
    wanted = {
        files[0]: "damaged or cut short", files[1]: "the file is empty", files[2]: "not a picture that can be read",
        files[3]: "does not exist", files[4]: "the link points to a file that does not exist",
    }  # fmt: skip
    told = {str(path): words for path, words in wanted.items() if str(path) in used}
    assert len(told) >= 3
    assert len(check.problems) == len(told)
    for path, words in told.items():
        assert any(problem.startswith(f"{path}: ") and words in problem for problem in check.problems), path
    assert not check.fetch


def test_many_unusable_pictures_are_counted(specs, copied):
    for file in pictures(copied / "food-101/images"):
        file.write_bytes(b"gone")
    check = look_over(spec_of(specs, "Food"), copied)
    expect = spec_of(specs, "Food")["expect"]
    assert len(check.problems) == 12  # five and a count, for train and for test
    assert f"{expect['train'] - 5} more pictures of train cannot be used, like the 5 above" in check.problems


def test_the_same_picture_in_train_and_test(specs, copied):
    task = load_task(spec_of(specs, "Aircraft"), copied)
    train, test = (Path(s.where(0)) for s in (task.train, task.test))
    train.write_bytes(test.read_bytes())
    check = look_over(spec_of(specs, "Aircraft"), copied)
    assert check.ok  # the published datasets have some: a note, which stops nothing
    (note,) = check.notes
    assert note.startswith(f"1 picture(s) of train are also in test, which flatters the result: {train} = {test}")
    refused = look_over({**spec_of(specs, "Aircraft"), "duplicates": "refuse"}, copied)
    assert refused.problems == [note]


def test_pictures_of_one_size_with_equal_ends_are_compared_in_full(specs, copied, monkeypatch):
    task = load_task(spec_of(specs, "Aircraft"), copied)
    train, test = (Path(s.where(0)) for s in (task.train, task.test))
    whole = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    Image.fromarray(whole).save(test, quality=90)
    data = bytearray(test.read_bytes())
    data[len(data) // 2] ^= 1
    train.write_bytes(bytes(data))
    read: list[str] = []
    original = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: read.append(path) or original(path))
    assert look_over(spec_of(specs, "Aircraft"), copied).notes == []
    assert sorted(read) == sorted([str(train), str(test)])  # these two, and no other picture


def test_the_full_check_finds_the_same_picture_in_another_encoding(specs, copied):
    task = load_task(spec_of(specs, "Aircraft"), copied)
    train, test = (Path(s.where(0)) for s in (task.train, task.test))
    Image.open(test).save(train, "PNG")  # named .jpg, which no decoder minds
    spec = spec_of(specs, "Aircraft")
    assert look_over(spec, copied).notes == []
    (note,) = look_over(spec, copied, full=True).notes
    assert f"{train} = {test}" in note


def test_the_same_row_in_two_batches(specs, copied, monkeypatch):
    original = mnist.read

    def read(*args: Any) -> Any:
        raw = original(*args)
        raw.splits["train"][3] = replace(raw.splits["train"][3], source=raw.splits["test"][0].source)
        return raw

    monkeypatch.setattr(mnist, "read", read)
    (note,) = look_over(spec_of(specs, "MNIST"), copied).notes
    assert note.startswith("1 picture(s) of train are also in test")


def test_wrong_classes_are_told(specs, copied):
    shutil.rmtree(copied / "eurosat/2750/SeaLake")
    check = look_over(spec_of(specs, "EuroSAT"), copied)
    assert "2 classes, " in text(check)
    assert "3, " in text(check)
    spec = {**spec_of(specs, "DTD"), "classes": ["banded", "dotted", "polka-dotted", "zigzaged"]}
    assert "`classes` names 'zigzaged', which has no picture" in text(look_over(spec, copied))


def test_one_broken_dataset_never_hides_the_others(trees, specs, copied, monkeypatch):
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(dtd, "read", broken)
    (copied / "cifar-100-python/train").write_bytes(b"\x80\x04cos\nsystem\n(S'echo'\ntR.")
    (copied / "oxford-iiit-pet/annotations/test.txt").write_bytes(b"\xff\xfe\x00")
    shutil.rmtree(copied / "SUN397")
    checks = [look_over(spec, copied) for spec in specs["mtil"]]
    bad = {check.name: text(check) for check in checks if not check.ok}
    assert set(bad) == {"DTD", "CIFAR100", "OxfordPet", "SUN397"}
    assert "its loader failed, which is a fault of keeplora (ZeroDivisionError: boom)" in bad["DTD"]
    assert summary(checks) == "7 of 11 datasets are ready; not ready: CIFAR100, DTD, OxfordPet, SUN397."
    assert summary([check for check in checks if check.ok]) == "All 7 datasets are there and sound."


def test_a_second_look_opens_no_file(specs, copied, monkeypatch):
    opened: list[str] = []
    original = look._ends
    monkeypatch.setattr(look, "_ends", lambda path: opened.append(path) or original(path))
    spec = spec_of(specs, "OxfordPet")
    first = look_over(spec, copied)
    assert len(opened) == spec["expect"]["train"] + spec["expect"]["test"]
    opened.clear()
    assert look_over(spec, copied) == first
    assert opened == []
    file = pictures(copied / "oxford-iiit-pet/images")[0]
    file.write_bytes(file.read_bytes()[:-30])
    for times in (1, 0):  # damage is remembered too
        check = look_over(spec, copied)
        assert text(check).startswith(f"{file}: the header is damaged")
        assert len(opened) == times
        opened.clear()
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    look_over(spec, copied)
    assert len(opened) == spec["expect"]["train"] + spec["expect"]["test"]


def test_progress_ends_at_the_number_of_pictures(trees, specs):
    told: list[tuple[str, int, int]] = []
    spec = spec_of(specs, "Food")
    look_over(spec, trees["mtil"], progress=lambda *now: told.append(now))
    total = spec["expect"]["train"] + spec["expect"]["test"]
    assert told[0] == ("Food", 0, 0)
    assert told[-1] == ("Food", total, total)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_among_the_pictures_is_not_waited_for(specs, copied):
    file = pictures(copied / "oxford-iiit-pet/images")[0]
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: is not an ordinary file" in text(look_over(spec_of(specs, "OxfordPet"), copied))
