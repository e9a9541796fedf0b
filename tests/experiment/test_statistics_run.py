"""Runs whose statistics end early or are sketched: pictures end, every prompt counts, and the ledger says what was taken."""

from __future__ import annotations

import pytest
import torch

import keeplora.tuner.convergence as convergence
from keeplora.data import load_task
from keeplora.experiment.device import Precision
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.pictures import Collate, PictureTensors, TensorCache, loader
from keeplora.models import load_model
from keeplora.tuner.convergence import Enough, Moved
from keeplora.tuner.sampling import statistics_batches
from tests.cli.tiny_world import record_of, status_of


def test_pictures_end_early_and_every_prompt_comes(world, monkeypatch):
    monkeypatch.setattr(convergence, "START", 4)
    family = load_model(world.model)
    task = load_task(
        {"name": "paint", "source": "folder", "path": "paint", "templates": ["a {c}.", "the {c}."]}, world.root
    )
    objective = TaskObjective(family, task, Precision("fp32", torch.device("cpu")))
    data = PictureTensors(task.train, family, TensorCache())
    pictures = statistics_batches(loader(data, 4, Collate()), None, 0, data.labels, endable=True)
    for batches in (objective.feature_batches(pictures), objective.feature_batches(pictures).halved()):
        checked, kinds = [], []
        enough = Enough(0.5, lambda estimate, checked=checked, n=None: checked.append(1) or Moved(0.0, "layer", 0.0))
        for batch in batches:
            kinds.append("prompt" if "input_ids" in batch else "picture")
            if enough.reached(batches, len(next(iter(batch.values()))), dict):
                batches.end()
        assert len(checked) == 1
        assert enough.samples == 4 < len(data) == enough.of
        assert kinds[-1] == "prompt"
        assert kinds.count("picture") == (1 if batches._pictures is pictures else 2)


def test_a_run_with_a_tolerance(world, monkeypatch):
    monkeypatch.setattr(convergence, "START", 4)
    path, results = world.run(tuner={"statistics_tolerance": 0.9}, training={"eval_batch_size": 4, "batch_size": 4})
    assert status_of(path)["state"] == "finished"
    for i in (1, 2, 3):
        told = record_of(path, i)["info"]["statistics"]
        for what in ("gradient", "features"):
            assert 4 <= told[what]["samples"] <= told[what]["of"]
    assert any(record_of(path, i)["info"]["statistics"]["features"]["change"] < 0.9 for i in (1, 2, 3))
    assert results["audit"]["factor_leak_max"] <= 1e-5


@pytest.mark.parametrize("method", ["keeplora++", "inflora"])
def test_a_run_with_sketches(world, method):
    path, results = world.run(method=method, tuner={"covariance_sketch": 4})
    told = record_of(path, 1)["info"]["covariance_sketch"]
    assert told["rows"] == 4
    assert told["error"]
    assert status_of(path)["state"] == "finished"
    if results["audit"]:
        assert results["audit"]["factor_leak_max"] <= 1e-5
