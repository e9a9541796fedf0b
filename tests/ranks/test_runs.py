"""`keeplora run` in several processes: the matrix of one process, one writer, and a run that goes on after any rank's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_resume import events_without_times
from tests.cli.tiny_world import World, ledger_tensors, results_of, same_tensors, status_of, the_world
from tests.ranks import runs
from tests.ranks.world import outcomes, run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def settings(world: World, method: str = "keeplora++", **changes: Any) -> dict[str, Any]:
    training = {"checkpoint_steps": 2, "checkpoint_minutes": None} | changes.pop("training", {})
    return world.config(method=method, training=training, **{"first_tasks": 2, "probes": [], **changes})


def close(path: Path, straight: Path, tolerance: float = 1e-5) -> None:
    """Accuracies to a picture, losses and the merged weights to rounding."""
    one, other = results_of(path), results_of(straight)
    assert one["accuracy"] == other["accuracy"]
    for mine, theirs in zip(one["tasks_info"], other["tasks_info"], strict=True):
        for a, b in zip(mine.get("epochs", []), theirs.get("epochs", []), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for name, W in updates(straight).items():
        assert float((updates(path)[name] - W).norm()) <= tolerance * max(1.0, float(W.norm())), name


def updates(path: Path) -> dict[str, torch.Tensor]:
    """B A of every task and layer, and what was trained whole."""
    tensors, found = ledger_tensors(path), {}
    for key, value in tensors.items():
        folder, kind, name = key.split("/", 2)
        if kind == "B":
            found[key] = value @ tensors[f"{folder}/A/{name}"]
        if kind in ("delta", "extra"):
            found[key] = value
    return found


def test_the_matrix_of_one_process(world: World, tmp_path: Path) -> None:
    config = settings(world)
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.run, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict) and found[0] == found[1], found
    close(tmp_path / "two", tmp_path / "one")
    assert events_without_times(tmp_path / "two") == events_without_times(tmp_path / "two")
    assert status_of(tmp_path / "two")["state"] == "finished"
    assert not (tmp_path / "two" / "checkpoint").exists()


@pytest.mark.parametrize("method", ["keeplora++-cls", "lora", "inflora", "o-lora", "gpm-lora", "full-ft", "joint"])
def test_other_methods_too(method: str, world: World, tmp_path: Path) -> None:
    config = settings(world, method, probes=[], training={"epochs": 1})
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.run, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one", 1e-4)


@pytest.mark.parametrize(("how", "who"), [("kill", 0), ("kill", 1), ("term", 1), ("raise", 1)])
def test_a_run_goes_on_after_any_rank(how: str, who: int, world: World, tmp_path: Path) -> None:
    """Two processes, one of which ends within the second task; resumed by two to the same bits, and by one and three."""
    config, path = settings(world), tmp_path / "run"
    run(runs.run, 2, tmp_path / "straight-meet", config, str(tmp_path / "straight"))
    found = outcomes(runs.run, 2, tmp_path / "meet", config, str(path), 8 + 5, who, how)
    survivor = found[1 - who]
    assert survivor[0] == "returned", survivor
    if how == "kill":
        assert found[who] == ("died", -9)
        assert survivor[1].startswith(f"RankError: rank {who} (process "), survivor
    if how == "raise":
        assert survivor[1].startswith("RankError: rank 1 failed in a training step: ValueError: a fault"), survivor
        assert found[who][1] == "ValueError: a fault of the machine"
    if how == "term":
        assert survivor[1] == found[who][1] == "Interrupted: stopped by SIGTERM", found
        assert status_of(path)["state"] == "interrupted"
    assert (path / "checkpoint").is_dir()
    again = {n: World.copied(world, path, tmp_path / f"by-{n}") for n in (1, 2, 3)}
    for n, copy in again.items():
        run(runs.run, n, tmp_path / f"meet-{n}", config, str(copy)) if n > 1 else runs.run(config, str(copy))
        assert status_of(copy)["state"] == "finished"
        close(copy, tmp_path / "straight", 1e-4)
    assert same_tensors(ledger_tensors(again[2]), ledger_tensors(tmp_path / "straight"))


def test_a_method_that_works_alone_says_so(world: World, tmp_path: Path) -> None:
    found = run(runs.run, 2, tmp_path / "meet", settings(world, "ewc"), str(tmp_path / "run"))
    assert found[0] == found[1] == "KeepLoraError: EWC is not yet taught to divide its work among processes; start it as one process"
