"""Runs that die inside a task and go on from its checkpoint: the bits of a run that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora.errors import ConfigError, TrainingError
from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment import training as training_module
from keeplora.experiment.checkpoint import seal
from keeplora.experiment.interrupt import listening
from keeplora.experiment.kinds.classification import Classification
from keeplora.experiment.objective import TaskObjective
from keeplora.files import sha256_file
from keeplora.tuner import ContinualLearner
from tests.cli.test_resume import events_without_times
from tests.cli.tiny_world import events_of, ledger_tensors, record_of, results_of, same_tensors, status_of
from tests.experiment.deaths import DEAD, counted_steps, dies, in_child

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
    ("keeplora++", {"tuner": {"residual_gradient": "sketch", "sketch_oversampling": 2}}, PAINT + 5, "kill"),
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


@pytest.mark.parametrize(
    ("method", "changes", "at", "how"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}-{i}" for i, c in enumerate(CASES)]
)
def test_every_method_goes_on_inside_a_task_and_ends_with_the_same_bits(
    world, tmp_path, monkeypatch, method, changes, at, how
):
    changes = settings(method, **changes)
    with counted_steps(monkeypatch) as whole:
        straight, _ = world.run(**changes)
    path = tmp_path / "run"
    dies(world.config(**changes), path, at, how)
    kept = state_of(path)["steps"]
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    assert_same(path, straight)
    if whole:  # else another test has made the straight run
        task = whole[at - 1][0]
        first = [name for name, _, _ in whole].index(task)  # steps of the tasks before
        # A signal lets the step end and keeps it; a kill hits the step before that, and checkpoints are two steps apart.
        assert kept == (at - first if how != "kill" else (at - 1 - first) // 2 * 2)
        assert taken == whole[first + kept :]


def test_workers_bring_the_same_batches_to_a_resumed_run(world, tmp_path):
    changes = settings("keeplora++", training={"workers": 1})
    straight, _ = world.run(**changes)
    dies(world.config(**changes), tmp_path / "run", PAINT + 3, "term")
    Experiment.resume(tmp_path / "run", quiet=True)
    assert_same(tmp_path / "run", straight)
    assert same_tensors(ledger_tensors(straight), ledger_tensors(world.run(**settings("keeplora++"))[0]))


def test_a_run_that_dies_again_and_again_ends_with_the_same_bits(world, tmp_path):
    changes = settings("keeplora++", training={"checkpoint_steps": 1})
    straight, _ = world.run(**changes)
    path = tmp_path / "run"
    moments = random.Random(6)
    dies(world.config(**changes), path, 2, "kill")
    left = PAINT + STRIPES - 1
    while left > 4:  # steps that are left: each child takes some of them
        at = moments.randint(1, 4)
        how = moments.choice(["kill", "term"])
        dies({}, path, at, how)
        left -= at - (how == "kill")
    Experiment.resume(path, quiet=True)
    assert_same(path, straight)


def test_a_signal_in_validation_keeps_the_epoch(world, tmp_path, monkeypatch):
    changes = settings("lora", **{**VALIDATED, "training": {"epochs": 3, "checkpoint_steps": 5}})
    straight, _ = world.run(**changes)
    path = tmp_path / "run"

    def work():
        inner, calls = training_module.Selection, []

        def selection(validate, *rest):
            def stopped():
                calls.append(1)
                if len(calls) == 2:
                    torch.rand(1)  # what the validation had drawn by then is not kept
                    os.kill(os.getpid(), signal.SIGTERM)
                return validate()

            return inner(stopped, *rest)

        runner_module.Selection = selection
        with listening():
            Experiment({**world.config(**changes), "output": str(path)}, quiet=True).run()

    assert in_child(work) == 143
    assert (state_of(path)["steps"], state_of(path)["loop"]["epoch"], state_of(path)["loop"]["step"]) == (6, 2, 3)
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    assert taken[0] == ("paint", 3, 1)
    assert_same(path, straight)


def test_a_death_while_the_task_is_merged_repeats_no_step(world, tmp_path, monkeypatch):
    changes = settings("keeplora++", **VALIDATED)
    straight, _ = world.run(**changes)
    path = tmp_path / "run"

    def work():
        inner = ContinualLearner._protect

        def protect(self, task, record):
            if task.name == "stripes":
                os._exit(DEAD)
            inner(self, task, record)

        ContinualLearner._protect = protect
        Experiment({**world.config(**changes), "output": str(path)}, quiet=True).run()

    assert in_child(work) == DEAD
    assert state_of(path)["loop"]["done"] is True
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    assert taken == []
    assert_same(path, straight)


def test_what_accept_measured_before_the_task_is_not_measured_again(world, tmp_path, monkeypatch):
    changes = settings(
        "lora", validation=0.2, accept={"max_drop": 100, "action": "warn"}, probes=world.config()["probes"]
    )
    straight, _ = world.run(**changes)
    path = tmp_path / "run"
    dies(world.config(**changes), path, 6 + 3, "kill")
    asked = []
    inner = runner_module.Run._guard_scores
    monkeypatch.setattr(runner_module.Run, "_guard_scores", lambda self, n: asked.append(n) or inner(self, n))
    Experiment.resume(path, quiet=True)
    assert len(asked) == 1  # after the task alone
    assert_same(path, straight)


def test_what_the_statistics_warned_of_is_still_told_and_once(world, tmp_path, monkeypatch):
    def prepare_head(self, objective, data, training):
        warnings.warn_explicit(f"{objective.task.name} is narrow", UserWarning, "keeplora/statistics.py", 1)

    monkeypatch.setattr(Classification, "prepare_head", prepare_head)
    path = tmp_path / "run"
    dies(world.config(**settings("lora")), path, PAINT + 5, "kill")
    results = Experiment.resume(path, quiet=True)
    assert results["warnings"] == ["paint is narrow", "stripes is narrow"]


def test_no_checkpoint_is_written_where_none_is_asked_for(world, tmp_path):
    changes = settings("lora", training={"checkpoint_steps": None})
    straight, _ = world.run(**changes)
    path = tmp_path / "run"
    dies(world.config(**changes), path, PAINT + 5, "kill")
    assert not (path / "checkpoint").exists()
    Experiment.resume(path, quiet=True)
    assert_same(path, straight)


# ---- checkpoints that do not fit -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dead(world, tmp_path_factory):
    """A run that was killed inside its second task; to be copied."""
    path = tmp_path_factory.mktemp("dead") / "run"
    dies(world.config(**settings("keeplora++")), path, PAINT + 5, "kill")
    return path


def reseal(folder: Path, change) -> None:
    """Change the values or the tensors of a checkpoint as somebody would who knows the format."""
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    change(state, tensors)
    save_file(tensors, folder / "tensors.safetensors")
    state["tensors_sha256"] = sha256_file(folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps({**state, "seal": seal(state)}))


def _flip(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def _nan(folder: Path) -> None:
    def change(state, tensors):
        next(t for name, t in tensors.items() if name.startswith("optimizer/") and t.ndim)[0] = torch.nan

    reseal(folder, change)


def _without(what: str):
    def spoil(folder: Path) -> None:
        def change(state, tensors):
            for name in [name for name in tensors if name.startswith(what)]:
                del tensors[name]

        reseal(folder, change)

    return spoil


def _other_shape(folder: Path) -> None:
    def change(state, tensors):
        name = next(name for name in tensors if name.startswith("parameter/"))
        tensors[name] = torch.zeros(3)

    reseal(folder, change)


def _beyond(folder: Path) -> None:
    reseal(folder, lambda state, tensors: state["loop"].update(epoch=9))


MISFITS = {
    "a place beyond the end": (_beyond, "it stands at epoch 9, step 1, which this task does not have"),
    "one bit": (_flip, "tensors.safetensors is damaged"),
    "not a number": (_nan, r"optimizer/\S+ holds NaN or infinity"),
    "no statistics": (_without("learner/"), "it is not complete"),
    "no weights": (_without("parameter/"), "it is not complete"),
    "another shape": (_other_shape, r"has shape \(3,\), and not"),
    "an edited value": (
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"step": 1', '"step": 0')),
        "state.json was changed after it was written",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_told_and_the_task_starts_again(
    world, dead, tmp_path, capsys, monkeypatch, what
):
    spoil, why = MISFITS[what]
    path = world.copied(dead, tmp_path / "run")
    spoil(checkpoint(path))
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, quiet=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "is not used" in line]
    assert len(told) == 1
    assert re.search(f"the checkpoint of task 'stripes' is not used: .*{why}.*; the task starts again", told[0])
    assert taken[0] == ("stripes", 1, 1)
    assert_same(path, world.run(**settings("keeplora++"))[0])


def test_another_configuration_or_ledger_starts_the_task_again(world, dead, tmp_path, capsys):
    path = world.copied(dead, tmp_path / "run")
    file = path / "config.yaml"
    file.write_text(file.read_text().replace("batch_size: 8", "batch_size: 5"))
    Experiment.resume(path, quiet=True)
    assert "is not used: the configuration has changed; the task starts again" in capsys.readouterr().err
    assert record_of(path, 2)["info"]["training"]["batch_size"] == 5


def test_a_checkpoint_of_a_finished_task_is_dropped_in_silence(world, dead, tmp_path, capsys):
    done = world.copied(world.run(**settings("keeplora++"))[0], tmp_path / "run")
    shutil.copytree(dead / "checkpoint", done / "checkpoint")
    Experiment.resume(done, quiet=True)
    assert "checkpoint" not in capsys.readouterr().err
    assert not (done / "checkpoint").exists()


# ---- another rate --------------------------------------------------------------------------------------------------


def test_a_lower_rate_goes_on_from_the_checkpoint_and_is_told(world, dead, tmp_path, monkeypatch):
    path = world.copied(dead, tmp_path / "run")
    with counted_steps(monkeypatch) as taken:
        results = Experiment.resume(path, {"training.learning_rate": 0.001}, quiet=True)
    assert taken == [("stripes", 2, 2), ("stripes", 2, 3)]
    line = "task 'stripes' goes on from step 4 with the learning rate 0.001 in place of 0.01"
    assert line in results["warnings"]
    assert "learning_rate: 0.001" in (path / "config.yaml").read_text()
    assert record_of(path, 2)["info"]["training"]["learning_rate"] == 0.001
    straight = world.run(**settings("keeplora++"))[0]
    rates = [[e["lr"] for e in events_of(run, "epoch")] for run in (path, straight)]
    assert rates[0][:3] == rates[1][:3]  # what was trained before keeps its rate
    assert rates[0][3] == pytest.approx(rates[1][3] / 10)
    assert not same_tensors(ledger_tensors(path), ledger_tensors(straight))


def test_other_settings_cannot_be_changed_by_a_resume(dead):
    with pytest.raises(
        ConfigError, match=r"-o tuner.r: a resume may change .*training.learning_rate.* and nothing else"
    ):
        Experiment.resume(dead, {"tuner.r": 2}, quiet=True)


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint_to_go_on_from(world, tmp_path, monkeypatch):
    changes = settings("keeplora++")
    path, steps = tmp_path / "run", []
    inner = TaskObjective.part_loss

    def part_loss(self, part, total):
        loss, logits = inner(self, part, total)
        steps.append(self.task.name)
        if steps.count("stripes") == 5:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, logits

    with monkeypatch.context() as patch:
        patch.setattr(TaskObjective, "part_loss", part_loss)
        with pytest.raises(TrainingError) as caught:
            Experiment(world.config(**changes, output=str(path)), quiet=True).run()
    told = str(caught.value)
    assert re.search(r"task 'stripes', epoch 2, step 2: the gradient of \S+ holds NaN or infinity \(samples", told)
    assert "keeplora resume RUN -o training.learning_rate=0.001" in told
    assert status_of(path)["state"] == "failed"
    assert state_of(path)["steps"] == 4
    with counted_steps(monkeypatch) as taken:
        Experiment.resume(path, {"training.learning_rate": 0.001}, quiet=True)
    assert taken[0] == ("stripes", 2, 2)
    assert status_of(path)["state"] == "finished"


def test_a_task_without_a_checkpoint_is_told_to_start_anew_by_a_resume_alone(world, tmp_path, capsys):
    path = tmp_path / "run"
    changes = settings("lora", training={"checkpoint_steps": None})
    dies(world.config(**changes), path, 3, "kill")
    capsys.readouterr()
    Experiment.resume(path, quiet=True)
    told = capsys.readouterr().err
    assert told.count("no checkpoint of task") == 1
    assert "no checkpoint of task 'paint' yet: it starts from its beginning (training.checkpoint_minutes" in told
    Experiment(world.config(**changes, output=str(tmp_path / "other")), quiet=True).run()
    assert "no checkpoint" not in capsys.readouterr().err


def test_a_rank_that_is_too_large_is_told_once_and_in_the_results(world, tmp_path, capsys):
    values = world.config(**settings("lora", tuner={"r": 5000}), output=str(tmp_path / "run"))
    results = Experiment(values, quiet=True).run()
    assert any("r is 5000, but the widest target of " in line for line in results["warnings"])
    assert capsys.readouterr().err.count("warning: r is 5000") == 1
