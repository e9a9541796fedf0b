"""`keeplora run` under ``accelerate launch --use_fsdp --fsdp_version 2``: the run of one process, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment import sharded
from tests.cli.tiny_world import World, the_world
from tests.ranks import runs
from tests.ranks.launched import (
    a_killed_run_goes_on,
    answers_are_the_same,
    one_rank_stops_all,
    three_equal_one,
    two_equal_one,
)
from tests.ranks.test_runs import settings
from tests.ranks.world import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def test_the_matrix_of_one_process(world: World, tmp_path: Path) -> None:
    three_equal_one(runs.sharded, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["keeplora++-cls", "lora", "inflora", "o-lora", "gpm-lora", "joint"])
def test_other_methods_too(method: str, world: World, tmp_path: Path) -> None:
    two_equal_one(runs.sharded, settings(world, method, training={"epochs": 1}), tmp_path)


def test_a_method_that_trains_whole_weights_says_so(world: World, tmp_path: Path) -> None:
    said = run(runs.sharded, 2, tmp_path / "meet", settings(world, "full-ft"), str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "is sharded, but this method reads or trains whole weights" in said[0], said


@pytest.mark.slow
def test_a_killed_run_goes_on_sharded_or_not(world: World, tmp_path: Path) -> None:
    a_killed_run_goes_on(runs.sharded, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "term"])
def test_one_rank_that_stops_stops_all(how: str, world: World, tmp_path: Path) -> None:
    one_rank_stops_all(runs.sharded, how, world, tmp_path)


@pytest.mark.slow
def test_answers_in_words(tmp_path: Path) -> None:
    """A language model's blocks are sharded."""
    answers_are_the_same(runs.sharded, tmp_path)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "asks for FSDP 1, .* add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "set training.gradient_checkpointing",
        ),
    ],
)
def test_what_a_launcher_cannot_ask_for(said: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=sentence):
        sharded.check_launcher()


def test_every_process_reads_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's default has transformers leave the others' weights empty."""
    for key, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }.items():
        monkeypatch.setenv(key, value)
    sharded.check_launcher()
    import os

    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.delenv("FSDP_VERSION")
    sharded.check_launcher()
