"""A branch beside a linear: what it adds, what trains, and that it goes without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from keeplora import KeepLoraConfig
from keeplora.models import load_model
from keeplora.tuner.adapter import Factors
from keeplora.tuner.branch import BRANCH, Branch, BranchLearner, attach_branches
from tests.methods.families import FamilyTask
from tests.models import tiny
from tests.tuner.blocks import TARGETS, hooks, loader, loss_fn, make_net, same, train, weights


class Full(Branch):
    """ΔW = D as it is."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(n_out, n_in))

    def forward(self, x):
        return nn.functional.linear(x, self.D)

    def factors(self) -> Factors:
        return Factors(torch.eye(self.D.shape[1]), self.D.detach().clone(), 1.0)


class FullLearner(BranchLearner):
    def _branches(self, task):
        return {t.name: Full(t.n_out, t.n_in) for t in self.targets}


def beside(net, names):
    return {name: Full(*net.get_submodule(name).weight.shape) for name in names}


UP = "encoder.layers.0.up"


def test_adds_to_the_output_and_is_all_that_trains():
    net, x = make_net(), torch.randn(2, 4, 12)
    plain = net.get_submodule(UP)(x[0])
    branches = beside(net, [UP])
    release = attach_branches(net, branches)
    assert torch.equal(net.get_submodule(UP)(x[0]), plain)
    with torch.no_grad():
        branches[UP].D.normal_()
    assert torch.allclose(net.get_submodule(UP)(x[0]), plain + x[0] @ branches[UP].D.T, atol=1e-6)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {f"{UP}.{BRANCH}.D"}
    loss_fn(net, (x, torch.tensor([0, 1]))).backward()
    assert float(branches[UP].D.grad.abs().max()) > 0
    release()
    assert torch.equal(net.get_submodule(UP)(x[0]), plain)


def test_goes_without_a_trace():
    net = make_net()
    net.get_submodule(UP).weight.requires_grad_(False)
    net.head.weight.grad = mine = torch.ones_like(net.head.weight)
    net.get_submodule(UP).register_forward_hook(lambda *_: None)  # somebody else's stays
    before, modules, hooked = weights(net), list(net.named_modules()), hooks(net)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    release = attach_branches(net, beside(net, [UP, "encoder.layers.1.q"]))
    assert net.head.weight.grad is None
    train(net, loader())
    release()
    assert same(weights(net), before)
    assert list(net.named_modules()) == modules
    assert hooks(net) == hooked
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert net.head.weight.grad is mine
    attach_branches(net, beside(net, [UP]))()  # and again


def test_deep_copy_runs_its_own_branch():
    net, x = make_net(), torch.randn(3, 12)
    branches = beside(net, [UP])
    release = attach_branches(net, branches)
    with torch.no_grad():
        branches[UP].D.fill_(0.1)
    twin = copy.deepcopy(net)
    kept = twin.get_submodule(UP)(x)
    with torch.no_grad():
        branches[UP].D.fill_(0.7)
    assert torch.equal(twin.get_submodule(UP)(x), kept)
    assert not torch.allclose(net.get_submodule(UP)(x), kept)
    release()
    assert torch.equal(twin.get_submodule(UP)(x), kept)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_models_keep_their_dtype(autocast):
    net = make_net(dtype=torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(3, 12, dtype=net.head.weight.dtype)
    branches = beside(net, [UP])
    release = attach_branches(net, branches)
    with torch.no_grad():
        branches[UP].D.normal_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net.get_submodule(UP)(x)
    assert y.dtype == torch.bfloat16
    assert branches[UP].D.dtype == torch.float32
    y.float().sum().backward()
    assert branches[UP].D.grad.dtype == torch.float32
    release()


def test_refuses_what_cannot_carry_one_and_changes_nothing():
    net = make_net()
    hooked = hooks(net)
    with pytest.raises(RuntimeError, match=r"encoder\.layers\.0\.norm is no plain linear"):
        attach_branches(net, {UP: Full(18, 12), "encoder.layers.0.norm": Full(12, 12)})
    assert hooks(net) == hooked
    assert all(p.requires_grad for p in net.parameters())
    release = attach_branches(net, {UP: Full(18, 12)})
    with pytest.raises(RuntimeError, match="has a branch already"):
        attach_branches(net, {UP: Full(18, 12)})
    release()


def make_learner(net):
    return FullLearner(net, KeepLoraConfig(r=2, target_modules=TARGETS))


def test_learner_merges_what_the_branch_did():
    net, batches = make_net(), loader()
    learner = make_learner(net)
    x = torch.randn(5, 4, 12)
    net.eval()
    with learner.task("one", batches, loss_fn) as model:
        assert model is net
        assert set(learner.open_branches()) == {t.name for t in learner.targets}
        assert learner._open.info["trained_parameters"] == sum(t.n_in * t.n_out for t in learner.targets)
        train(net, batches)
        live = net(x)
    assert torch.allclose(net(x), live, atol=1e-5)
    assert not learner.open_branches()
    assert learner.records[0].factors.keys() == {t.name for t in learner.targets}


def test_not_finite_is_not_merged():
    net, batches = make_net(), loader()
    before = weights(net)
    learner = make_learner(net)
    learner.start_task("one", batches, loss_fn)
    with torch.no_grad():
        learner.open_branches()[UP].D[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"branch of {UP} holds NaN"):
        learner.finish_task()
    assert same(weights(net), before)
    assert not learner.records
    assert not hooks(net)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    encoder = load_model(tiny.make_tiny("clip", tmp_path / "clip"))
    task = FamilyTask(encoder, "one")
    learner = FullLearner(encoder.model, KeepLoraConfig(r=2, target_modules=encoder.default_target_modules))

    def gradients():
        task.start(learner, "one")
        encoder.model.train()
        task.loss(encoder.model, task.batches[0]).mean().backward()
        found = {name: branch.D.grad.clone() for name, branch in learner.open_branches().items()}
        learner.abort_task()
        return found

    plain = gradients()
    enable = getattr(encoder.model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    (enable or encoder.model.gradient_checkpointing_enable)()
    checkpointed = gradients()
    assert all(float(g.abs().max()) > 0 for g in plain.values())
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-7) for n in plain)
