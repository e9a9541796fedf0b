"""ε_b: a task's own update is kept off the leading directions that its features had before it."""

from __future__ import annotations

import pytest
import torch

import keeplora.tuner.statistics as statistics
from keeplora import ContinualLearner
from keeplora.errors import CapacityError, ConfigError
from keeplora.methods import get_method
from keeplora.tuner.passes import collect_features
from tests.tuner.blocks import config, loader, loss_fn, make_net, make_towers, train


def features(learner: ContinualLearner, seed: int):
    return collect_features(learner.model, learner.targets, learner.store, loader(24, seed=seed), lambda m, b: m(b[0]))


def moved(learner: ContinualLearner, seed: int) -> dict[str, tuple[float, float]]:
    """Per target of a task that is learned now: Σ ‖sBAx‖² over its own inputs before it, and s²‖B‖₂² tr C."""
    before = features(learner, seed)
    with learner.task(f"task {seed}", loader(24, seed=seed), loss_fn) as model:
        train(model, loader(24, seed=seed), steps=4)
    found = {}
    for t in learner.targets:
        factors = learner.records[-1].factors[t.name]
        C = before.C(t.name).float()
        sBA = t.s * factors.B @ factors.A
        bound = float((t.s * torch.linalg.matrix_norm(factors.B, 2)) ** 2 * C.diagonal().sum())
        found[t.name] = float((sBA @ C @ sBA.T).diagonal().sum()), bound
    return found


@pytest.mark.parametrize("sketch", [None, 4])
def test_a_tasks_own_update_is_bounded_by_what_was_left_open(sketch):
    learner = ContinualLearner(make_net(), config(energy_before=0.9, covariance_sketch=sketch))
    for seed in (0, 1):
        for name, (found, bound) in moved(learner, seed).items():
            assert found <= (1 - 0.9) * bound * 1.001 + 1e-9, name
    # The bound is one that the method alone does not give.
    plain = moved(ContinualLearner(make_net(), config()), 0)
    assert any(found > (1 - 0.9) * bound for found, bound in plain.values())


def test_zero_is_the_method_itself_and_takes_no_pass(monkeypatch):
    calls = []
    real = statistics.task_features
    monkeypatch.setattr(statistics, "task_features", lambda *args, **more: calls.append(more) or real(*args, **more))
    learners = [
        ContinualLearner(make_net(), config(**more)) for more in ({}, {"energy_before": 0}, {"energy_before": 0.5})
    ]
    for learner in learners:
        learner.start_task("one", loader(24), loss_fn)
    a, b, c = (learner._open.adapter.A0 for learner in learners)
    assert calls == [{"field": "energy_before"}]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(a[name].shape != c[name].shape or not torch.allclose(a[name], c[name]) for name in a)


def test_only_the_tower_that_is_named():
    shares = {"vision": 0.9, "default": 0.0}
    plain, learner = (ContinualLearner(make_towers(), config(energy_before=e)) for e in (0.0, shares))
    for one in (plain, learner):
        one.start_task("one", loader(24), loss_fn)
    for t in learner.targets:
        same = torch.equal(plain._open.adapter.A0[t.name], learner._open.adapter.A0[t.name])
        assert same == t.name.startswith("text_model")


def test_goes_on_from_a_saved_state_without_a_pass(monkeypatch, tmp_path):
    learner = ContinualLearner(make_net(), config(energy_before=0.8))
    learner.start_task("one", loader(24), loss_fn)
    saved = learner.task_state()
    again = ContinualLearner(make_net(), config(energy_before=0.8))
    monkeypatch.setattr(statistics, "task_features", None)
    again.start_task("one", loader(24), loss_fn, saved=saved)
    for name, A in learner._open.adapter.A0.items():
        assert torch.equal(A, again._open.adapter.A0[name])


def test_the_ledger_keeps_the_setting_and_an_older_one_opens_without_it(tmp_path):
    learner = ContinualLearner(make_net(), config(energy_before=0.8))
    with learner.task("one", loader(24), loss_fn) as model:
        train(model, loader(24), steps=1)
    path = learner.save_pretrained(tmp_path / "saved")
    assert ContinualLearner.from_pretrained(path, make_net()).config.energy_before == 0.8
    assert config().energy_before == 0


def test_with_passes_that_may_end_early():
    learner = ContinualLearner(make_net(), config(energy_before=0.8, statistics_tolerance=0.5))
    learner.start_task("one", loader(24), loss_fn)
    assert set(learner._open.info["statistics"]) == {"gradient", "features before"}


def test_refused_where_a_comes_from_elsewhere_or_is_taken_again():
    with pytest.raises(ConfigError, match="energy_before is for the methods whose A comes from the residual gradient"):
        get_method("lora").learner(make_net(), config(energy_before=0.5))
    with pytest.raises(ConfigError, match="turn one of them off"):
        config(energy_before={"default": 0.5}, refresh_factor=True)


def test_nothing_left_is_said_with_the_remedy():
    learner = ContinualLearner(make_net(), config(energy_before=1.0))
    with pytest.raises(CapacityError, match="lower energy_features, energy_weights or energy_before"):
        learner.start_task("one", loader(24), loss_fn)
    with pytest.raises(ConfigError, match="energy_before must lie between 0 and 1"):
        config(energy_before=1.5)
