"""`keeplora run` under ``accelerate launch --use_fsdp --fsdp_version 2``: the run of one process, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment import sharded
from tests.cli.tiny_world import World, ledger_tensors, same_tensors, status_of, the_world
from tests.experiment.generation_world import make_world
from tests.ranks import runs
from tests.ranks.test_runs import close, settings
from tests.ranks.world import outcomes, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def test_the_matrix_of_one_process(world: World, tmp_path: Path) -> None:
    """Three processes and batches of 9 in 20 samples: one has no part of the last batch, and goes along."""
    assert isinstance(runs.run(settings(world), str(tmp_path / "one")), dict)
    found = run(runs.sharded, 3, tmp_path / "meet", settings(world), str(tmp_path / "three"))
    assert isinstance(found[0], dict), found
    assert found[0] == found[1] == found[2]
    close(tmp_path / "three", tmp_path / "one")
    assert status_of(tmp_path / "three")["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["keeplora++-cls", "lora", "inflora", "o-lora", "gpm-lora", "joint"])
def test_other_methods_too(method: str, world: World, tmp_path: Path) -> None:
    config = settings(world, method, training={"epochs": 1})
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.sharded, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")


def test_a_method_that_trains_whole_weights_says_so(world: World, tmp_path: Path) -> None:
    said = run(runs.sharded, 2, tmp_path / "meet", settings(world, "full-ft"), str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "is sharded, but this method reads or trains whole weights" in said[0], said


@pytest.mark.slow
def test_a_killed_run_goes_on_sharded_or_not(world: World, tmp_path: Path) -> None:
    """Resumed by two to the same bits, by three, and by one process that holds the model whole."""
    config = settings(world)
    straight = run(runs.sharded, 2, tmp_path / "meet", config, str(tmp_path / "straight"))
    assert isinstance(straight[0], dict), straight
    found = outcomes(runs.sharded, 2, tmp_path / "meet-2", config, str(tmp_path / "run"), 8 + 5, 1, "kill")
    assert found[1] == ("died", -9)
    assert found[0][1].startswith("RankError: rank 1 (process "), found
    assert (tmp_path / "run" / "checkpoint").is_dir()
    for n in (2, 3, 1):
        copy, meet = world.copied(tmp_path / "run", tmp_path / f"by-{n}"), tmp_path / f"by-{n}-meet"
        again = run(runs.sharded, n, meet, config, str(copy)) if n > 1 else [runs.run(config, str(copy))]
        assert isinstance(again[0], dict), again
        close(copy, tmp_path / "straight")
        if n == 2:
            assert same_tensors(ledger_tensors(copy), ledger_tensors(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "term"])
def test_one_rank_that_stops_stops_all(how: str, world: World, tmp_path: Path) -> None:
    found = outcomes(runs.sharded, 2, tmp_path / "meet", settings(world), str(tmp_path / "run"), 8 + 5, 1, how)
    if how == "raise":
        assert found[1] == ("returned", "ValueError: a fault of the machine")
        assert found[0][1].startswith("RankError: rank 1 stopped: ValueError: a fault of the machine"), found
    else:
        assert found[0][1] == found[1][1] == "Interrupted: stopped by SIGTERM", found
        assert status_of(tmp_path / "run")["state"] == "interrupted"


@pytest.mark.slow
def test_answers_in_words(tmp_path: Path) -> None:
    """A language model's blocks are sharded; one process may finish its answers long before another."""
    config = make_world(tmp_path)
    config["training"] |= {"batch_size": 5, "micro_batch": 2, "epochs": 1}
    assert isinstance(runs.run(config, str(tmp_path / "one")), dict)
    found = run(runs.sharded, 2, tmp_path / "meet", config, str(tmp_path / "two"))
    assert isinstance(found[0], dict), found
    close(tmp_path / "two", tmp_path / "one")
    answers = [
        {f.name: f.read_text() for f in (tmp_path / n / "predictions/after-2").iterdir()} for n in ("one", "two")
    ]
    assert answers[0] == answers[1]


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
