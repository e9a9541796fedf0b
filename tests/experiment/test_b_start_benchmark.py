"""benchmarks/b_start.py in miniature: B starts where it says, at the size it says; downhill where it follows the gradient."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from keeplora.methods import method_names, registry

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "b_start.py"
sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
b_start = importlib.import_module("b_start")
sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    method_names()  # filled at the first call
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def mean_loss(task, model) -> float:
    with torch.no_grad():
        losses = torch.cat([task.loss_fn(model, batch).reshape(-1) for batch in task.batches])
    return float(losses.mean())


@pytest.mark.parametrize("start", b_start.STARTS)
def test_B_starts_where_it_says(world, tmp_path, monkeypatch, start):
    sizes, losses = [], {}

    class Seen(b_start.LEARNERS[start]):
        def _attach(self, task):
            model = super()._attach(task)
            trained = [task.adapter.weights(name)[1] for name in task.adapter.targets]
            sizes.extend(float(B.detach().square().mean().sqrt()) for B in trained)
            kept = [B.detach().clone() for B in trained]
            for factor in (0.0, -0.02, 0.02, 1.0) if not losses else ():
                with torch.no_grad():
                    for B, b in zip(trained, kept, strict=True):
                        B.copy_(factor * b)
                losses[factor] = mean_loss(task, model)
            return model

    monkeypatch.setitem(b_start.LEARNERS, start, Seen)
    results = b_start.run(world.config(training={"epochs": 1}), start, 3.0, 0, tmp_path / "run")
    assert sizes == pytest.approx([3.0 * 0.01] * len(sizes), rel=1e-5)
    assert losses[1.0] != losses[0.0]
    if start == "gradient":
        assert losses[0.02] < losses[0.0] < losses[-0.02]
    seen = len(sizes)
    again = b_start.run(world.config(training={"epochs": 1}), start, 3.0, 0, tmp_path / "run")
    assert again["metrics"] == results["metrics"]
    assert len(sizes) == seen  # the finished run was read
