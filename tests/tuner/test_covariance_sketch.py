"""C in few rows, C on the CPU where a GPU is full, and one decomposition where targets share C and U."""

from __future__ import annotations

import pytest
import torch

import keeplora.tuner.observers as observers
import keeplora.tuner.protect as protecting
from keeplora import ContinualLearner
from keeplora.errors import ConfigError
from keeplora.math import CovarianceSketch, explained_share
from keeplora.tuner.passes import collect_features
from tests.tuner.blocks import config, loader, loss_fn, make_net, train


def learned(**kwargs) -> ContinualLearner:
    learner = ContinualLearner(make_net(), config(**kwargs))
    torch.manual_seed(0)  # dropout
    for i, name in enumerate(("one", "two")):
        with learner.task(name, loader(24, seed=i), loss_fn) as model:
            train(model, loader(24, seed=i), steps=1)
    return learner


def test_a_sketch_stands_for_c_where_inputs_are_wide_enough(tmp_path):
    learner = learned(covariance_sketch=4)
    record = learner.records[1]
    told = record.info["covariance_sketch"]
    wide = {t.name for t in learner.targets if t.n_in >= 16}
    assert wide == {t.name for t in learner.targets if t.name.endswith("down")}
    assert set(told["error"]) == wide
    assert told["rows"] == 4
    assert all(0 <= share <= 1 for share in told["error"].values())
    path = learner.save_pretrained(tmp_path / "saved")
    again = ContinualLearner.from_pretrained(path, make_net())
    assert again.records[1].info["covariance_sketch"] == told
    assert again.config.covariance_sketch == 4


def test_what_is_said_to_be_explained_is_a_lower_bound_of_what_is():
    learner = learned(covariance_sketch=4, energy_features=0.95)
    last = learner.records[-1]
    features = collect_features(learner.model, learner.targets, learner.store, loader(24, seed=1), lambda m, b: m(b[0]))
    for t in learner.targets:
        C = features.C(t.name)
        true = explained_share(learner.U[t.name], C)
        assert last.trace[t.name] == pytest.approx(float(C.diagonal().sum()), rel=1e-6)
        assert last.explained[t.name] <= true + 1e-6
        assert true <= last.explained[t.name] + sum(last.info["covariance_sketch"]["error"].values()) * t.n_in


def test_narrow_layers_are_as_without():
    one, other = learned(covariance_sketch=4), learned()
    for t in other.targets:
        if t.n_in < 16 and t.depth == 0:
            assert torch.equal(one.records[0].basis[t.name], other.records[0].basis[t.name])


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="turn one of them off"):
        config(covariance_sketch=4, keep_covariance=True)
    for value in (0, 2.5, True):
        with pytest.raises(ConfigError, match="covariance_sketch must be a number of rows"):
            config(covariance_sketch=value)


@pytest.mark.parametrize("sketch", [None, 2])
def test_a_full_gpu_moves_the_sums_to_the_cpu_and_says_so_once(monkeypatch, sketch):
    learner = ContinualLearner(make_net(), config())
    given = (learner.model, learner.targets, learner.store, loader(24), lambda m, b: m(b[0]))
    whole = collect_features(*given, sketch=sketch)
    calls, real = [], observers.FeatureObserver._rows

    def rows(self, target, x, power):
        calls.append(target.name)
        if len(calls) == 10:  # in the second batch
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, target, x, power)

    monkeypatch.setattr(observers.FeatureObserver, "_rows", rows)
    with pytest.warns(UserWarning, match="summed on the CPU") as told:
        found = collect_features(*given, sketch=sketch)
    assert len(told) == 1
    for t in learner.targets:
        one, other = whole.C(t.name), found.C(t.name)
        if isinstance(one, CovarianceSketch):
            assert torch.equal(one.B, other.B)
            assert (one.trace, one.shed) == (other.trace, other.shed)
        else:
            assert torch.equal(one, other)


def test_q_k_and_v_with_one_subspace_are_decomposed_once(monkeypatch):
    seen, real = [], protecting.growth
    monkeypatch.setattr(protecting, "growth", lambda *args, **kwargs: seen.append(1) or real(*args, **kwargs))
    alike = learned(energy_weights=0.0)
    assert len(seen) == 2 * 2 * 3  # two tasks, two blocks: qkv, up, down
    seen.clear()
    learned(energy_weights=0.3)
    assert len(seen) == 2 * 2 * 5  # each has a U₀ of its own
    names = [t.name for t in alike.targets if t.depth == 0]
    for record in alike.records:
        q, k, v = (record.basis[n] for n in names if n[-1] in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert q.data_ptr() != k.data_ptr()
        assert len({record.explained[n] for n in names if n[-1] in "qkv"}) == 1
