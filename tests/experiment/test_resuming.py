"""Runs that die inside a task and go on from its checkpoint: the bits of a run that was never disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment import Experiment
from keeplora.experiment.checkpoint import seal
from keeplora.files import sha256_file
from tests.cli.test_resume import assert_as_undisturbed
from tests.cli.tiny_world import ledger_tensors, results_of, same_tensors
from tests.experiment.deaths import counted_steps, dies

# Steps a task: paint has 30 pictures, stripes and dots 20; batches of 8; two epochs.
PAINT, STRIPES = 8, 6
EVERY = {"checkpoint_steps": 2}
VALIDATED = {"validation": 0.2, "best_epoch": True, "early_stopping": {"patience": 2}}


def checkpoint(path: Path) -> Path:
    (found,) = (path / "checkpoint").iterdir()
    return found


def steps_in(path: Path) -> int:
    return json.loads((checkpoint(path) / "state.json").read_text())["steps"]


def resumed(path: Path, monkeypatch) -> list[tuple[str, int, int]]:
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    return taken


CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("keeplora++", {}, PAINT + 3, "kill"),  # inside an epoch; the checkpoint is one step older
    ("keeplora++-cls", {}, PAINT + 5, "kill"),
    ("lora", {}, PAINT + 4, "term"),
    ("keeplora++", VALIDATED, 5, "kill"),
    ("lora", VALIDATED, PAINT + 5, "int"),
    ("gpm-lora", {}, PAINT + 3, "kill"),
    ("o-lora", {}, PAINT + 5, "term"),
    ("replay", {}, PAINT + 5, "kill"),
    ("ewc", {}, PAINT + 5, "kill"),
    ("lwf", {}, PAINT + 3, "term"),
    ("zscl", {"tuner": {"options": {"average_every": 2, "l2": 0.1}}}, PAINT + 5, "kill"),
    ("inflora", {}, PAINT + 3, "kill"),
    ("sd-lora", {}, PAINT + 3, "term"),
    ("nusa-cl", {}, PAINT + 3, "kill"),
    ("moelora", {}, PAINT + 5, "kill"),
    ("joint", {}, 13, "kill"),
    ("full-ft-all", {"training": {"schedule": "cosine", "warmup": 0.2}}, PAINT + 3, "kill"),
]


def settings(world, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    changes = {**changes, "method": method, "training": {**EVERY, **changes.get("training", {})}}
    if method == "zscl":
        changes["reference"] = {"name": "beside", "source": "folder", "path": "grey/train", "classes": ["light", "dark"]}
    return changes


@pytest.mark.parametrize(("method", "changes", "at", "how"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in CASES])
def test_every_method_goes_on_inside_a_task_and_ends_with_the_same_bits(
    world, tmp_path, monkeypatch, method, changes, at, how
):
    changes = settings(world, method, changes)
    straight, _ = world.run(**changes)
    path = tmp_path / "run"
    dies(world.config(**changes), path, at, how)
    kept = steps_in(path)
    assert kept > 0
    taken = resumed(path, monkeypatch)
    before = at if how != "kill" else at - 1  # the step that a kill hit is not kept; one that heard a signal is
    assert (len(taken) + kept) % 2 == 0 or how != "kill"
    task_start = PAINT if method != "joint" and at > PAINT else 0
    assert kept == (before - task_start if how != "kill" else (before - task_start) // 2 * 2)
    assert_as_undisturbed(path, straight)
    assert not (path / "checkpoint").exists()
