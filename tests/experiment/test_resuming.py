"""Runs that die inside a task and go on from its checkpoint: the bits of a run that was never disturbed."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora.errors import ConfigError
from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment.checkpoint import seal
from keeplora.files import sha256_file
from tests.cli.tiny_world import ledger_tensors, results_of, same_tensors, status_of
from tests.cli.test_resume import events_without_times
from tests.experiment.deaths import counted_steps, dies

PAINT, STRIPES = 8, 6
"""Steps of the two tasks: 30 and 20 pictures, batches of 8, two epochs."""
VALIDATED = {"validation": 0.2, "best_epoch": True, "early_stopping": {"patience": 2}, "training": {"epochs": 3}}
"""Three and two steps an epoch."""


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    monkeypatch.setattr(runner_module, "render_report", lambda path: None)


def settings(method: str, **changes: Any) -> dict[str, Any]:
    training = {"checkpoint_steps": 2, "checkpoint_minutes": None, **changes.pop("training", {})}
    changes = {"first_tasks": 2, "probes": [], **changes, "method": method, "training": training}
    if method == "zscl":
        changes["reference"] = {
            "name": "beside", "source": "folder", "path": "grey/train", "classes": ["light", "dark"]
        }  # fmt: skip
    return changes


def checkpoint(path: Path) -> Path:
    (found,) = (path / "checkpoint").iterdir()
    return found


def state_of(path: Path) -> dict[str, Any]:
    return json.loads((checkpoint(path) / "state.json").read_text())


def assert_same(path: Path, straight: Path) -> None:
    """Accuracies, losses, events and every tensor of the ledger, bit for bit; and no checkpoint is left."""
    one, other = results_of(path), results_of(straight)
    for key in ("accuracy", "metrics", "layers", "audit", "warnings"):
        assert one[key] == other[key], key
    assert events_without_times(path) == events_without_times(straight)
    assert same_tensors(ledger_tensors(path), ledger_tensors(straight))
    assert status_of(path)["state"] == "finished"
    assert not (path / "checkpoint").exists()


CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("keeplora++", {}, PAINT + 3, "kill"),  # at the end of the first epoch
    ("keeplora++-cls", {}, PAINT + 5, "kill"),
    ("keeplora++-cls", VALIDATED, 8, "term"),
    ("lora", VALIDATED, 9 + 5, "int"),
    ("gpm-lora", {}, PAINT + 4, "kill"),
    ("o-lora", {}, PAINT + 5, "term"),
    ("replay", {}, PAINT + 5, "kill"),
    ("ewc", {}, PAINT + 5, "kill"),
    ("zscl", {"tuner": {"options": {"average_every": 2, "l2": 0.1}}}, PAINT + 5, "kill"),
    ("inflora", {}, PAINT + 3, "term"),
    ("sd-lora", {}, PAINT + 3, "term"),
    ("nusa-cl", {}, PAINT + 4, "kill"),
    ("moelora", {}, PAINT + 5, "term"),
    ("joint", {}, 11, "kill"),
    ("full-ft-all", {"training": {"schedule": "cosine", "warmup": 0.2}}, PAINT + 3, "kill"),
]


@pytest.mark.parametrize(("method", "changes", "at", "how"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in CASES])
def test_every_method_goes_on_inside_a_task_and_ends_with_the_same_bits(
    world, tmp_path, monkeypatch, method, changes, at, how
):
    changes = settings(method, **changes)
    straight, _ = world.run(**changes)
    path = tmp_path / "run"
    dies(world.config(**changes), path, at, how)
    state = state_of(path)
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    assert_same(path, straight)
