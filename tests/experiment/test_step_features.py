"""A training step computes no tower twice in which nothing trains, holds prompts within a bound, and learns the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keeplora.experiment import Experiment, step_features
from keeplora.experiment import runner as runner_module
from keeplora.experiment.device import Precision
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.step_features import StepFeatures
from keeplora.models import load_model
from keeplora.models.dual_encoder import DualEncoder
from tests.cli.tiny_world import World, ledger_tensors, results_of, same_tensors
from tests.experiment.deaths import dies
from tests.experiment.test_resuming import PAINT, assert_same, settings

VISION = {"tuner": {"target_modules": ["vision_model.encoder.layers.1.self_attn.q_proj"]}}
TEXT = {"tuner": {"target_modules": ["text_model.encoder.layers.1.self_attn.v_proj"]}}


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "render_report", lambda path: None)


class Counted:
    """Rows of pictures and prompts that go through the towers while a task trains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = self.prompts = 0
        self.training = False
        of = {"image_features": DualEncoder.image_features, "text_features": DualEncoder.text_features}

        def image_features(family: DualEncoder, pixel_values: Tensor) -> Tensor:
            self.pictures += self.training * len(pixel_values)
            return of["image_features"](family, pixel_values)

        def text_features(family: DualEncoder, batch: Any) -> Tensor:
            self.prompts += self.training * len(batch["input_ids"])
            return of["text_features"](family, batch)

        inner = runner_module.train_task

        def train_task(*args: Any, **kwargs: Any) -> Any:
            self.training = True
            try:
                return inner(*args, **kwargs)
            finally:
                self.training = False

        monkeypatch.setattr(DualEncoder, "image_features", image_features)
        monkeypatch.setattr(DualEncoder, "text_features", text_features)
        monkeypatch.setattr(runner_module, "train_task", train_task)


def test_prompts_go_once_through_a_text_tower_that_does_not_train(
    world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    Experiment(world.config(**settings("keeplora++", **VISION), output=str(tmp_path / "reused")), quiet=True).run()
    assert (counted.prompts, counted.pictures) == (3 + 2, 2 * (30 + 20))  # classes of the two tasks; two epochs
    monkeypatch.setattr(step_features, "_all_in", lambda names, tower: False)
    Experiment(world.config(**settings("keeplora++", **VISION), output=str(tmp_path / "again")), quiet=True).run()
    assert same_tensors(ledger_tensors(tmp_path / "reused"), ledger_tensors(tmp_path / "again"))


def test_pictures_go_once_through_a_picture_tower_that_does_not_train(
    world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    Experiment(world.config(**settings("keeplora++", **TEXT), output=str(tmp_path / "reused")), quiet=True).run()
    trials = 2 * (8 + 4)  # of each task: eight pictures, and four, once more than they need to
    assert 30 + 20 <= counted.pictures <= 30 + 20 + trials
    assert counted.prompts == 8 * 3 + 6 * 2  # in every step
    monkeypatch.setattr(step_features, "_all_in", lambda names, tower: False)
    Experiment(world.config(**settings("keeplora++", **TEXT), output=str(tmp_path / "again")), quiet=True).run()
    one, other = (ledger_tensors(tmp_path / name) for name in ("reused", "again"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-5)
    assert results_of(tmp_path / "reused")["accuracy"] == results_of(tmp_path / "again")["accuracy"]


@pytest.mark.parametrize(
    "changes", [TEXT, VISION, {"training": {"prompt_tokens": 12}}], ids=["text", "vision", "bound"]
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_disturbed(
    world: World, tmp_path: Any, changes: dict[str, Any]
) -> None:
    wanted = settings("keeplora++", **changes)
    straight, _ = world.run(**wanted)
    dies(
        world.config(**wanted), tmp_path / "run", PAINT - 1, "term"
    )  # in the second epoch, with a part of its pictures left
    Experiment.resume(tmp_path / "run", quiet=True)
    assert_same(tmp_path / "run", straight)


@pytest.fixture(scope="module")
def family(world: World) -> Any:
    return load_model(world.model)


def trains(family: Any, *names: str) -> None:
    family.model.requires_grad_(False)
    for name in names:
        family.model.get_parameter(name).requires_grad_(True)


def test_what_is_fixed_is_read_off_what_trains(family: Any) -> None:
    in_text, in_vision, beside = (
        "text_model.encoder.layers.0.mlp.fc1.weight", "vision_model.encoder.layers.0.mlp.fc1.weight",
        "text_projection.weight",
    )  # fmt: skip
    for names, texts, pictures in (
        ([in_text], False, True), ([in_vision], True, False), ([in_text, in_vision], False, False),
        ([beside], False, False), ([], True, True),
    ):  # fmt: skip
        trains(family, *names)
        found = StepFeatures(family, None)
        assert (found.texts_fixed, found.pictures_fixed) == (texts, pictures), names


def test_pictures_that_are_kept_do_not_take_the_gradient_away_from_the_texts(family: Any, world: World) -> None:
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    task: Any = SimpleNamespace(name="t", classes=["red", "green"], templates=["a photo of a {}."])
    objective = TaskObjective(family, task, Precision("fp32", torch.device("cpu")))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = objective.collate([{"pixel_values": p, "labels": i % 2, "index": i} for i, p in enumerate(pixels)])
    trains(family, name)
    found = []
    for training in (False, True, True):
        family.model.zero_grad(set_to_none=True)
        if training:
            with objective.training():
                for _ in range(2):  # the second finds them kept
                    family.model.zero_grad(set_to_none=True)
                    objective.part_loss(batch, 3)[0].backward()
        else:
            objective.part_loss(batch, 3)[0].backward()
        found.append(family.model.get_parameter(name).grad.clone())
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(found[1], found[2])


def test_no_set_of_prompts_is_taken_for_another(family: Any) -> None:
    trains(family, "vision_model.encoder.layers.0.mlp.fc1.weight")
    features = StepFeatures(family, None)
    for words in (["red", "green"], ["green", "red"], ["red", "blue"], ["red", "green"]):
        batch = family.tokenize([f"a photo of a {word}." for word in words])
        with torch.no_grad():
            wanted = family.text_features(batch)
        assert torch.equal(features.texts(batch), wanted)


def test_the_memory_of_prompts_is_bounded(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trains(family)
    monkeypatch.setattr(step_features, "KEPT_SETS", 2)
    features = StepFeatures(family, None)
    for word in ("a", "b", "c", "d"):
        features.texts(family.tokenize([word]))
    assert len(features._texts) == len(features._prompts) == 2
