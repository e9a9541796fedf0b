"""ε_g: what a task's update may do to the features of samples that belong to no task."""

from __future__ import annotations

import pytest
import torch

import keeplora.tuner.statistics as statistics
from keeplora import ContinualLearner
from keeplora.errors import CapacityError, ConfigError
from keeplora.methods import get_method
from keeplora.tuner.passes import collect_features
from tests.tuner.blocks import config, loader, loss_fn, make_net, make_towers, train

GENERAL = 77
"""The seed of samples that no task has."""


def start(learner: ContinualLearner, seed: int = 0, **more):
    given = {"general_batches": loader(24, seed=GENERAL), "forward_fn": lambda m, b: m(b[0]), **more}
    return learner.start_task(f"task {seed}", loader(24, seed=seed), loss_fn, **given)


def moved(learner: ContinualLearner, seed: int) -> dict[str, tuple[float, float]]:
    """Per target of a task that is learned now: Σ ‖sBAx‖² over the general samples before it, and s²‖B‖₂² tr C_g."""
    general = collect_features(
        learner.model, learner.targets, learner.store, loader(24, seed=GENERAL), lambda m, b: m(b[0])
    )
    train(start(learner, seed), loader(24, seed=seed), steps=4)
    learner.finish_task()
    found = {}
    for t in learner.targets:
        factors = learner.records[-1].factors[t.name]
        C = general.C(t.name).float()
        sBA = t.s * factors.B @ factors.A
        bound = float((t.s * torch.linalg.matrix_norm(factors.B, 2)) ** 2 * C.diagonal().sum())
        found[t.name] = float((sBA @ C @ sBA.T).diagonal().sum()), bound
    return found


@pytest.mark.parametrize("sketch", [None, 4])
def test_what_an_update_does_to_general_samples_is_bounded(sketch):
    learner = ContinualLearner(make_net(), config(energy_general=0.9, covariance_sketch=sketch))
    for seed in (0, 1):
        for name, (found, bound) in moved(learner, seed).items():
            assert found <= (1 - 0.9) * bound * 1.001 + 1e-9, name
    # The bound is one that the method alone does not give.
    plain = moved(ContinualLearner(make_net(), config()), 0)
    assert any(found > (1 - 0.9) * bound for found, bound in plain.values())


def test_zero_is_the_method_itself_and_takes_no_pass(monkeypatch):
    calls = []
    real = statistics.collect_features
    monkeypatch.setattr(statistics, "collect_features", lambda *args, **more: calls.append(more) or real(*args, **more))
    learners = [
        ContinualLearner(make_net(), config(**more)) for more in ({}, {"energy_general": 0}, {"energy_general": 0.5})
    ]
    for learner in learners:
        start(learner)
    a, b, c = (learner._open.adapter.A0 for learner in learners)
    assert len(calls) == 1
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(a[name].shape != c[name].shape or not torch.allclose(a[name], c[name]) for name in a)


def factors_of_towers(**more):
    plain, learner = (ContinualLearner(make_towers(), config(energy_general=e)) for e in (0.0, more.pop("energy")))
    for one in (plain, learner):
        start(one, **more)
    a, b = plain._open.adapter.A0, learner._open.adapter.A0
    return {name for name in a if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}


def test_only_the_tower_that_is_named():
    same = factors_of_towers(energy={"vision": 0.9, "default": 0.0})
    assert same
    assert all(name.startswith("text_model") for name in same)


def test_a_tower_that_general_samples_do_not_reach_is_left_to_u():
    same = factors_of_towers(energy=0.9, forward_fn=lambda m, b: m.vision_model(b[0]))
    # The feature pass of the task comes after the training, so that forward_fn may feed one tower here.
    assert same
    assert all(name.startswith("text_model") for name in same)


def test_nothing_is_carried_on_but_through_a():
    learners = [ContinualLearner(make_net(), config(energy_general=e)) for e in (0.0, 0.9)]
    for learner in learners:
        start(learner)
        learner.finish_task()  # B is zero: both models are still the untouched one
    a, b = (learner.U for learner in learners)
    assert all(torch.equal(a[t.name], b[t.name]) for t in learners[0].targets)


def test_goes_on_from_a_saved_state_without_a_pass(monkeypatch):
    learner = ContinualLearner(make_net(), config(energy_general=0.8))
    start(learner)
    saved = learner.task_state()
    again = ContinualLearner(make_net(), config(energy_general=0.8))
    monkeypatch.setattr(statistics, "collect_features", None)
    start(again, saved=saved)
    for name, A in learner._open.adapter.A0.items():
        assert torch.equal(A, again._open.adapter.A0[name])


def test_the_ledger_keeps_the_setting(tmp_path):
    learner = ContinualLearner(make_net(), config(energy_general=0.8))
    start(learner)
    learner.finish_task()
    path = learner.save_pretrained(tmp_path / "saved")
    assert ContinualLearner.from_pretrained(path, make_net()).config.energy_general == 0.8
    assert config().energy_general == 0


def test_refused_without_samples_and_where_a_comes_from_elsewhere():
    learner = ContinualLearner(make_net(), config(energy_general=0.8))
    with pytest.raises(ConfigError, match=r"'task 0': energy_general keeps .* give start_task general_batches"):
        start(learner, general_batches=None)
    with pytest.raises(ConfigError, match="energy_general is for the methods whose A comes from the residual gradient"):
        get_method("lora").learner(make_net(), config(energy_general={"default": 0.5}))
    get_method("lora").learner(make_net(), config(energy_general={"default": 0.0}))


def test_nothing_left_is_said_with_the_remedy():
    learner = ContinualLearner(make_net(), config(energy_general=1.0))
    with pytest.raises(CapacityError, match="lower energy_features, energy_weights or energy_general"):
        start(learner, general_batches=loader(24, seed=0))  # the task's own: nothing of its gradient is left
    with pytest.raises(ConfigError, match="energy_general must lie between 0 and 1"):
        config(energy_general=1.5)
