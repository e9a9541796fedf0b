"""`keeplora run` in several processes: the matrix of one process, one writer, and a run that goes on after any rank's death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.tiny_world import World, ledger_tensors, results_of, same_tensors, status_of, the_world
from tests.experiment.generation_world import make_world
from tests.experiment.test_streams import parquet
from tests.ranks import runs
from tests.ranks.world import outcomes, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    found = run(runs.run, 2, folder / "meet", settings(world), str(folder / "run"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1]
    return folder / "run"


def settings(world: World, method: str = "keeplora++", **changes: Any) -> dict[str, Any]:
    # 9: parts of 5 and 4, and in the last batch (of 20 samples) one of three ranks has none.
    training = {"batch_size": 9, "checkpoint_steps": 2, "checkpoint_minutes": None} | changes.pop("training", {})
    return world.config(method=method, training=training, **{"first_tasks": 2, "probes": [], **changes})


def close(path: Path, other: Path) -> None:
    """The same accuracies and losses, and the same weights to 1e-5: theirs have norms about 1."""
    one, two = results_of(path), results_of(other)
    assert one["accuracy"] == two["accuracy"]
    for mine, theirs in zip(one["tasks_info"], two["tasks_info"], strict=True):
        for a, b in zip(mine.get("epochs", []), theirs.get("epochs", []), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    mine, theirs = updates(path), updates(other)
    assert max(float(W.norm()) for W in theirs.values()) > 5e-3  # something was learned
    for name, W in theirs.items():
        assert float((mine[name] - W).norm()) <= 5e-6, name


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


def test_the_matrix_of_one_process(world: World, straight: Path, tmp_path: Path) -> None:
    assert isinstance(runs.run(settings(world), str(tmp_path / "one")), dict)
    close(straight, tmp_path / "one")
    assert status_of(straight)["state"] == "finished"
    assert not (straight / "checkpoint").exists()


def test_a_task_is_added_by_two(world: World, straight: Path, tmp_path: Path) -> None:
    config = settings(world)
    found = run(runs.run, 2, tmp_path / "meet", {**config, "first_tasks": 1}, str(tmp_path / "run"))
    assert isinstance(found[0], dict), found
    added = {"tasks": config["tasks"][:2], "base_dir": config["base_dir"]}
    found = run(runs.run, 2, tmp_path / "meet-again", config, str(tmp_path / "run"), 0, 1, "", added)
    assert isinstance(found[0], dict), found
    assert found[0] == found[1]
    assert results_of(tmp_path / "run")["accuracy"] == results_of(straight)["accuracy"]
    assert same_tensors(ledger_tensors(tmp_path / "run"), ledger_tensors(straight))


@pytest.mark.slow
@pytest.mark.parametrize("split_by", ["samples", "shards"])
def test_a_stream_is_divided_too(world: World, tmp_path: Path, split_by: str) -> None:
    """By samples, the processes together see the batches of one; by shards, each reads files of its own."""
    parquet(world, "paint", tmp_path / "paint", (10, 10, 10))
    streaming = {"samples": 30 if split_by == "samples" else 20, "buffer": 18, "split_by": split_by}
    task = {"name": "paint", "source": "datasets", "path": str(tmp_path / "paint"), "streaming": streaming}
    config = settings(world, tasks=[task], first_tasks=1)
    found = run(runs.run, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1]
    if split_by == "samples":
        assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
        close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["keeplora++-cls", "lora", "inflora", "o-lora", "gpm-lora", "full-ft", "joint"])
def test_other_methods_too(method: str, world: World, tmp_path: Path) -> None:
    config = settings(world, method, training={"epochs": 1})
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.run, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "who"), [("kill", 0), ("kill", 1), ("term", 1), ("raise", 1)])
def test_a_run_goes_on_after_any_rank(how: str, who: int, world: World, straight: Path, tmp_path: Path) -> None:
    """Two processes, one of which ends within the second task; resumed by two to the same bits, and by one and three."""
    config, path = settings(world), tmp_path / "run"
    found = outcomes(runs.run, 2, tmp_path / "meet", config, str(path), 8 + 5, who, how)
    survivor = found[1 - who]
    assert survivor[0] == "returned", survivor
    if how == "kill":
        assert found[who] == ("died", -9)
        assert survivor[1].startswith(f"RankError: rank {who} (process "), survivor
    if how == "raise":
        assert survivor[1].startswith("RankError: rank 1 stopped: ValueError: a fault of the machine"), survivor
        assert found[who][1] == "ValueError: a fault of the machine"
    if how == "term":
        assert survivor[1] == found[who][1] == "Interrupted: stopped by SIGTERM", found
        assert status_of(path)["state"] == "interrupted"
    assert (path / "checkpoint").is_dir()
    for n in (2, 1, 3) if (how, who) == ("kill", 1) else (2,):
        copy = world.copied(path, tmp_path / f"by-{n}")
        again = run(runs.run, n, tmp_path / f"meet-{n}", config, str(copy)) if n > 1 else [runs.run(config, str(copy))]
        assert isinstance(again[0], dict), again
        assert status_of(copy)["state"] == "finished"
        close(copy, straight)
        if n == 2:
            assert same_tensors(ledger_tensors(copy), ledger_tensors(straight))


def test_a_method_that_works_alone_says_so(world: World, tmp_path: Path) -> None:
    found = run(runs.run, 2, tmp_path / "meet", settings(world, "ewc"), str(tmp_path / "run"))
    wanted = "KeepLoraError: EWC is not yet taught to divide its work among processes; start it as one process"
    assert found[0] == found[1] == wanted


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node=2",
    # --multi_gpu names the launcher of several processes; without GPUs they are processes on the CPU.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line_under_a_launcher(launcher: str, world: World, tmp_path: Path) -> None:
    """Two processes by `torchrun` or `accelerate launch -m keeplora run`: one set of tables, and one report."""
    file = tmp_path / "x.yaml"
    config = settings(world, output=str(tmp_path / "run"))
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "keeplora", "run"]
    done = subprocess.run(
        [*command, str(file), "--quiet"], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    assert done.stderr.count("task 1/2: paint") == 1
    assert status_of(tmp_path / "run")["state"] == "finished"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_answers_in_words(tmp_path: Path) -> None:
    """Answer tokens and not samples are what a batch's parts are weighted by; answers are gathered, and written once."""
    config = make_world(tmp_path)
    config["training"] |= {"batch_size": 5, "micro_batch": 2, "epochs": 1}
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.run, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1]
    close(tmp_path / "two", tmp_path / "one")
    answers = [
        {f.name: f.read_text() for f in (tmp_path / n / "predictions/after-2").iterdir()} for n in ("one", "two")
    ]
    assert answers[0] == answers[1]
