"""`keeplora tune` on real runs of the tiny world: what is looked at, kills, failures, and what is printed."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from keeplora.experiment import Experiment
from keeplora.experiment.run_directory import RunDirectory
from keeplora.yaml_text import read_yaml
from tests.cli.tiny_world import TEST, TRAIN, results_of

pytest.importorskip("optuna", reason="optuna is not installed")
SEARCH = ("--methods", "lora,keeplora++", "--trials", "2", "--jobs", "2")


@pytest.fixture(scope="module")
def searched(world, tmp_path_factory):
    """A search of two methods with two trials each; the tests read it and change nothing."""
    folder = tmp_path_factory.mktemp("search")
    config = world.yaml(folder / "experiment.yaml")
    src = str(Path(__file__).resolve().parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": src}
    done = subprocess.run(
        [sys.executable, "-m", "keeplora", "tune", config, *SEARCH, "--output", folder / "tune"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(config=config, folder=folder / "tune", out=done.stdout, err=done.stderr)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_trial_looks_at_held_out_training_pictures_alone(searched):
    trial = searched.folder / "lora/trial-00"
    results = results_of(trial)
    assert results["evaluate_on"] == "validation"
    assert results["tasks"] == ["paint", "stripes"]
    assert results["probes"] == []
    assert results["probe_accuracy"] == [[], [], []]
    data = {entry["name"]: entry for entry in RunDirectory(trial).read_data()}
    assert set(data) == {"paint", "stripes"}
    for entry in data.values():
        classes = len(entry["classes"])
        assert entry["train"] + entry["validation"] == classes * TRAIN
        assert results["test_counts"][entry["name"]] == entry["validation"] != classes * TEST


def test_the_criterion_is_the_mean_of_the_validation_matrix(searched):
    rows = rows_of(searched.folder)
    assert len(rows) == 4
    for row in rows:
        matrix = results_of(searched.folder / row["folder"])["accuracy"][1:]
        assert len(matrix) == 2
        assert float(row["average"]) == pytest.approx(sum(map(sum, matrix)) / 4)
    tuned, _ = read_yaml(searched.folder / "tuned.yaml")
    for method in ("lora", "keeplora++"):
        best = max((row for row in rows if row["method"] == method), key=lambda row: float(row["average"]))
        rate = tuned["per_method"][method]["training"]["learning_rate"]
        assert rate == float(best["training.learning_rate"])
        values, _ = read_yaml(searched.folder / best["folder"] / "config.yaml")
        assert values["training"]["learning_rate"] == rate  # what is recommended is what was run
    assert tuned["search"]["criterion"].startswith("average")


def test_what_is_printed(searched):
    assert "best settings" in searched.out
    assert "2 trials each" in searched.out
    assert "warning: lora: the best training.learning_rate" in searched.out
    for name in ("tuned.yaml", "trials.csv", "trials.png"):
        assert str(searched.folder / name) in searched.out
    assert searched.err.count("lora 1/2: learning_rate") == 1


def test_no_weights_are_left(searched):
    assert (searched.folder / "lora/trial-00/ledger/ledger.json").is_file()
    assert not list(searched.folder.rglob("*.safetensors"))


def test_test_pictures_change_nothing(world, searched, tmp_path):
    """A trial of the search, run again where the test pictures are those of another class, finds the same numbers."""
    for name in ("paint", "stripes", "dots"):
        shutil.copytree(world.root / name / "train", tmp_path / name / "train")
        classes = sorted(p.name for p in (world.root / name / "test").iterdir())
        for label, other in zip(classes, classes[1:] + classes[:1], strict=True):
            shutil.copytree(world.root / name / "test" / label, tmp_path / name / "test" / other)
    values, _ = read_yaml(searched.folder / "keeplora++/trial-00.yaml")
    swapped = {"base_dir": str(tmp_path), "probes": [], "threads": None}
    there = Experiment({**values, **swapped, "output": str(tmp_path / "validation")}, quiet=True).run()
    assert there["accuracy"] == results_of(searched.folder / "keeplora++/trial-00")["accuracy"]
    tested = {**values, **swapped, "output": str(tmp_path / "test"), "evaluate_on": "test"}
    assert Experiment(tested, quiet=True).run()["accuracy"] != there["accuracy"]


@pytest.mark.slow
def test_killed_it_goes_on_as_if_it_had_not_been(searched, process, tmp_path):
    """SIGKILL while trials run: they end by themselves, are waited for, and the search ends as the undisturbed one."""
    words = ("-m", "keeplora", "tune", searched.config, *SEARCH, "--output", tmp_path / "tune")
    child = process(*words)
    end = time.monotonic() + 600
    while not (tmp_path / "tune/lora/trial-00/config.yaml").is_file():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "tune/tuned.yaml").exists()
    again = process(*words)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert rows_of(tmp_path / "tune") == rows_of(searched.folder)
    mine, theirs = ((folder / "tuned.yaml").read_text() for folder in (tmp_path / "tune", searched.folder))
    assert mine == theirs


@pytest.mark.slow
def test_interrupted_its_trials_write_their_state(world, process, tmp_path):
    config = world.yaml(tmp_path / "long.yaml", training={"epochs": 400})
    words = ("-m", "keeplora", "tune", config, "--methods", "lora", "--trials", "1", "--output", tmp_path / "tune")
    child = process(*words)
    trial = tmp_path / "tune/lora/trial-00"
    end = time.monotonic() + 600
    while not (trial / "metrics.jsonl").is_file():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=600)
    assert child.returncode == 130
    assert "repeat the command to go on" in err
    assert RunDirectory(trial).read_status()["state"] == "interrupted"


def test_a_diverged_trial_is_a_failed_one(world, cli, tmp_path):
    config = world.yaml(tmp_path / "experiment.yaml")
    answer = cli(
        "tune", config, "--methods", "lora", "--trials", "2", "--tasks", "1", "--output", tmp_path / "tune",
        "--range", "training.learning_rate=1e-38:1e38",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    states = {row["state"]: row for row in rows_of(tmp_path / "tune")}
    assert set(states) == {"finished", "failed"}
    assert float(states["failed"]["training.learning_rate"]) == 1e19
    assert "the loss is" in states["failed"]["error"]
    assert "failed: TrainingError" in answer.out
    assert read_yaml(tmp_path / "tune/tuned.yaml")[0]["search"]["failed"] == {"lora": 1}


def test_refusals_of_the_command_line(world, cli, tmp_path):
    config = world.yaml(tmp_path / "experiment.yaml")
    for words, told in {
        ("--methods", "lora"): "give either an experiment's YAML file or --suite",
        (config, "--suite", "demo-small", "--methods", "lora"): "give either",
        (config,): "no methods to tune", (config, "--methods", "lorra"): "did you mean 'lora'",
        (tmp_path / "nowhere.yaml", "--methods", "lora"): "no such file",
        ("--suite", "demo-smal", "--methods", "lora"): "did you mean 'demo-small'",
    }.items():  # fmt: skip
        answer = cli("tune", *words, "--output", tmp_path / "tune")
        assert answer.code == 1
        assert told in answer.err, answer.err
    assert not (tmp_path / "tune").exists()
