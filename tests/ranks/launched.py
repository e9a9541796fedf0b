"""What must be true of a run whose processes hold model or optimiser in parts, whoever parts them (FSDP2, DeepSpeed).

``launched``: a function of `tests.ranks.runs` that runs in every process as under that launcher.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.tiny_world import World, ledger_tensors, same_tensors, status_of
from tests.experiment.generation_world import make_world
from tests.ranks import runs
from tests.ranks.test_runs import close, settings
from tests.ranks.world import outcomes, run

Launched = Callable[..., Any]


def three_equal_one(launched: Launched, world: World, tmp_path: Path) -> None:
    """Three processes and batches of 9 in 20 samples: one has no part of the last batch, and goes along."""
    assert isinstance(runs.run(settings(world), str(tmp_path / "one")), dict)
    found = run(launched, 3, tmp_path / "meet", settings(world), str(tmp_path / "three"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1] == found[2]
    close(tmp_path / "three", tmp_path / "one")
    assert status_of(tmp_path / "three")["state"] == "finished"


def two_equal_one(launched: Launched, config: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(launched, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")


def a_killed_run_goes_on(launched: Launched, world: World, tmp_path: Path) -> None:
    """Killed in the second task: resumed by two to the same bits, by three, and by one process that holds everything whole."""
    config = settings(world)
    straight = run(launched, 2, tmp_path / "meet", config, str(tmp_path / "straight"))
    assert isinstance(straight[0], dict), straight
    found = outcomes(launched, 2, tmp_path / "meet-2", config, str(tmp_path / "run"), 8 + 5, 1, "kill")
    assert found[1] == ("died", -9)
    assert found[0][1].startswith("RankError: rank 1 (process "), found
    assert (tmp_path / "run" / "checkpoint").is_dir()
    for n in (2, 3, 1):
        copy, meet = world.copied(tmp_path / "run", tmp_path / f"by-{n}"), tmp_path / f"by-{n}-meet"
        again = run(launched, n, meet, config, str(copy)) if n > 1 else [runs.run(config, str(copy))]
        assert isinstance(again[0], dict), again
        close(copy, tmp_path / "straight")
        if n == 2:
            assert same_tensors(ledger_tensors(copy), ledger_tensors(tmp_path / "straight"))


def one_rank_stops_all(launched: Launched, how: str, world: World, tmp_path: Path) -> None:
    found = outcomes(launched, 2, tmp_path / "meet", settings(world), str(tmp_path / "run"), 8 + 5, 1, how)
    if how == "raise":
        assert found[1] == ("returned", "ValueError: a fault of the machine")
        assert found[0][1].startswith("RankError: rank 1 stopped: ValueError: a fault of the machine"), found
    else:
        assert found[0][1] == found[1][1] == "Interrupted: stopped by SIGTERM", found
        assert status_of(tmp_path / "run")["state"] == "interrupted"


def answers_are_the_same(launched: Launched, tmp_path: Path, **training: Any) -> None:
    """A language model; one process may finish its answers long before another."""
    config = make_world(tmp_path)
    config["training"] |= {"batch_size": 5, "micro_batch": 2, "epochs": 1, **training}
    two_equal_one(launched, config, tmp_path)
    answers = [
        {f.name: f.read_text() for f in (tmp_path / n / "predictions/after-2").iterdir()} for n in ("one", "two")
    ]
    assert answers[0] == answers[1]
