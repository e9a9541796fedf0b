"""Runs whose updates are kept off the features of drawn pictures (`energy_general`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keeplora.errors import ConfigError, LedgerError
from keeplora.experiment import Experiment
from keeplora.experiment.config import load_config
from keeplora.experiment.pictures import Collate, DrawnPictures, loader
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import prepare
from keeplora.models import load_model
from keeplora.retired import TUNER
from keeplora.tuner import ContinualLearner
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.passes import collect_features
from keeplora.tuner.persistence import ledger_config
from tests.experiment.generation_world import make_world
from tests.models import tiny


def energy_of(path: Any, family: Any) -> dict[str, float]:
    """Per target of the picture tower: the share of the drawn pictures' feature energy, in the untouched model, that the first
    task's A reads."""
    learner = ContinualLearner.from_pretrained(path / "ledger", family.model)
    first = learner.records[0].factors
    learner.rollback(to=0)
    targets = [t for t in learner.targets if t.tower.startswith("vision")]
    drawn = loader(DrawnPictures(family), 64, Collate())
    C = collect_features(
        learner.model, targets, learner.store, drawn, lambda model, batch: family.image_features(batch["pixel_values"])
    ).C
    found = {}
    for t in targets:
        if t.name in first:
            A = first[t.name].A.double()
            found[t.name] = float((A @ C(t.name) @ A.T).diagonal().sum() / C(t.name).diagonal().sum())
    return found


def test_the_first_tasks_update_hardly_reads_drawn_pictures(world: Any) -> None:
    shares = {}
    for energy in (0.0, 0.97):
        path, results = world.run(tuner={"energy_general": energy, "energy_weights": 0.3}, probes=[])
        assert results["metrics"]["last"] is not None
        shares[energy] = energy_of(path, load_model(world.model))
    assert shares[0.97]
    assert max(shares[0.97].values()) <= 0.03 + 1e-6
    assert max(shares[0.0].values()) > 0.1


@pytest.mark.parametrize("family", ["clip", "siglip2", "vision-text", "xclip"])
def test_drawn_pictures_are_what_the_family_reads(family: str, tmp_path: Any) -> None:
    model = load_model(tiny.make_tiny(family, tmp_path / family))
    items = DrawnPictures(model)
    batch = Collate()([items[0], items[255]])
    features = model.image_features(batch["pixel_values"])
    assert torch.isfinite(features).all()
    assert features.shape[0] == 2
    assert model.is_clip(batch["pixel_values"]) == (family == "xclip")
    assert len(items) == 256


def test_refused_for_models_that_write_answers(tmp_path: Any) -> None:
    values = make_world(tmp_path)
    values["tuner"] = {**values.get("tuner", {}), "energy_general": {"language": 0.9, "default": 0.0}}
    with pytest.raises(ConfigError, match=r"energy_general keeps tasks off .* writes answers: leave it out"):
        prepare(Experiment(values, quiet=True).config)


def test_a_saved_run_with_a_setting_that_is_gone_opens_where_it_changed_nothing(world: Any, tmp_path: Any) -> None:
    run = world.copied(world.run()[0], tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  energy_general: 0.0\n", "  energy_before: 0.0\n"))
    assert "energy_before" in config.read_text()
    assert load_config(RunDirectory(run).read_config()).tuner.energy_general == 0.0
    ledger = Ledger.open(run / "ledger")
    ledger.head["config"] |= TUNER
    assert ledger_config(ledger).energy_general == 0.0
    ledger.head["config"]["energy_before"] = 0.5
    with pytest.raises(LedgerError, match="energy_before"):
        ledger_config(ledger)
