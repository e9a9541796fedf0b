"""`keeplora run` under ``accelerate launch --use_deepspeed``: the run of one process (`make test-deepspeed`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.tiny_world import World, results_of, status_of, the_world
from tests.ranks import runs, shards
from tests.ranks.launched import (
    a_killed_run_goes_on,
    answers_are_the_same,
    one_rank_stops_all,
    three_equal_one,
    two_equal_one,
)
from tests.ranks.test_runs import settings
from tests.ranks.world import run

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
    three_equal_one(zero, world, tmp_path)


@BOTH
@pytest.mark.parametrize("method", ["keeplora++-cls", "joint"])
def test_other_methods_too(method: str, zero, world: World, tmp_path: Path) -> None:
    two_equal_one(zero, settings(world, method, training={"epochs": 1}), tmp_path)


def test_whole_weights_train_where_no_weight_is_divided(world: World, tmp_path: Path) -> None:
    config = settings(world, "full-ft", training={"epochs": 1})
    two_equal_one(runs.zero2, config, tmp_path)
    said = run(runs.zero3, 2, tmp_path / "meet-3", config, str(tmp_path / "three"))
    assert said[0] == said[1]
    assert "is sharded, but this method reads or trains whole weights" in said[0], said


@BOTH
def test_a_killed_run_goes_on_by_another_number(zero, world: World, tmp_path: Path) -> None:
    a_killed_run_goes_on(zero, world, tmp_path)


@BOTH
@pytest.mark.parametrize("how", ["raise", "term"])
def test_one_rank_that_stops_stops_all(how: str, zero, world: World, tmp_path: Path) -> None:
    one_rank_stops_all(zero, how, world, tmp_path)


@BOTH
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
def test_answers_in_words(again: bool, zero, tmp_path: Path) -> None:
    """Blocks may be computed again in the backward pass."""
    answers_are_the_same(zero, tmp_path, gradient_checkpointing=again)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_divided_optimizer_is_the_whole_one(kind: str, tmp_path: Path) -> None:
    """Its steps, its state, and what becomes of that in another number of processes."""
    file = str(tmp_path / "two.pt")
    whole = shards.steps_by_zero(kind)
    for n in (2, 3):
        found = run(shards.steps_by_zero, n, tmp_path / f"meet-{n}", kind, "", file if n == 2 else "")
        for one in found:
            torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-6)
    on = shards.steps_by_zero(kind, file)
    for n in (2, 3):
        for one in run(shards.steps_by_zero, n, tmp_path / f"on-{n}", kind, file):
            torch.testing.assert_close(one, on, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["flags", "file"])
def test_accelerate_launch(how: str, world: World, tmp_path: Path) -> None:
    """The command line, with flags or a configuration file of accelerate; the run of the same launcher without DeepSpeed."""
    file, launcher = tmp_path / "x.yaml", [sys.executable, "-m", "accelerate.commands.launch"]
    file.write_text(json.dumps(settings(world, training={"epochs": 1})))
    if how == "flags":
        asked = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"]
    else:
        (tmp_path / "accelerate.yaml").write_text(
            yaml.safe_dump(
                {
                    "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2,
                    "num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "use_cpu": False,
                    "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "gradient_accumulation_steps": 1},
                }
            )
        )  # fmt: skip
        asked = ["--config_file", str(tmp_path / "accelerate.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*launcher, *asked, "--main_process_port", "0", "-m", "keeplora", "run", str(file), "--quiet",
         "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    assert status_of(tmp_path / "run")["state"] == "finished"
    assert len(results_of(tmp_path / "run")["tasks_info"]) == 2


def test_a_divided_base_is_whole_only_while_it_computes(tmp_path: Path) -> None:
    for found in run(shards.divided_by_zero3, 2, tmp_path):
        torch.testing.assert_close(*found["gradients"])
        torch.testing.assert_close(*found["outputs"])
        assert found["after a step"] == 0
        assert found["after a failure"] > 0  # or the next line would say nothing
        assert found["settled"] == 0
        part, total = found["held"]
        assert total / 2 <= part < total / 2 + 20
