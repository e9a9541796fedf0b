"""study.json: what it keeps, which plans may join a folder, what a crash leaves, and who may write."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeplora.errors import KeepLoraError
from keeplora.study.plan import CellKey, StudyPlan
from keeplora.study.store import StudyStore, is_being_written
from tests.study.fake_study import change, fake_cell


def plan(folder: Path, **changes) -> StudyPlan:
    values = {
        "name": "s", "kind": "suite", "base": "demo-small", "methods": ("lora", "ewc"), "seeds": (0, 1), "orders": {"1": "1"},
        "output": folder, "set": {"training.epochs": 1},
    }  # fmt: skip
    return StudyPlan(**{**values, **changes})


def stored(folder: Path, **changes) -> StudyStore:
    store = StudyStore(folder).load()
    store.join(plan(folder, **changes))
    store.save()
    return store


def test_format_and_round_trip(tmp_path: Path) -> None:
    store = stored(tmp_path / "s")
    store.cells["ewc", "1", 0].error = "it broke"
    store.cells["ewc", "1", 0].state = "failed"
    store.threads = 2
    store.save()
    value = json.loads((tmp_path / "s" / "study.json").read_text())
    assert (value["format"], value["version"], value["threads"]) == ("keeplora-study", 0, 2)
    assert [(c["method"], c["order"], c["seed"]) for c in value["cells"]] == [
        ("lora", "1", 0), ("ewc", "1", 0), ("lora", "1", 1), ("ewc", "1", 1)
    ]  # fmt: skip
    assert value["cells"][1]["folder"] == "cells/ewc/order-1/seed-0"
    again = StudyStore(tmp_path / "s").load()
    assert again.cells == store.cells
    assert again.as_plan() == plan(tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["study.json"]  # nothing half-written beside it


def test_more_methods_seeds_and_orders_extend_it(tmp_path: Path) -> None:
    stored(tmp_path)
    store = stored(tmp_path, methods=("l2",), seeds=(0, 5), orders={"2": "2"})
    assert store.plan["methods"] == ["lora", "ewc", "l2"]
    assert store.plan["seeds"] == [0, 1, 5]
    assert list(store.plan["orders"]) == ["1", "2"]
    assert len(store.cells) == 6  # what was asked for, not the whole product
    assert [key.seed for key in store.cells] == [0, 0, 0, 1, 1, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": "demo"}, "suite demo-small (asked for now: suite demo)"),
        ({"set": {}}, "training.epochs = 1 (asked for now: training.epochs not set)"),
        ({"set": {"training.epochs": 1, "tuner.r": 4}}, "tuner.r not set (asked for now: tuner.r = 4)"),
        ({"orders": {"1": ["b", "a"]}}, "order 1 = 1 (asked for now: ['b', 'a'])"),
        (
            {"per_method": {"ewc": {"training": {"epochs": 2}}}},
            "ewc's own settings none (asked for now: {'training': {'epochs': 2}})",
        ),
        ({"threads": 3}, "threads = 2 (asked for now: 3)"),
    ],
)
def test_a_contradicting_plan_is_refused_and_changes_nothing(tmp_path: Path, changes: dict, told: str) -> None:
    store = stored(tmp_path)
    store.threads = 2
    store.save()
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(KeepLoraError) as caught:
        stored(tmp_path, **changes)
    assert f"holds a study with {told}; its runs cannot stand beside such ones" in str(caught.value)
    assert (tmp_path / "study.json").read_bytes() == before


def test_settings_of_the_method_that_a_variant_is_one_of_are_its_own(tmp_path: Path) -> None:
    """And of a method that joins beside its variant, which goes by them already."""
    variants = {"short": {"method": "ewc", "training": {"epochs": 1}}}
    own = {"ewc": {"tuner": {"r": 4}}}
    stored(tmp_path, methods=("short",), variants=variants, per_method=own)
    for methods in (("short",), ("ewc",)):
        with pytest.raises(
            KeepLoraError, match=r"ewc's own settings {'tuner': {'r': 4}} .asked for now: {'tuner': {'r': 8}}."
        ):
            stored(tmp_path, methods=methods, variants=variants, per_method={"ewc": {"tuner": {"r": 8}}})


def test_new_method_may_bring_its_own_settings(tmp_path: Path) -> None:
    stored(tmp_path)
    own = {"l2": {"training": {"epochs": 2}}}
    assert stored(tmp_path, methods=("l2",), per_method=own).plan["per_method"] == own


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "chapter.tex").write_text("x")
    with pytest.raises(KeepLoraError, match=r"is not empty \(chapter\.tex\) and no study"):
        stored(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is damaged"),
        ('{"format": "other"}', "its format is not 'keeplora-study'"),
        ('{"format": "keeplora-study", "version": 1}', "version 1, this keeplora knows 0"),
    ],
)
def test_damaged_and_later_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(KeepLoraError, match=told):
        StudyStore(tmp_path).load()


def test_folders_know_better_than_the_file(tmp_path: Path) -> None:
    store = stored(tmp_path, seeds=(0, 1, 2))
    for key, record in store.cells.items():
        record.state = "running"  # the study was killed
        if key.seed < 2:
            run = fake_cell(tmp_path / "made", key.method, seed=key.seed)
            store.folder(key).parent.mkdir(parents=True, exist_ok=True)
            run.rename(store.folder(key))
    change(store.folder(CellKey("ewc", "1", 0)), "status.json", {"state": "running"})
    change(store.folder(CellKey("lora", "1", 1)), "status.json", {"state": "failed", "error": "it broke"})
    change(store.folder(CellKey("ewc", "1", 1)), "status.json", {"state": "interrupted"})
    store.refresh()
    assert [(r.state, r.error) for r in store.cells.values()] == [
        ("finished", None), ("interrupted", None), ("failed", "it broke"), ("interrupted", None), ("pending", None),
        ("pending", None),
    ]  # fmt: skip
    assert store.cells["lora", "1", 0].seconds == 232.0
    # A failure that left no trace in its folder is kept until the cell is tried again.
    store.cells["lora", "1", 2].state = "failed"
    store.refresh()
    assert store.cells["lora", "1", 2].state == "failed"


def test_living_run_is_seen_and_the_study_has_one_writer(tmp_path: Path) -> None:
    run = fake_cell(tmp_path, "lora")
    assert not is_being_written(run)
    (run / ".lock").write_text("12345\n")  # what a killed process leaves
    assert not is_being_written(run)
    code = (
        "import sys, time; from keeplora.experiment.run_directory import FolderLock; from pathlib import Path\n"
        "locks = [FolderLock(Path(p)) for p in sys.argv[1:]]\n"
        "for lock in locks: lock.acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, run, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_being_written(run)
        with pytest.raises(KeepLoraError, match="a study is run by one process at a time"):
            StudyStore(tmp_path).lock()
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(50):
        if not is_being_written(run):
            break
        time.sleep(0.1)
    assert not is_being_written(run)
    store = StudyStore(tmp_path)
    store.lock()
    store.close()
