"""Miniature MTIL and X-TAIL trees in their true formats, from files on disk to a finished run, by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keeplora.cli import main
from keeplora.experiment.run_directory import RunDirectory
from keeplora.suites import load_suite
from tests.cli.tiny_world import ledger_tensors, same_tensors
from tests.data.benchmarks.mini import MAKERS, make_mini
from tests.models.tiny import make_tiny

#: suite, method, order: every suite in both orders, with the method and with two baselines.
RUNS = [
    ("mtil", "keeplora++", "1"), ("mtil", "lora", "2"), ("mtil", "zero-shot", "1"),
    ("x-tail", "keeplora++", "2"), ("x-tail", "lora", "1"), ("x-tail", "zero-shot", "2"),
]  # fmt: skip
PRESETS = {("mtil", "1"): "mtil", ("mtil", "2"): "mtil-order-ii", ("x-tail", "1"): "mtil", ("x-tail", "2"): "mtil"}


class Run(NamedTuple):
    path: Path
    results: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    make_mini(root / "mtil", [source for source in MAKERS if source != "coop"])
    make_mini(root / "x-tail", ["coop"])
    make_tiny("clip", root / "clip")
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Callable[..., Run]:
    """A finished run, made once for each suite, method, order and repetition."""
    made: dict[tuple[str, ...], Run] = {}

    def once(suite: str, method: str, order: str, repetition: str = "first") -> Run:
        key = (suite, method, order, repetition)
        if key not in made:
            path = root / "runs" / "-".join(key)
            words = {"--suite": suite, "--method": method, "--order": order, "--data": root / suite, "--output": path}
            epochs = 4 if method == "lora" else 1  # enough for one of the three to learn visibly
            settings = {
                "model": root / "clip", "device": "cpu", "tuner.r": 4, "training.epochs": epochs, "training.batch_size": 8,
                "training.learning_rate": 0.02, "training.precision": "fp32",
            }  # fmt: skip
            options = [str(word) for pair in words.items() for word in pair]
            options += [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
            with pytest.raises(SystemExit) as caught:
                main(["run", *options, "--quiet"])
            assert not caught.value.code
            directory = RunDirectory(path)
            results, data = (json.loads((path / name).read_text()) for name in ("results.json", "data.json"))
            made[key] = Run(path, results, directory.read_config(), {entry["name"]: entry for entry in data["tasks"]})
        return made[key]

    return once


@pytest.mark.parametrize(("suite", "method", "order"), RUNS)
def test_a_benchmark_runs_from_files_to_results(run, suite, method, order):
    found = run(suite, method, order)
    wanted = load_suite(suite)["orders"][order]["order"]
    assert found.results["tasks"] == wanted
    assert (found.results["suite"], found.results["method"], found.results["order"]) == (suite, method, order)
    assert found.results["candidates"] == {"mtil": "own", "x-tail": "all"}[suite]
    assert found.config["preset"] == PRESETS[suite, order]
    assert found.config["seed"] == 42  # the preset's
    matrix = found.results["accuracy"]
    assert [len(row) for row in matrix] == [len(wanted)] * (len(wanted) + 1)
    for row in matrix:
        for value, task in zip(row, wanted, strict=True):
            hits = value / 100 * found.results["test_counts"][task]
            assert abs(hits - round(hits)) < 1e-6  # a whole number of this dataset's test pictures
    assert (found.path / "report.html").is_file()


@pytest.mark.parametrize(("suite", "method", "order"), RUNS[:1] + RUNS[3:4])
def test_miniature_data_is_not_taken_for_the_published(run, suite, method, order):
    found = run(suite, method, order)
    for spec in load_suite(suite)["tasks"]:
        data = found.data[spec["name"]]
        assert data["templates"] == spec["templates"]
        told = [warning for warning in data["warnings"] if warning.startswith("not paper-comparable: ")]
        here = {"classes": len(data["classes"]), "train": data["train"], "test": data["test"]}
        for key, count in spec["expect"].items():
            said = any(warning.endswith(f"where the published protocol has {count}") for warning in told)
            assert said == (here[key] != count), (spec["name"], key)
        if suite == "x-tail" and spec["source"] == "coop":
            assert any("shots per class are drawn with seed 42" in warning for warning in told)
            assert data["train"] == 16 * len(data["classes"])


@pytest.mark.parametrize(("suite", "order"), [("mtil", "1"), ("x-tail", "2")])
def test_zero_shot_stays_where_every_method_starts(run, suite, order):
    rows = run(suite, "zero-shot", order).results["accuracy"]
    assert all(row == rows[0] for row in rows)
    assert run(suite, "keeplora++", order).results["accuracy"][0] == rows[0]


def test_training_learns_the_tasks(run):
    """Own candidates, so what rises is the telling apart of a dataset's own classes."""
    matrix = run("mtil", "lora", "2").results["accuracy"]
    gains = [matrix[i + 1][i] - matrix[0][i] for i in range(len(matrix[0]))]
    assert sum(gains) / len(gains) > 15, gains


def test_candidates_of_all_domains_make_it_harder(run):
    """Nothing else differs: the untouched model names the same pictures among its own classes, and among all."""
    found = run("x-tail", "zero-shot", "2")
    own = 100 * sum(1 / len(data["classes"]) for data in found.data.values()) / len(found.data)
    assert sum(found.results["accuracy"][0]) / len(found.data) < own / 2


def test_two_runs_are_equal(run):
    first, second = (run("mtil", "keeplora++", "1", repetition) for repetition in ("first", "second"))
    assert first.path != second.path
    assert first.results["accuracy"] == second.results["accuracy"]
    tensors = ledger_tensors(first.path)
    assert len({name.split("/")[0] for name in tensors if "/B/" in name}) == 11
    assert same_tensors(tensors, ledger_tensors(second.path))
    assert {k: v["fingerprint"] for k, v in first.data.items()} == {k: v["fingerprint"] for k, v in second.data.items()}


def test_the_leak_of_the_method_stays_at_rounding(run):
    audit = run("mtil", "keeplora++", "1").results["audit"]
    assert audit["factor_leak_max"] <= 1e-5
