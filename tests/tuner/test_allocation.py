"""Ranks and protected directions shared out over a tower's layers: what they cost, what they gain, and that tasks go on."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import ConfigError
from keeplora.math import Subspace, residual_factor
from keeplora.tuner.allocation import allotted, pooled_weight_energies, worth
from tests.tuner import stream
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, make_towers, same, weights

RANKS = ("gain", "share")


def learned(tasks: int = 2, towers: bool = False, ledger: Any = None, **more: Any) -> ContinualLearner:
    learner = ContinualLearner(make_towers() if towers else make_net(), config(**more), ledger=ledger)
    for i in range(tasks):
        go_on(learner, i)
    return learner


def go_on(learner: ContinualLearner, i: int) -> None:
    torch.manual_seed(i)  # the net's dropout
    learn(learner, f"task {i}", seed=i)


def trained(learner: ContinualLearner, record: Any, tower: str) -> int:
    return sum(
        record.factors[t.name].B.numel() for t in learner.targets if t.tower == tower and t.name in record.factors
    )


@pytest.mark.parametrize("kind", RANKS)
def test_ranks_differ_train_as_many_parameters_and_stay_in_the_residual(kind):
    plain, learner = (learned(towers=True, rank_allocation=k, r=2, lora_alpha=2) for k in ("uniform", kind))
    for i, record in enumerate(learner.records):
        found = {name: f.A.shape[0] for name, f in record.factors.items()}
        assert len(set(found.values())) > 1
        assert all(1 <= rank <= 8 for rank in found.values())
        for tower in ("vision_model", "text_model"):
            budget = sum(min(t.r, t.n_in, t.n_out) * t.n_out for t in learner.targets if t.tower == tower)
            widest = max(t.n_out for t in learner.targets)
            assert budget - widest < trained(learner, record, tower) <= budget
        for t in learner.targets:
            f, U = record.factors[t.name], learner.U.after(t.name, i)
            assert torch.allclose(f.A @ f.A.T, torch.eye(len(f.A)), atol=1e-5)
            assert float((f.A @ U).abs().max()) <= 1e-6
            assert f.s == t.s  # the configured r's, whatever the layer's own rank
        assert record.info["rank_shrunk"] == []
        assert record.info["trained_parameters"] <= plain.records[i].info["trained_parameters"]


def test_gain_is_the_first_steps_and_no_uniform_rank_has_more():
    """Σ_l s² ‖G_l A_lᵀ‖² (Prop 3.1) over targets of one height, where the greedy choice is the best one."""
    generator = torch.Generator().manual_seed(0)
    learner = ContinualLearner(make_net(blocks=3), config(target_modules=["q", "down"], r=2, lora_alpha=2, gamma=0.4))
    S = {t.name: Subspace(torch.linalg.qr(torch.randn(t.n_in, 3, generator=generator)).Q) for t in learner.targets}
    G = {t.name: torch.randn(t.n_out, t.n_in, generator=generator) * (1 + 3 * (t.depth or 0)) for t in learner.targets}

    def gain(A: Any) -> float:
        return sum(t.s**2 * float((G[t.name] @ A[t.name].T).square().sum()) for t in learner.targets)

    A = {t.name: residual_factor(G[t.name], S[t.name], 8) for t in learner.targets}
    values = {t.name: worth("gain", t, G[t.name], A[t.name], S[t.name]) for t in learner.targets}
    chosen = allotted(learner.targets, A, values)
    uniform = {name: a[:2] for name, a in A.items()}
    assert sum(len(a) for a in chosen.values()) == sum(len(a) for a in uniform.values())
    assert gain(chosen) > 1.05 * gain(uniform)
    for t in learner.targets:
        assert float(values[t.name].sum()) <= t.s**2 * float(S[t.name].project_out(G[t.name]).square().sum()) * (
            1 + 1e-6
        )
        share = worth("share", t, G[t.name], A[t.name], S[t.name])
        assert torch.allclose(share / share[0], values[t.name] / values[t.name][0])
        assert 0 < float(share.sum()) <= 1 + 1e-6


def columns(learner: ContinualLearner, tower: str, tasks: int) -> int:
    return sum(4 * t.n_in * learner.U.after(t.name, tasks).shape[1] for t in learner.targets if t.tower == tower)


@pytest.mark.parametrize("memory", ["features", "gradients"])
def test_pooled_directions_explain_more_in_the_same_bytes(memory):
    """After one task, so that both begin at the same model and see the same features; inputs of one width."""
    gained = 0.0
    for energy in (0.5, 0.8):
        more: dict[str, Any] = {"memory": memory, "energy_features": energy, "energy_weights": 0}
        more |= {"target_modules": ["q", "k", "v", "up"]}
        plain, pooled = (learned(1, True, energy_allocation=k, **more) for k in ("uniform", "pooled"))
        for tower in ("vision_model", "text_model"):
            names = [t.name for t in plain.targets if t.tower == tower]
            assert columns(pooled, tower, 1) == columns(plain, tower, 1)
            shares = [sum(x.records[0].explained[n] for n in names) for x in (plain, pooled)]
            assert shares[1] >= shares[0] - 1e-9
            gained += shares[1] - shares[0]
        record = pooled.records[0]
        for t in pooled.targets:
            assert record.basis[t.name].shape[1] == len(record.values[t.name]) == record.used[t.name]
            assert float(record.values[t.name].sum()) == pytest.approx(record.explained[t.name], abs=1e-5)
    assert gained > 0.01


def test_the_weights_subspaces_pool_too():
    plain, pooled = (
        ContinualLearner(make_towers(), config(energy_allocation=k, target_modules=["q", "k", "v", "up"]))
        for k in ("uniform", "pooled")
    )
    for tower in ("vision_model", "text_model"):
        assert columns(pooled, tower, 0) == columns(plain, tower, 0)
    assert plain.U.dims() != pooled.U.dims()


def test_pooled_weights_take_no_more_bytes_and_hold_more_energy():
    learner = ContinualLearner(make_net(blocks=3), config())
    energy = {t.name: 0.5 for t in learner.targets}
    pooled = pooled_weight_energies(learner.targets, learner.store, energy, learner.algebra)
    from keeplora.math import weight_basis

    def bytes_and_energy(of: Any) -> tuple[int, float]:
        found = {t: weight_basis(learner.store.W0[t.name], of[t.name]) for t in learner.targets}
        held = sum(float((learner.store.W0[t.name] @ U).square().sum() / learner.store.W0[t.name].square().sum())
                   for t, U in found.items())  # fmt: skip
        return sum(4 * t.n_in * U.shape[1] for t, U in found.items()), held

    before, after = bytes_and_energy(energy), bytes_and_energy(pooled)
    assert len(set(pooled.values())) > 1
    assert before[0] - 4 * 18 < after[0] <= before[0]
    assert after[1] > before[1] - 0.1
    everything = pooled_weight_energies(learner.targets, learner.store, dict.fromkeys(energy, 1.0), learner.algebra)
    assert set(everything.values()) == {1.0}
    nothing = pooled_weight_energies(learner.targets, learner.store, dict.fromkeys(energy, 0.0), learner.algebra)
    assert set(nothing.values()) == {0.0}


def test_earlier_inputs_stay_as_they_are_under_every_choice():
    """Forward stability: what a later task learns leaves span(U) alone."""
    learner = learned(3, rank_allocation="gain", energy_allocation="pooled", schedule="measured")
    for t in learner.targets:
        f, U = learner.records[2].factors[t.name], learner.U.after(t.name, 2)
        assert float((f.delta @ U).abs().max()) <= 1e-5 * float(f.delta.norm()) + 1e-8


@pytest.mark.parametrize("more", [{"rank_allocation": "gain"}, {"energy_allocation": "pooled"}, {"schedule": "measured"}],
                         ids=str)  # fmt: skip
def test_a_ledger_that_is_opened_again_goes_on_to_the_same_bits(more, tmp_path):
    whole = learned(3, ledger=tmp_path / "whole", **more)
    learned(2, ledger=tmp_path / "half", **more)
    shutil.copytree(tmp_path / "half", tmp_path / "copy")
    again = ContinualLearner.from_pretrained(tmp_path / "copy", make_net(), append=True)
    go_on(again, 2)
    assert same(weights(whole.model), weights(again.model))
    assert [r.info.get("layer_scales") for r in whole.records] == [r.info.get("layer_scales") for r in again.records]
    opened = ContinualLearner.from_pretrained(tmp_path / "whole", make_net())
    assert same(weights(whole.model), weights(opened.model))


@pytest.mark.parametrize("more", [{"rank_allocation": "share"}, {"schedule": "measured"}], ids=str)
def test_an_open_task_is_opened_again_without_its_statistics(more):
    learner = learned(1, **more)
    learner.start_task("b", loader(seed=1), loss_fn)
    state = learner.task_state()
    ranks = {n: a.shape[0] for n, a in state.group("A").items()}
    s = {n: layer.scaling["default"] for n, layer in learner._open.adapter._layers.items()}
    learner.abort_task()

    def refuse(*_: Any) -> None:
        raise AssertionError("a statistic was taken")

    batches = loader(seed=1)
    learner.start_task("b", batches, refuse, saved=state, feature_batches=[])
    again = learner.task_state()
    assert {n: a.shape[0] for n, a in again.group("A").items()} == ranks
    assert {n: layer.scaling["default"] for n, layer in learner._open.adapter._layers.items()} == s
    assert again.values["info"].get("layer_scales") == state.values["info"].get("layer_scales")
    learner.abort_task()


def test_the_allotted_ranks_follow_a_sketch_and_an_early_end_too():
    for more in ({"residual_gradient": "sketch"}, {"statistics_tolerance": 0.5}):
        learner = ContinualLearner(make_net(), config(rank_allocation="gain", r=2, lora_alpha=2, **more))
        batches = loader(n=120, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with learner.task("a", batches, loss_fn):
                pass
        budget = sum(2 * t.n_out for t in learner.targets)
        assert trained(learner, learner.records[0], "") <= budget
        assert len({f.A.shape[0] for f in learner.records[0].factors.values()}) > 1


def test_layers_without_room_leave_theirs_to_the_others():
    learner = ContinualLearner(stream.make_wide(), stream.settings(rank_allocation="gain"))
    for i in range(4):
        stream.learn(learner, i)
    for i, record in enumerate(learner.records):
        for name, f in record.factors.items():
            assert len(f.A) <= learner.U[name].shape[0] - learner.U.after(name, i).shape[1]


def test_unknown_kinds_are_named():
    with pytest.raises(ConfigError, match=r"rank_allocation: unknown kind 'gains'.*gain"):
        config(rank_allocation="gains")
    with pytest.raises(ConfigError, match="energy_allocation: unknown kind"):
        config(energy_allocation="global")
