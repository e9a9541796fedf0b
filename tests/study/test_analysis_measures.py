"""What the points of an analysis are taken from, on the tiny world: all the samples, the memory and the candidates of a run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch

from keeplora.errors import KeepLoraError
from keeplora.experiment import load_config
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import prepare
from keeplora.math import new_gradient_directions
from keeplora.study.analyze import execute
from keeplora.study.analyze.measure import FEATURE_ENERGIES, _opened, spectra, window
from keeplora.study.analyze.plan import AnalysisPlan, Point
from keeplora.study.analyze.store import AnalysisStore
from keeplora.study.analyze.world import World
from keeplora.study.resources import Slots
from keeplora.tuner import ContinualLearner
from keeplora.tuner.basis_cache import weight_subspace
from keeplora.tuner.statistics import task_gradients
from tests.cli.tiny_world import the_world

Opened = Callable[..., World]


@pytest.fixture
def opened(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Opened:
    tiny = the_world(tmp_path_factory)

    def call(seed: int = 0, **changes: Any) -> World:
        return World(AnalysisPlan(load_config(tiny.config(**changes)).resolved(), tmp_path / "a", seed=seed))

    return call


def test_a_share_of_the_samples_is_one_of_each_tasks_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = the_world(tmp_path_factory).config(tuner={"gradient_samples": 0.5, "feature_samples": 7})
    setup = prepare(load_config(config))
    task = setup.tasks[0]
    assert setup.tuner_config(task).gradient_samples == len(task.train) // 2
    # Without a task there is nothing that it could be half of; it was one sample once.
    assert setup.tuner_config().gradient_samples is None
    assert setup.tuner_config().feature_samples == 7


def test_a_run_of_an_older_keeplora_is_looked_at_whole(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger says one sample, where a share was asked for."""
    run, _ = the_world(tmp_path_factory).run(tuner={"gradient_samples": 0.5})
    real = ContinualLearner.from_pretrained

    def older(*args: Any, **more: Any) -> ContinualLearner:
        learner = real(*args, **more)
        assert learner.config.gradient_samples is None  # what is written today
        learner.config = replace(learner.config, gradient_samples=1)
        return learner

    monkeypatch.setattr(ContinualLearner, "from_pretrained", older)
    world = World(AnalysisPlan(RunDirectory(run).read_config(), tmp_path / "a", run=run))
    assert world.learner.config.gradient_samples is None
    assert world.identity()["revised"] == ["gradient_samples"]


def test_gradients_of_an_analysis_are_of_all_its_samples(opened: Opened) -> None:
    share, whole = (spectra(opened(tuner=values)) for values in ({"gradient_samples": 0.25}, {}))
    assert share["rows"] == whole["rows"]


def test_where_gradients_are_remembered_they_are_what_grows(opened: Opened) -> None:
    world = opened(tuner={"memory": "gradients", "energy_features": 0.97})
    found = spectra(world)
    assert [one["energy"] for one in found["protected"]] == sorted({*FEATURE_ENERGIES, 0.97})
    one = next(one for one in found["protected"] if one["energy"] == 0.97)
    target = next(t for t in world.targets if t.name == one["layers"][0])
    config = world.setup.tuner_config()
    S = weight_subspace(world.learner.store.W0[target.name], config.for_tower("energy_weights", target.tower))
    for task in world.setup.tasks[:-1]:
        G = task_gradients(world.learner, _opened(world, task))[target.name]
        S = S.extended(new_gradient_directions(S, G.cpu(), 0.97)[0])
    assert one["room"][0] == S.n_in - S.k


def test_a_window_is_judged_among_the_same_candidates_before_and_after(opened: Opened) -> None:
    """With a rate of nothing the model stays as it is, and what the general sets lose is what other candidates cost."""
    world = opened(candidates="seen", training={"learning_rate": 1e-12, "epochs": 1})
    found = window(world, task=1, window=0)
    assert found["general_after"] == found["general_before"]
    assert found["general_before"] != world.scores(world.general)  # without the task's classes it is another question


def test_scoring_before_leaves_the_training_as_it_is(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    first = window(opened(), task=1, window=0)
    real = World.scores

    def drawing(self: World, *args: Any, **more: Any) -> Any:
        torch.rand(3)  # as a loader of samples does
        return real(self, *args, **more)

    monkeypatch.setattr(World, "scores", drawing)
    assert window(opened(), task=1, window=0) == first


def test_what_earlier_numbers_meant_otherwise_is_another_analysis(opened: Opened, tmp_path: Path) -> None:
    assert "revised" not in opened().identity()
    assert opened(tuner={"feature_samples": 0.5}, candidates="seen").identity()["revised"] == [
        "feature_samples",
        "candidates",
    ]
    now = opened(tuner={"memory": "gradients"}).identity()
    assert now["revised"] == ["memory"]
    before = {key: value for key, value in now.items() if key != "revised"}
    with AnalysisStore(tmp_path / "older").writing(before):
        pass
    with pytest.raises(KeepLoraError, match="by another keeplora, for which memory meant something else"):
        AnalysisStore(tmp_path / "older").check(now)


def test_how_general_sets_are_judged_is_part_of_the_analysis(opened: Opened, tmp_path_factory: Any) -> None:
    probe = {**the_world(tmp_path_factory).config()["probes"][0], "templates": ["a {} thing"]}
    assert opened(probes=[probe]).identity()["general_sets"] != opened().identity()["general_sets"]


def test_each_process_gets_a_gpu_of_its_own_and_ends_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a GPU and without processes: what the pool is given, and what a worker makes of it."""
    pools: list[dict[str, Any]] = []

    class Pool:
        def __init__(self, jobs: int, **given: Any) -> None:
            pools.append(given)

        def submit(self, function: Any, point: Point) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result((point, {}, 1.0))
            return future

        def shutdown(self, **how: Any) -> None:
            pass

    mine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    mine.start()
    monkeypatch.setattr(execute, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(execute, "slots", lambda *_, **__: Slots(3, 1, ("4", "7")))
    plan = AnalysisPlan({}, tmp_path)
    assert len(list(execute._in_processes(plan, [Point("intra", {"share": i}) for i in range(3)], 3))) == 3
    assert mine.is_alive()  # the caller's own process
    mine.kill()
    monkeypatch.setattr(execute, "World", lambda plan: SimpleNamespace(learner=None, kind=MagicMock()))
    for name in ("signal.signal", "threading.Thread", "torch.set_num_threads"):
        monkeypatch.setattr(name, Mock())
    monkeypatch.setattr(execute, "_world", None)
    seen = []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        execute._open(*pools[0]["initargs"])
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "7", "4"]
