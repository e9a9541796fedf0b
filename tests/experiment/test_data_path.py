"""Pictures on their way to the model: kept within a bound whoever decodes them, waited for, and told."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from keeplora.data import load_task
from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment.order import ShuffledBatches
from keeplora.experiment.pictures import Collate, PictureTensors, TaskBatches, TensorCache, loader, shuffled_loader
from keeplora.experiment.training_state import LoopState, Sums, TrainingLog
from keeplora.models import load_model
from keeplora.models.dual_encoder import DualEncoder
from tests.cli.tiny_world import World, events_of, ledger_tensors, record_of, results_of, same_tensors

EACH = 3 * 32 * 32 * 4
"""Bytes of a picture as a tensor."""


@pytest.fixture(scope="module")
def family(world: World) -> Any:
    return load_model(world.model)


@pytest.fixture
def pictures(world: World) -> Any:
    return load_task({"name": "paint", "source": "folder", "path": "paint"}, world.root).train  # type: ignore[union-attr]


def batches_of(data: PictureTensors, workers: int) -> TaskBatches:
    order = ShuffledBatches(len(data), 8, seed=1)
    return TaskBatches(data, order, shuffled_loader(data, order, Collate(), workers=workers), lambda part, size: [part])


def epochs(batches: TaskBatches, count: int) -> list[tuple[list[int], Tensor]]:
    return [(b["index"].tolist(), b["pixel_values"].clone()) for _ in range(count) for b in batches]


def test_what_workers_decode_is_kept_and_then_no_worker_is_needed(
    family: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = epochs(batches_of(PictureTensors(pictures, family, TensorCache()), 0), 3)
    cache = TensorCache()
    data = PictureTensors(pictures, family, cache)
    batches = batches_of(data, 2)
    found = epochs(batches, 1)
    assert data.kept
    assert cache.left == (2 << 30) - len(data) * EACH

    def decoded(self: DualEncoder, picture: Any) -> Tensor:
        raise AssertionError("a picture is decoded again")

    monkeypatch.setattr(DualEncoder, "preprocess", decoded)
    found += epochs(batches, 2)
    for (indices, pixels), (order, values) in zip(found, wanted, strict=True):
        assert indices == order
        assert torch.equal(pixels, values)


def test_the_bound_holds_with_workers_and_the_rest_is_decoded_again(family: Any, pictures: Any) -> None:
    wanted = epochs(batches_of(PictureTensors(pictures, family, None), 0), 2)
    cache = TensorCache(5 * EACH)
    data = PictureTensors(pictures, family, cache)
    found = epochs(batches_of(data, 1), 2)
    assert (len(data._kept), cache.left, cache.full) == (5, 0, True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(found, wanted, strict=True))


def test_a_worker_keeps_no_picture_for_itself(family: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache()
    data = PictureTensors(pictures, family, cache)
    monkeypatch.setattr("keeplora.experiment.pictures.get_worker_info", lambda: object())
    data[0]
    assert cache.left == 2 << 30


def test_a_loader_of_what_is_in_memory_has_no_workers(family: Any, pictures: Any) -> None:
    data = PictureTensors(pictures, family, TensorCache())
    assert loader(data, 8, Collate(), workers=2).num_workers == 2
    for i in range(len(data)):
        data[i]
    assert loader(data, 8, Collate(), workers=2).num_workers == 0


def test_workers_change_no_bit_of_what_is_learned(world: World, tmp_path: Any) -> None:
    runs = []
    for workers in (0, 1):
        path = tmp_path / str(workers)
        Experiment(
            world.config(first_tasks=1, probes=[], training={"workers": workers}, output=str(path)), quiet=True
        ).run()
        runs.append(ledger_tensors(path))
    assert same_tensors(*runs)


# ---- the share of time spent waiting -----------------------------------------------------------------------------------


def test_waiting_for_data_is_told_wherever_a_task_is_told_of(
    world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = TaskBatches.__iter__

    def slow(self: TaskBatches) -> Any:
        for batch in inner(self):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(TaskBatches, "__iter__", slow)
    path = tmp_path / "run"
    Experiment(world.config(first_tasks=1, probes=[], output=str(path)), quiet=True).run()
    told = events_of(path, "epoch")
    for event in told:
        slept = 4 * 0.2  # 30 pictures, 8 at a time
        assert slept / event["seconds"] - 1e-3 <= event["data_wait"] <= 1  # both are rounded
    info = results_of(path)["tasks_info"][0]
    seconds = [e["seconds"] for e in told]
    mean = sum(e["data_wait"] * s for e, s in zip(told, seconds, strict=True)) / sum(seconds)
    assert info["data_wait"] == record_of(path, 1)["info"]["data_wait"] == pytest.approx(mean, abs=1e-3)
    assert f"data wait {100 * told[0]['data_wait']:.0f} %" in capsys.readouterr().err
    page = (path / "report.html").read_text()
    assert "waited for data" in page
    assert f"{100 * info['data_wait']:.0f} %" in page


def test_without_a_wait_the_share_is_small(world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = runner_module.train_task.__globals__["_Loop"]._step

    def slow(self: Any, batch: Any) -> None:
        time.sleep(0.1)
        step(self, batch)

    monkeypatch.setattr(runner_module.train_task.__globals__["_Loop"], "_step", slow)
    path = tmp_path / "run"
    Experiment(world.config(first_tasks=1, probes=[], output=str(path)), quiet=True).run()
    assert events_of(path, "epoch")[-1]["data_wait"] < 0.5


def test_logs_and_checkpoints_of_before_are_read() -> None:
    log = TrainingLog(epochs=[{"epoch": 1, "loss": 0.5, "seconds": 2.0}])
    assert log.data_wait is None
    assert TrainingLog().data_wait is None
    values = LoopState(sums=Sums(seconds=2.0, waited=1.0), log=log).values()
    assert LoopState.from_values(values, None).sums.data_wait == 0.5
    del values["sums"]["waited"]
    assert LoopState.from_values(values, None).sums.data_wait == 0.0
    assert Sums().data_wait == 0.0


# ---- evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["keeplora++", "oracle"])
def test_class_features_are_computed_once_for_a_row_of_scores(
    world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if method == "oracle":  # one model for each task: what one says of a class is not what another says
        changes: dict[str, Any] = {"candidates": "own"}
    else:
        changes = {"candidates": "all"}
    setup = Experiment(world.config(method=method, probes=[], **changes), quiet=True).setup
    learner = setup.method.learner(setup.family.model, setup.tuner_config())
    texts: list[int] = []
    text_features = DualEncoder.text_features

    def counted(family: DualEncoder, batch: Any) -> Tensor:
        texts.append(len(batch["input_ids"]))
        return text_features(family, batch)

    monkeypatch.setattr(DualEncoder, "text_features", counted)
    with setup.kind.evaluation(learner):
        for _ in range(2):
            for task in setup.tasks:
                setup.kind.score(task, setup.sets[task.name].test, learner)
    once = sum(len(task.classes) * len(task.templates) for task in setup.tasks)
    assert sum(texts) == (once if method == "keeplora++" else 2 * once)
    assert setup.family._cache is None
