"""Runs of generative models: what they measure and write, that they repeat and resume, and how batches are cut."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment import Experiment, TrainedModel
from keeplora.experiment.runner import STOP_AFTER
from keeplora.experiment.setup import prepare
from tests.experiment.generation_world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_world(tmp_path_factory.mktemp("world"))


def run(world: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(world) | {"output": str(output)}
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    return Experiment(config, quiet=True).run()


def factors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{file.relative_to(path)}:{key}": value
        for file in sorted(path.rglob("*.safetensors")) for key, value in load_file(file).items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, run(world, path)


def test_a_run_fills_its_matrices_and_writes_every_answer(finished: tuple[Path, dict[str, Any]]) -> None:
    path, results = finished
    assert results["kind"] == "generation"
    assert [len(row) for row in results["accuracy"]] == [2, 2, 2]
    assert [len(row) for row in results["probe_accuracy"]] == [1, 1, 1]
    assert results["scorers"] == {"colours": "exact", "answers": "exact", "general": "rouge-l"}
    for after in range(3):
        for j, name in enumerate(("colours", "answers")):
            lines = (path / "predictions" / f"after-{after}" / f"{name}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert len(rows) == 6
            right = [r["score"] == 1 for r in rows]
            assert right == [r["prediction"].strip().lower().rstrip(".") == r["references"][0] for r in rows]
            assert results["accuracy"][after][j] == pytest.approx(100 * sum(right) / 6)
    samples = json.loads((path / "samples" / "general.json").read_text())
    assert len(samples) == 6
    assert all((path / s["picture"]).is_file() for s in samples)
    assert (path / "report.html").is_file()


def test_training_moves_the_answers(finished: tuple[Path, dict[str, Any]]) -> None:
    _path, results = finished
    for info in results["tasks_info"]:
        assert info["epochs"][-1]["loss"] < info["epochs"][0]["loss"]
        assert "train_accuracy" not in info["epochs"][0]
    assert results["cost"]["trained_parameters"] > 0


def test_the_same_run_gives_the_same_bits(world, finished, tmp_path: Path) -> None:
    again = run(world, tmp_path / "again")
    assert again["accuracy"] == finished[1]["accuracy"]
    one, two = factors(finished[0]), factors(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_that_is_stopped_and_resumed_gives_the_same_bits(world, finished, tmp_path, monkeypatch) -> None:
    path = tmp_path / "stopped"
    monkeypatch.setenv(STOP_AFTER, "1")
    with pytest.raises(KeyboardInterrupt):
        run(world, path)
    monkeypatch.delenv(STOP_AFTER)
    results = Experiment.resume(path, quiet=True)
    assert results["accuracy"] == finished[1]["accuracy"]
    assert results["components"].keys() == finished[1]["components"].keys()
    one, two = factors(finished[0]), factors(path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_micro_batches_change_nothing_but_memory(world, finished, tmp_path: Path) -> None:
    run(world, tmp_path / "micro", training={"micro_batch": 1})
    one, two = factors(finished[0]), factors(tmp_path / "micro")
    shared = [k for k in one if ":B/" in k]
    assert shared
    for key in shared:
        torch.testing.assert_close(one[key], two[key], rtol=5e-3, atol=1e-5)


def test_the_vision_cache_changes_nothing_but_time(world, finished, tmp_path: Path) -> None:
    results = run(world, tmp_path / "slow", training={"cache_vision": False})
    for one, two in zip(results["tasks_info"], finished[1]["tasks_info"], strict=True):
        for a, b in zip(one["epochs"], two["epochs"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_checkpointing_changes_nothing_but_memory(world, finished, tmp_path: Path) -> None:
    results = run(world, tmp_path / "checkpointed", training={"gradient_checkpointing": True})
    for one, two in zip(results["tasks_info"], finished[1]["tasks_info"], strict=True):
        for a, b in zip(one["epochs"], two["epochs"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize("state", ["protected", "frozen", "free"])
def test_the_projector_is_protected_frozen_or_free(world, tmp_path: Path, state: str) -> None:
    config = copy.deepcopy(world)
    config["tuner"]["parts"] = {"projector": state}
    experiment = Experiment({**config, "output": str(tmp_path / "run")}, quiet=True)
    family = experiment.setup.family
    prefix = family.towers["projector"] + "."
    before = {n: p.detach().clone() for n, p in family.model.named_parameters() if n.startswith(prefix)}
    assert before
    learner_targets = experiment.setup.tuner_config()
    assert any(n.startswith(prefix) for n in learner_targets.target_modules) == (state == "protected")
    experiment.run()
    moved = [n for n, p in family.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert bool(moved) == (state != "frozen")
    reopened = TrainedModel(tmp_path / "run", device="cpu")
    for name, parameter in reopened.family.model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, dict(family.model.named_parameters())[name], rtol=0, atol=1e-6)


def test_the_vision_tower_learns_when_asked_to(world, tmp_path: Path) -> None:
    results = run(world, tmp_path / "run", tuner={**world["tuner"], "parts": {"vision": "protected"}})
    assert any("vision" in str(layer) for layer in results["layers"])


def test_a_method_that_moves_nothing_repeats_its_answers(world, tmp_path: Path) -> None:
    results = run(world, tmp_path / "run", method="zero-shot")
    assert results["accuracy"][0] == results["accuracy"][2]
    first, last = (tmp_path / "run" / "predictions" / f"after-{i}" / "colours.jsonl" for i in (0, 2))
    assert first.read_text() == last.read_text()


def test_the_trained_model_answers_as_the_run_did(finished: tuple[Path, dict[str, Any]]) -> None:
    path, _ = finished
    model = TrainedModel(path, device="cpu")
    rows = [json.loads(line) for line in (path / "predictions/after-2/colours.jsonl").read_text().splitlines()]
    samples = {s["key"]: s for s in json.loads((path / "samples" / "colours.json").read_text())}
    root = Path(model.config.base_dir)
    for row in rows[:3]:
        number = samples[row["key"]]["key"].rsplit("-", 1)[-1].removesuffix(".png")
        picture = Image.open(root / "colours" / "pictures" / f"test-{number}.png")
        assert model.answer([picture], row["question"], max_new_tokens=4).strip() == row["prediction"].strip()


def test_models_and_data_of_two_kinds_are_refused(world, tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = Path(world["base_dir"], "classes", name)
        folder.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 99 if name == "a" else 0)).save(folder / f"{i}.png")
    with pytest.raises(ConfigError, match="'pets' names pictures"):
        run(world, tmp_path / "a", tasks=[{"name": "pets", "source": "folder", "path": "classes"}], probes=[])
    with pytest.raises(ConfigError, match="lwf"):
        run(world, tmp_path / "b", method="lwf")
    with pytest.raises(ConfigError, match="candidates"):
        run(world, tmp_path / "c", candidates="seen")
    with pytest.raises((ConfigError, KeepLoraError), match="exakt"):
        run(world, tmp_path / "d", tasks=[{**world["tasks"][0], "scorer": "exakt"}])
    assert not list(tmp_path.iterdir())


def test_a_joint_run_trains_on_all_tasks_at_once(world, tmp_path: Path) -> None:
    results = run(world, tmp_path / "run", method="joint")
    assert results["accuracy"][1] == [None, None]
    assert all(value is not None for value in results["accuracy"][2])


def test_statistics_weigh_tokens_by_their_kind(world, tmp_path: Path) -> None:
    plain = prepare(Experiment({**world, "output": str(tmp_path)}, quiet=True).config)
    weighted = copy.deepcopy(world)
    weighted["tuner"]["token_weights"] = {"image": 0.0, "text": 0.5}
    other = prepare(Experiment({**weighted, "output": str(tmp_path)}, quiet=True).config)
    for setup, image, text in ((plain, 1.0, 1.0), (other, 0.0, 0.5)):
        task = setup.tasks[0]
        objective = setup.kind.objective(task)
        batch, _ = setup.kind.first_batch(objective, setup.sets[task.name].train, setup.config.training)
        mask = objective.masks(batch)[setup.family.towers["language"]].float()
        kinds = batch["token_kinds"]
        for kind, weight in ((0, 0.0), (1, text), (2, image), (3, 1.0)):
            assert (mask[kinds == kind] == weight).all()
