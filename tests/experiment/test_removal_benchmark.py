"""benchmarks/removal.py in miniature: its numbers are those of the runs."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import removal
from keeplora.experiment import TrainedModel
from keeplora.tuner import Ledger
from tests.cli.tiny_world import results_of


def test_what_removal_does_not_undo_is_measured(world, tmp_path, capsys):
    values = world.config()
    rows = [removal.measure(values, {"training.epochs": 1}, seed, None, tmp_path) for seed in (0, 1)]
    text = removal.report(rows)
    first = rows[0]
    assert (first["removed"], first["tasks"], first["later"]) == ("stripes", ["paint", "dots"], ["dots"])
    whole, never = results_of(tmp_path / "whole-seed0"), results_of(tmp_path / "never-seed0")
    assert whole["tasks"] == ["paint", "stripes", "dots"]
    assert never["tasks"] == ["paint", "dots"]
    assert first["whole"]["dots"] == whole["accuracy"][3][2]
    assert first["never"]["grey"] == never["probe_accuracy"][2][0]
    assert first["before"] == whole["accuracy"][0][1]
    # The run itself is as it was: the task was taken out of a copy in memory.
    assert len(Ledger.open(tmp_path / "whole-seed0/ledger").entries()) == 3
    learner = TrainedModel(tmp_path / "whole-seed0", device="cpu").learner
    other = TrainedModel(tmp_path / "never-seed0", device="cpu").learner
    a, b = (next(r for r in one.records if r.name == "dots").deltas for one in (learner, other))
    zero = torch.zeros(())
    apart = sum(float((a.get(n, zero) - b.get(n, zero)).square().sum()) for n in {*a, *b}) ** 0.5
    assert first["distance"]["dots"] == pytest.approx(apart / sum(float(d.square().sum()) for d in b.values()) ** 0.5)
    assert first["chance_distance"]["dots"] > 0
    # The first task was learned before the removed one came, so it is untouched by it, and its record is the same.
    paint = [next(r for r in one.records if r.name == "paint") for one in (learner, other)]
    assert removal.distance(*paint) == 0
    assert "| mean of the other tasks |" in text
    assert "| dots |" in text
    assert "`stripes` itself" in text
    assert json.loads(json.dumps(rows)) == rows
    capsys.readouterr()
