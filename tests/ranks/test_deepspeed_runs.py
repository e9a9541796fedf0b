"""`keeplora run` under ``accelerate launch --use_deepspeed``: the run of one process (`make test-deepspeed`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.cli.tiny_world import World, ledger_tensors, same_tensors, status_of, the_world
from tests.experiment.generation_world import make_world
from tests.ranks import runs
from tests.ranks.test_runs import close, settings
from tests.ranks.world import outcomes, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
BOTH = pytest.mark.parametrize("zero", [runs.zero2, runs.zero3], ids=["zero2", "zero3"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


@BOTH
def test_the_matrix_of_one_process(zero, world: World, tmp_path: Path) -> None:
    """Three processes and batches of 9 in 20 samples: one has no part of the last batch, and goes along."""
    assert isinstance(runs.run(settings(world), str(tmp_path / "one")), dict)
    found = run(zero, 3, tmp_path / "meet", settings(world), str(tmp_path / "three"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1] == found[2]
    close(tmp_path / "three", tmp_path / "one")
    assert status_of(tmp_path / "three")["state"] == "finished"


@BOTH
@pytest.mark.parametrize("method", ["keeplora++-cls", "joint"])
def test_other_methods_too(method: str, zero, world: World, tmp_path: Path) -> None:
    config = settings(world, method, training={"epochs": 1})
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(zero, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")


def test_whole_weights_train_where_no_weight_is_divided(world: World, tmp_path: Path) -> None:
    config = settings(world, "full-ft", training={"epochs": 1})
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.zero2, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")
    said = run(runs.zero3, 2, tmp_path / "meet-3", config, str(tmp_path / "three"))
    assert said[0] == said[1]
    assert "is sharded, but this method reads or trains whole weights" in said[0], said


@BOTH
def test_a_killed_run_goes_on_by_another_number(zero, world: World, tmp_path: Path) -> None:
    """Killed in the second task: resumed by two to the same bits, by three, and by one process without DeepSpeed."""
    config = settings(world)
    straight = run(zero, 2, tmp_path / "meet", config, str(tmp_path / "straight"))
    assert isinstance(straight[0], dict), straight
    found = outcomes(zero, 2, tmp_path / "meet-2", config, str(tmp_path / "run"), 8 + 5, 1, "kill")
    assert found[1] == ("died", -9)
    assert found[0][1].startswith("RankError: rank 1 (process "), found
    assert (tmp_path / "run" / "checkpoint").is_dir()
    for n in (2, 3, 1):
        copy, meet = world.copied(tmp_path / "run", tmp_path / f"by-{n}"), tmp_path / f"by-{n}-meet"
        again = run(zero, n, meet, config, str(copy)) if n > 1 else [runs.run(config, str(copy))]
        assert isinstance(again[0], dict), again
        close(copy, tmp_path / "straight")
        if n == 2:
            assert same_tensors(ledger_tensors(copy), ledger_tensors(tmp_path / "straight"))


@BOTH
@pytest.mark.parametrize("how", ["raise", "term"])
def test_one_rank_that_stops_stops_all(how: str, zero, world: World, tmp_path: Path) -> None:
    found = outcomes(zero, 2, tmp_path / "meet", settings(world), str(tmp_path / "run"), 8 + 5, 1, how)
    if how == "raise":
        assert found[1] == ("returned", "ValueError: a fault of the machine")
        assert found[0][1].startswith("RankError: rank 1 stopped: ValueError: a fault of the machine"), found
    else:
        assert found[0][1] == found[1][1] == "Interrupted: stopped by SIGTERM", found
        assert status_of(tmp_path / "run")["state"] == "interrupted"


@BOTH
def test_answers_in_words(zero, tmp_path: Path) -> None:
    """A language model; one process may finish its answers long before another."""
    config = make_world(tmp_path)
    config["training"] |= {"batch_size": 5, "micro_batch": 2, "epochs": 1}
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(zero, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")
    answers = [
        {f.name: f.read_text() for f in (tmp_path / n / "predictions/after-2").iterdir()} for n in ("one", "two")
    ]
    assert answers[0] == answers[1]
