"""Every kind of inputs, in a short and in the full form, and the counts that `make torture` prints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keeplora.study.plan import StudyPlan
from keeplora.study.store import StudyStore
from tests.cli.tiny_world import World
from tests.torture.fuzz_folders import LedgerInputs, RunFileInputs
from tests.torture.fuzz_harness import Maker, Tally
from tests.torture.fuzz_models import ModelInputs
from tests.torture.fuzz_tables import TableInputs
from tests.torture.fuzz_yaml import YamlInputs

TALLIES: list[Tally] = []
"""What was tried in this session, in its order."""


@dataclass(frozen=True)
class Kind:
    """How many inputs of a kind there are, and every how many-th is a process of its own, in the two forms."""

    name: str
    short: int
    full: int
    apart: int


KINDS = {
    "configurations": Kind("configurations", 58, 1_100, 150),
    "ledgers": Kind("ledgers", 18, 300, 75),
    "run directories": Kind("run directories", 16, 250, 60),
    "data": Kind("data", 34, 400, 80),
    "model folders": Kind("model folders", 14, 150, 50),
}  # fmt: skip


def makers(kind: str, world: World, folder: Path) -> Mapping[str, Maker]:
    """The mutators of a kind."""
    if kind == "configurations":
        return YamlInputs(world).makers()
    if kind == "data":
        return TableInputs(world).makers()
    if kind == "model folders":
        return ModelInputs(world).makers()
    if kind == "ledgers":
        return LedgerInputs(world).makers()
    run, _ = world.run(method="keeplora++")
    return RunFileInputs(world, run, study=make_study(world, folder)).makers()


def make_study(world: World, folder: Path) -> Path:
    """A finished study of two methods, made of the world's runs."""
    path = folder / "study"
    config = world.yaml(folder / "study.yaml")
    plan = StudyPlan("fuzzed", "experiment", str(config), ("keeplora++", "zero-shot"), (0,), {"listed": None}, path)
    store = StudyStore(path)
    store.join(plan)
    for key, record in store.cells.items():
        run, _ = world.run(method=key.method)
        target = store.folder(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run, target, ignore=shutil.ignore_patterns(".lock", "ledger"))
        record.state = "finished"
    store.save()
    return path
