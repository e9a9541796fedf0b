"""Runs of a generative model that die inside a task, and a memory that does not hold their batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment.kinds import generation as generation_module
from keeplora.models.generative import Generative
from tests.cli.tiny_world import ledger_tensors
from tests.experiment.deaths import counted_steps, dies
from tests.experiment.generation_world import make_world
from tests.experiment.test_resuming import assert_same, state_of

STEPS = 6
"""Of each task: 12 questions, batches of 4, two epochs."""


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    monkeypatch.setattr(runner_module, "render_report", lambda path: None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    world = make_world(tmp_path_factory.mktemp("world"))
    world["probes"] = []
    world["training"] |= {"checkpoint_steps": 2, "checkpoint_minutes": None}
    return world


def config(small: dict[str, Any], method: str, **training: Any) -> dict[str, Any]:
    method, _, sketched = method.partition(" ")
    found: dict[str, Any] = copy.deepcopy(small) | {"method": method}
    if sketched:
        found["tuner"] |= {"residual_gradient": "sketch", "sketch_oversampling": 2}
    found["training"] |= training
    return found


def run(values: dict[str, Any], path: Path) -> Path:
    Experiment({**values, "output": str(path)}, quiet=True).run()
    return path


@pytest.mark.parametrize(
    ("method", "training", "at", "how"),
    [
        ("keeplora++", {"micro_batch": 2}, STEPS + 3, "kill"),
        ("keeplora++ sketched", {"micro_batch": 2}, STEPS + 5, "term"),
        ("replay", {"workers": 1, "group_by_length": False}, STEPS + 5, "term"),
    ],
)
def test_a_run_that_dies_inside_a_task_ends_with_the_same_bits(small, tmp_path, monkeypatch, method, training, at, how):
    values = config(small, method, **training)
    straight = run(values, tmp_path / "straight")
    path = tmp_path / "run"
    dies(values, path, at, how)
    kept = state_of(path)["steps"]
    assert kept == {"kill": 2, "term": 5}[how]
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    assert [name for name, _, _ in taken] == ["answers"] * (STEPS - kept)
    assert_same(path, straight)


def test_a_full_memory_cuts_training_statistics_and_answers_and_changes_no_number(small, tmp_path, monkeypatch):
    values = config(small, "keeplora++")
    values["first_tasks"] = 1
    whole = Experiment({**values, "output": str(tmp_path / "whole")}, quiet=True).run()
    losses, generate = generation_module.GenerationObjective.token_losses, Generative.generate

    def full(batch) -> None:
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(
        generation_module.GenerationObjective, "token_losses",
        lambda self, batch, model=None: full(batch) or losses(self, batch, model),
    )  # fmt: skip
    monkeypatch.setattr(
        Generative, "generate", lambda self, batch, **more: full(batch) or generate(self, batch, **more)
    )
    small_run = Experiment({**values, "output": str(tmp_path / "small")}, quiet=True).run()
    told = " | ".join(small_run["warnings"])
    assert told.count("the gradient pass did not fit the memory") == 1
    assert told.count("the memory did not hold 4 samples at once; from here on") == 1
    assert "evaluation of 'colours': the memory did not hold 4 samples at once; it goes on with at most 2" in told
    assert small_run["accuracy"] == whole["accuracy"]
    one, other = ledger_tensors(tmp_path / "whole"), ledger_tensors(tmp_path / "small")
    factors = [key for key in one if "/B/" in key]
    assert factors
    for key in factors:
        torch.testing.assert_close(one[key], other[key], rtol=5e-3, atol=1e-5)
