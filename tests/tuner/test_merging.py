"""Finishing, merging and undoing: W = round(W₀ + Σ sBA) once, and an exception leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizer_module

from keeplora import ContinualLearner, KeepLoraError
from tests.tuner.blocks import config, hooks, learn, loader, loss_fn, make_net, same, train, weights


def cast_loss(model, batch):
    dtype = next(model.parameters()).dtype
    return loss_fn(model, (batch[0].to(dtype), batch[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_sum_rounded_once(dtype):
    net = make_net(dtype=dtype)
    W0 = weights(net)
    learner = ContinualLearner(net, config())
    successive = {t.name: W0[f"{t.name}.weight"].clone() for t in learner.targets}
    for i in range(4):
        with learner.task(f"t{i}", loader(seed=i), cast_loss) as model:
            train(model, loader(seed=i), loss=cast_loss, lr=0.02)
        for name, f in learner.records[-1].factors.items():
            assert f.A.dtype == f.B.dtype == torch.float32
            successive[name] = (successive[name].float() + f.s * (f.B @ f.A)).to(dtype)
    moved = 0
    for t in learner.targets:
        total = torch.zeros(t.n_out, t.n_in)
        for record in learner.records:
            f = record.factors[t.name]
            total = total + f.s * (f.B @ f.A)
        W = net.get_submodule(t.name).weight
        assert W.dtype == dtype
        assert torch.equal(W, (W0[f"{t.name}.weight"].float() + total).to(dtype)), t.name
        moved += not torch.equal(W, successive[t.name])
    if dtype == torch.bfloat16:
        assert moved, "merging step by step would have given the same: the test shows nothing"
    others = {n: p for n, p in weights(net).items() if n.removesuffix(".weight") not in successive}
    assert same(others, {n: W0[n] for n in others})


def test_merged_model_computes_what_the_adapter_computed():
    learner = ContinualLearner(make_net(), config())
    x = loader(seed=3).dataset.x
    with learner.task("a", loader(), loss_fn) as model:
        train(model, loader())
        with torch.no_grad():
            adapted = model.eval()(x)
    with torch.no_grad():
        merged = learner.model.eval()(x)
        assert torch.allclose(merged, adapted, atol=1e-5)
        assert not torch.allclose(merged, make_net().eval()(x), atol=1e-2)
    assert hooks(learner.model) == []
    assert not hasattr(learner.model, "peft_config") or not learner.model.peft_config


class Snapshot:
    """Everything of a model that an undone task must leave as it was."""

    def __init__(self, learner: ContinualLearner) -> None:
        model = self.model = learner.model
        self.learner = learner
        self.weights = weights(model)
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        self.modules = {n: (type(m), id(m), m.training) for n, m in model.named_modules()}
        self.hooks = hooks(model)
        self.step_hooks = set(optimizer_module._global_optimizer_pre_hooks)
        self.records = [r.name for r in learner.records]
        self.U = {n: U.clone() for n, U in learner.U.items()}

    def check(self) -> None:
        now = Snapshot(self.learner)
        assert same(now.weights, self.weights)
        assert now.flags == self.flags
        assert all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(now.grads.values(), self.grads.values(), strict=True)
        )
        assert now.modules == self.modules
        assert now.hooks == self.hooks
        assert now.records == self.records
        assert same(now.U, self.U)
        assert set(optimizer_module._global_optimizer_pre_hooks) <= self.step_hooks
        assert self.learner._open is None


@pytest.fixture(params=["first", "second"])
def learner(request, tmp_path):
    """A learner with a ledger before its first or second task, flags and gradients as a user might have left them."""
    learner = ContinualLearner(make_net(), config(), ledger=tmp_path / "ledger")
    if request.param == "second":
        learn(learner, "before", seed=7)
    learner.model.train()
    learner.model.embed.bias.requires_grad_(False)
    learner.model.head.weight.grad = torch.full_like(learner.model.head.weight, 2.0)
    learner.model.encoder.layers[0].q.weight.grad = torch.ones_like(learner.model.encoder.layers[0].q.weight)
    return learner


def goes_on(learner: ContinualLearner) -> None:
    before = len(learner.records)
    learn(learner, "next", seed=1)
    assert len(learner.records) == before + 1
    assert learner.audit().passed
    assert len(learner._ledger.records()) == before + 1


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_exception_inside_the_block_undoes_everything(learner, error):
    state = Snapshot(learner)

    def block() -> None:
        with learner.task("a", loader(), loss_fn) as model:
            train(model, loader())
            assert hooks(model) == []
            raise error

    with pytest.raises(type(error)):
        block()
    state.check()
    goes_on(learner)


def failing(loss, after: int, error: BaseException):
    calls = []

    def wrapped(model, batch):
        calls.append(1)
        if len(calls) > after:
            raise error
        return loss(model, batch)

    return wrapped


@pytest.mark.parametrize("after", [0, 1])
def test_exception_in_the_loss_during_the_statistics(learner, after):
    state = Snapshot(learner)
    with pytest.raises(RuntimeError, match="cannot read sample 5"):
        learner.start_task("a", loader(), failing(loss_fn, after, RuntimeError("cannot read sample 5")))
    state.check()
    goes_on(learner)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_exception_in_the_feature_pass_merges_nothing(learner, error):
    state = Snapshot(learner)
    learner.start_task("a", loader(), loss_fn, forward_fn=failing(loss_fn, 1, error))
    train(learner.model, loader())
    with pytest.raises(type(error)):
        learner.finish_task()
    state.check()
    goes_on(learner)


def test_trained_nan_is_not_merged(learner):
    state = Snapshot(learner)
    learner.start_task("a", loader(), loss_fn)
    learner.model.encoder.layers[1].up.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.up hold NaN or infinity; nothing is merged"):
        learner.finish_task()
    state.check()
    goes_on(learner)


def test_record_that_cannot_be_written_undoes_the_task(learner, monkeypatch):
    from keeplora.tuner import ledger as module

    state, folder = Snapshot(learner), learner._ledger.path
    files = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    real = module.save_file

    def disk_full(tensors, path, *args):
        real(dict(list(tensors.items())[:2]), path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"), learner.task("a", loader(), loss_fn) as model:
        train(model, loader())
    monkeypatch.undo()
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == files
    state.check()
    goes_on(learner)


def test_order_of_calls_is_checked(learner):
    with pytest.raises(KeepLoraError, match="no task is open"):
        learner.finish_task()
    learner.start_task("a", loader(), loss_fn)
    with pytest.raises(KeepLoraError, match="task 'a' is still open"):
        learner.start_task("b", loader(), loss_fn)
    learner.finish_task()
    with pytest.raises(KeepLoraError, match="'a' was learned already"):
        learner.start_task("a", loader(), loss_fn)


def test_weights_that_are_no_target_never_move():
    net = make_net()
    before = weights(net)
    learner = ContinualLearner(net, config(target_modules=["q"]))
    learn(learner, "a", 0)
    changed = {n for n, p in weights(net).items() if not torch.equal(p, before[n])}
    assert changed == {"encoder.layers.0.q.weight", "encoder.layers.1.q.weight"}


def test_parameters_keep_their_identity():
    """An optimizer or a tied module elsewhere that holds a parameter must still hold it after a merge."""
    net = make_net()
    ids = {n: id(p) for n, p in net.named_parameters()}
    learn(ContinualLearner(net, config()), "a", 0)
    assert {n: id(p) for n, p in net.named_parameters()} == ids
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
