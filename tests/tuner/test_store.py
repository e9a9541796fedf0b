"""What the store holds: no copy of a weight that nothing moved, and never the summed updates."""

from __future__ import annotations

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.methods import get_method
from keeplora.tuner.weights import WeightStore
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, same, train, weights


def copied(learner: ContinualLearner) -> set[str]:
    """Names whose W₀ is a tensor of its own, not the model's."""
    model = {t.name: learner.store.module(t.name).weight for t in learner.targets}
    return {name for name, p in model.items() if learner.store.W0[name].data_ptr() != p.data_ptr()}


def test_original_weights_are_copied_when_they_first_move(tmp_path):
    learner = ContinualLearner(make_net(), config(exclude_modules=["v"]), ledger=tmp_path / "ledger")
    before = weights(learner.model)
    assert learner.U
    assert learner.store.base_hash()
    assert copied(learner) == set()
    learner.start_task("a", loader(), loss_fn)
    learner.abort_task()
    assert copied(learner) == set()
    learn(learner, "a", 0)
    assert copied(learner) == {t.name for t in learner.targets}
    assert all(torch.equal(learner.store.W0[n], before[f"{n}.weight"]) for n in learner.store.names)


def test_methods_that_train_weights_get_the_original_kept_first():
    method = get_method("full-ft")
    learner = method.learner(make_net(), method.make_config(config().to_dict()))
    before = weights(learner.model)
    assert copied(learner) == set()
    learner.start_task("a", loader(), loss_fn)
    train(learner.model, loader())
    assert not same(weights(learner.model), before)
    learner.abort_task()
    assert same(weights(learner.model), before)


def test_updates_are_the_records_own_tensors():
    learner = ContinualLearner(make_net(), config())
    learn(learner, "a", 0)
    learn(learner, "b", 1)
    for name, updates in learner.store.updates.items():
        assert len(updates) == 2
        assert all(u is r.factors[name] for u, r in zip(updates, learner.records, strict=True))
        first, second = (r.factors[name].delta for r in learner.records)
        assert torch.equal(learner.store.delta[name], first + second)
        W = learner.store.W0[name] + (first + second)
        assert torch.equal(learner.store.current(name), W)
        assert torch.equal(learner.store.module(name).weight, W)
    assert learner.store.delta.keys() == {t.name for t in learner.targets}
    assert "embed" not in learner.store.delta
    with pytest.raises(KeyError):
        learner.store.W0["embed"]


def test_weight_that_was_changed_behind_the_store_is_named():
    learner = ContinualLearner(make_net(), config())
    with torch.no_grad():
        learner.store.module("encoder.layers.1.k").weight.mul_(2)
    with pytest.raises(
        KeepLoraError, match=r"the weight of encoder\.layers\.1\.k was changed in place after the learner"
    ):
        learn(learner, "a", 0)
    assert learner.records == []


def test_restore_takes_single_updates_as_well():
    net = make_net()
    before = weights(net)
    store = WeightStore(net, ["encoder.layers.0.q"], ["head.bias"])
    assert store.names == ["encoder.layers.0.q", "head.bias"]
    store.restore({"encoder.layers.0.q": torch.ones(12, 12), "head.bias": (torch.ones(3), torch.ones(3))})
    assert torch.equal(net.encoder.layers[0].q.weight, before["encoder.layers.0.q.weight"] + 1)
    assert torch.equal(net.head.bias, before["head.bias"] + 2)
    snapshot = store.snapshot()
    store.add({"head.bias": torch.ones(3)})
    store.restore(snapshot)
    assert torch.equal(net.head.bias, before["head.bias"] + 2)
    store.restore({})
    assert same(weights(net), before)


def test_single_batches_reach_the_open_task():
    learner = ContinualLearner(make_net(), config())
    singles = loader(batch_size=1)
    learner.start_task("a", loader(), loss_fn, single_batches=singles)
    assert learner._open is not None
    assert learner._open.single_batches is singles
    learner.abort_task()
    learner.start_task("a", loader(), loss_fn)
    assert learner._open.single_batches is None
    learner.abort_task()


def test_task_that_fails_to_attach_leaves_the_model_alone(monkeypatch):
    learner = ContinualLearner(make_net(), config(free_modules=["embed"]))
    flags = {n: p.requires_grad for n, p in learner.model.named_parameters()}
    modules = dict(learner.model.named_modules())
    monkeypatch.setattr(learner.free, "open", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.start_task("a", loader(), loss_fn)
    assert {n: p.requires_grad for n, p in learner.model.named_parameters()} == flags
    assert dict(learner.model.named_modules()) == modules
    monkeypatch.undo()
    learn(learner, "a", 0)
