"""What the learner can prove: leaks, stability bounds, the table of targets, and the gradient memory."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.math import backward_bound
from keeplora.methods import get_method
from keeplora.tuner.audit import layer_rows
from keeplora.tuner.passes import collect_features, collect_gradients
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, make_towers


def two_tasks(**kwargs) -> ContinualLearner:
    learner = ContinualLearner(make_net(), config(**kwargs))
    return learn(learn(learner, "a", 0), "b", 1)


def test_factors_do_not_leak():
    learner = two_tasks()
    audit = learner.audit()
    assert len(audit.rows) == len(learner.targets) * 2
    assert 0 < audit.factor_leak_max <= 1e-5
    assert audit.passed
    assert all(row.weight_leak < 1e-4 for row in audit.rows)  # fp32
    assert json.loads(json.dumps(audit.to_dict()))["factor_leak_max"] == audit.factor_leak_max
    text = str(audit)
    assert all(t.name in text for t in learner.targets)


def test_tampered_factor_shows():
    learner = two_tasks()
    record, name = learner.records[1], "encoder.layers.1.up"
    f = record.factors[name]
    record.factors[name] = dataclasses.replace(f, A=f.A + 0.01 * learner.U[name][:, :1].T)
    audit = learner.audit()
    assert not audit.passed
    assert audit.factor_leak_max > 1e-4
    assert {(r.layer, r.task) for r in audit.rows if r.factor_leak > 1e-5} == {(name, "b")}


def test_each_task_is_audited_against_what_was_protected_when_it_began():
    learner = two_tasks()
    name = "encoder.layers.1.up"
    k = learner.start_bases()[name].shape[1]
    grown = learner.records[0].basis[name]
    assert grown.shape[1] > 0
    f = learner.records[1].factors[name]
    learner.records[1].factors[name] = dataclasses.replace(f, A=f.A + 0.1 * grown[:, :1].T)
    bad = {r.task for r in learner.audit().rows if r.factor_leak > 1e-5}
    assert bad == {"b"}
    assert learner.U[name].shape[1] > k


def test_weights_that_were_changed_by_hand_show():
    learner = two_tasks()
    name = "encoder.layers.0.q"
    with torch.no_grad():
        learner.store.module(name).weight.add_(0.1 * torch.ones(12, 1) @ learner.start_bases()[name][:, :1].T)
    leaks = {row.layer: row.weight_leak for row in learner.audit().rows}
    assert leaks[name] > 1e-2
    assert all(leak < 1e-4 for layer, leak in leaks.items() if layer != name)


def test_bf16_leak_stands_beside_its_rounding_floor():
    net = make_net(dtype=torch.bfloat16)
    cast = lambda m, b: loss_fn(m, (b[0].bfloat16(), b[1]))  # noqa: E731
    learner = ContinualLearner(net, config())
    with learner.task("a", loader(), cast) as model:
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.05)
    audit = learner.audit()
    assert audit.passed  # factors are exact whatever the model's dtype
    for row in audit.rows:
        assert row.weight_floor > 1e-4
        assert row.weight_leak == pytest.approx(row.weight_floor, rel=0.05)


def test_backward_stability_for_the_next_task():
    """Σ_x ‖sBAx‖² over the first task's inputs stays below (1 − ε₁) s² ‖B‖² tr C₁ for the second task's update."""
    learner = two_tasks(keep_covariance=True, energy_features=0.9)
    first, second = learner.records
    checked = 0
    for name, f in second.factors.items():
        C, delta = first.covariance[name].double(), f.delta.double()
        exact = float((delta @ C @ delta.T).diagonal().sum())
        assert first.explained[name] >= 0.9 * (1 - 1e-6)
        bound = backward_bound(f.s, f.B, first.explained[name], first.trace[name])
        assert exact <= bound * (1 + 1e-4) + 1e-6 * float(delta.square().sum()) * first.trace[name]
        checked += exact > 0
        unprotected = float(delta.square().sum()) * first.trace[name] / C.shape[0]
        assert exact < unprotected
    assert checked


def test_explained_and_trace_are_those_of_the_merged_model():
    learner = two_tasks()
    observer = collect_features(learner.model, learner.targets, learner.store, loader(seed=1), loss_fn)
    record = learner.records[-1]
    for t in learner.targets:
        C, U = observer.C(t.name), learner.U[t.name].double()
        assert record.trace[t.name] == pytest.approx(float(C.trace()), rel=1e-9)
        share = float((U.T @ C @ U).trace() / C.trace())
        assert record.explained[t.name] == pytest.approx(share, rel=1e-6)
        assert share >= 0.8 * (1 - 1e-6)
    assert not record.covariance


def test_gradient_memory():
    learner = ContinualLearner(make_net(), config(memory="gradients", energy_features=0.9, keep_covariance=True))
    learn(learner, "a", 0)
    G = collect_gradients(learner.model, learner.targets, learner.store, loader(seed=0), loss_fn)
    record = learner.records[0]
    for t in learner.targets:
        g, U = G[t.name], learner.U[t.name].double()
        assert record.trace[t.name] == pytest.approx(float(g.square().sum()), rel=1e-6)
        explained = float((g @ U).square().sum() / g.square().sum())
        assert explained >= 0.9 * (1 - 1e-6)
        assert record.explained[t.name] == pytest.approx(explained, rel=1e-5)
    assert any(record.basis[t.name].shape[1] for t in learner.targets)
    features = ContinualLearner(make_net(), config(energy_features=0.9))
    learn(features, "a", 0)
    assert any(features.records[0].used[n] != record.used[n] for n in record.used)
    learn(learner, "b", 1)
    assert learner.audit().passed


def test_per_tower_energies():
    learner = ContinualLearner(
        make_towers(),
        config(energy_weights={"vision": 0.6, "text": 0.0}, energy_features={"vision": 0.5, "text": 0.95}),
    )
    learn(learner, "a", 0)
    record = learner.records[0]
    for t in learner.targets:
        start = learner.start_bases()[t.name].shape[1]
        if t.tower == "vision_model":
            assert start > 0
            assert record.explained[t.name] >= 0.5 * (1 - 1e-6)
        else:
            assert start == 0
            assert record.explained[t.name] >= 0.95 * (1 - 1e-6)
    vision = [record.explained[t.name] for t in learner.targets if t.tower == "vision_model"]
    assert min(vision) < 0.95


def test_summary_shows_every_target():
    learner = two_tasks(gamma=0.2)
    text = learner.summary()
    assert "10 targets, 2 tasks learned" in text
    for t in learner.targets:
        (line,) = [line for line in text.splitlines() if f" {t.name} " in line]
        for shown in (f"{t.depth + 1}/2", f"{t.n_in} → {t.n_out}", f"{t.scale:.2f}", f"{t.s:.3f}",
                      f"{learner.U[t.name].shape[1]}/{t.n_in}"):  # fmt: skip
            assert shown in line


def test_layer_rows_follow_the_tasks():
    learner = two_tasks()
    for row, t in zip(layer_rows(learner), learner.targets, strict=True):
        assert row["layer"] == t.name
        assert len(row["used"]) == 3
        assert row["used"][-1] == learner.U[t.name].shape[1]
        assert row["rank"] == [r.factors[t.name].A.shape[0] for r in learner.records]


def test_method_without_protection_is_told_in_a_sentence():
    method = get_method("lora")
    learner = learn(method.learner(make_net(), method.make_config(config().to_dict())), "a", 0)
    with pytest.raises(KeepLoraError, match="SequentialLora protects no subspace, so there is nothing to audit"):
        learner.audit()
