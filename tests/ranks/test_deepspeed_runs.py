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
