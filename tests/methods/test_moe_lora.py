"""MoELoRA: the layer is the formula, the weights sum to one, and the experts go on from task to task beside the model."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods import get_method
from keeplora.methods.moe_lora import ExpertsBranch
from tests.methods.lifecycle import learn, make_learner, train
from tests.tuner.blocks import TARGETS, hooks, loader, loss_fn, make_net, same, weights

UP = "encoder.layers.0.up"


def moelora(net, experts: int = 2, **values):
    return make_learner("moelora", net, TARGETS, **{"r": 4, "lora_alpha": 8, "options": {"experts": experts}, **values})


def test_a_layer_by_hand():
    """Two experts of rank one over two inputs; the router is sure of the first for (1, 0), and torn for (0, 1)."""
    branch = ExpertsBranch(
        {
            "A": torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "B": torch.tensor([[1.0, 10.0]]),
            "router": torch.tensor([[50.0, 0.0], [0.0, 0.0]]),
        }, s=0.5,
    )  # fmt: skip
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(branch.weights(x), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
    # first: 0.5 · (1 · 1 · 1); second: 0.5 · (0.5 · 1 · 2 + 0.5 · 10 · 0)
    assert branch(x).tolist() == [[[0.5], [0.5]]]
    torch.testing.assert_close(branch(torch.tensor([[0.0, 0.0]])), torch.zeros(1, 1))


def test_live_layer_is_the_formula_and_the_weights_sum_to_one():
    net = make_net()
    net.eval()
    W0 = {n: p.double() for n, p in weights(net).items()}
    learner = learn(moelora(net), "one", seed=1)
    model = learner.start_task("two", loader(seed=2), loss_fn)
    train(learner, model, loader(seed=2), steps=4)
    generator = torch.Generator().manual_seed(0)
    for name, branch in learner.open_branches().items():
        linear = net.get_submodule(name)
        x = torch.randn(3, 5, linear.in_features, generator=generator)
        gate = (x.double() @ branch.router.double().T).exp()
        gate = gate / gate.sum(-1, keepdim=True)
        torch.testing.assert_close(branch.weights(x).sum(-1), torch.ones(3, 5))
        torch.testing.assert_close(branch.weights(x).double(), gate, rtol=1e-4, atol=1e-6)
        y = x.double() @ W0[f"{name}.weight"].T + linear.bias.double()
        A, B = branch.A.double().reshape(2, 2, -1), branch.B.double().reshape(-1, 2, 2)
        for j in range(2):  # s = alpha / r = 2
            y = y + 2.0 * gate[..., j : j + 1] * (x.double() @ A[j].T @ B[:, j].T)
        torch.testing.assert_close(linear(x).double(), y, rtol=1e-4, atol=1e-5)
    assert float(gate.detach().std()) > 0.01  # it does tell tokens apart
    learner.abort_task()


def test_experts_and_router_train_on_every_task_and_go_on():
    net = make_net()
    learner = moelora(net)
    before = weights(net)
    learner.start_task("one", loader(), loss_fn)
    branch = learner.open_branches()[UP]
    assert {n for n, p in branch.named_parameters() if p.requires_grad} == {"A", "B", "router"}
    start = branch.experts()
    assert start["A"].shape == (4, 12)
    assert start["B"].shape == (18, 4)
    assert start["router"].shape == (2, 12)
    assert not start["B"].any()
    assert float(start["A"].abs().max()) <= 12**-0.5
    planned = sum(4 * (t.n_in + t.n_out) + 2 * t.n_in for t in learner.targets)
    assert learner._open.info["trained_parameters"] == learner.planned_parameters() == planned
    train(learner, net, loader(), steps=6)
    trained = branch.experts()
    assert all(not torch.equal(trained[key], start[key]) for key in start)
    learner.finish_task()
    assert same(weights(net), before)  # the model itself stays
    assert learner.state_bytes() == 4 * planned
    learner.start_task("two", loader(seed=2), loss_fn)
    assert same(learner.open_branches()[UP].experts(), trained)
    train(learner, net, loader(seed=2), steps=2)
    learner.finish_task()
    assert learner.state_bytes() == 4 * planned  # one set of experts, however many tasks
    assert not same(learner._present[UP], trained)
    assert same({k: learner.records[0].tensors[f"moelora/{k}/{UP}"] for k in trained}, trained)


def test_one_expert_is_lora():
    """Its weight is softmax of one number, so the router changes nothing and the layer is a LoRA of rank r."""
    net = make_net()
    net.eval()
    learner = learn(moelora(net, experts=1), "one", seed=1)
    x = torch.randn(4, 3, 12)
    e = learner._present[UP]
    linear = net.get_submodule(UP)
    expected = linear(x) + 2.0 * x @ e["A"].T @ e["B"].T
    with learner.serving(None):
        torch.testing.assert_close(linear(x), expected)


def test_serving_puts_the_experts_in_and_takes_them_out():
    net = make_net()
    net.eval()
    x = torch.randn(4, 3, 12)
    plain = net(x).detach()
    learner = moelora(net)
    with learner.serving("any"):
        assert torch.equal(net(x), plain)  # nothing learned yet
    learn(learner, "one", seed=1)
    net.eval()
    hooked, flags = hooks(net), {n: p.requires_grad for n, p in net.named_parameters()}
    with learner.serving(None):
        served = net(x)
        assert not torch.allclose(served, plain, atol=1e-4)
        assert not served.requires_grad
        with learner.serving("one"):
            assert torch.equal(net(x), served)
        assert torch.equal(net(x), served)
    assert torch.equal(net(x), plain)
    with pytest.raises(RuntimeError, match="boom"), learner.serving("one"):
        raise RuntimeError("boom")
    assert torch.equal(net(x), plain)
    assert hooks(net) == hooked
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags


def test_a_task_in_training_is_served_with_its_experts():
    net = make_net()
    net.eval()
    learner = learn(moelora(net), "one", seed=1)
    model = learner.start_task("two", loader(seed=2), loss_fn)
    train(learner, model, loader(seed=2))
    net.eval()
    x = torch.randn(2, 3, 12)
    live = net(x).detach()
    with learner.serving("two"):
        assert torch.equal(net(x), live)
    assert torch.equal(net(x), live)
    learner.abort_task()


def test_a_task_that_is_not_accepted_is_forgotten():
    """The check runs on the new experts; when it says no, the old ones are back."""
    net = make_net()
    net.eval()
    learner = learn(moelora(net), "one", seed=1)
    before = learner._present
    net.eval()
    x = torch.randn(2, 3, 12)
    seen = []

    def evaluate() -> dict[str, float]:
        with learner.serving("one"), torch.no_grad():
            seen.append(net(x))
        return {"one": -100.0 * (len(seen) - 1)}

    kwargs = {"accept": {"max_drop": 1.0, "action": "undo"}, "evaluate": evaluate}
    model = learner.start_task("two", loader(seed=2), loss_fn, **kwargs)
    train(learner, model, loader(seed=2))
    net.eval()
    with pytest.warns(UserWarning, match="it is undone"):
        assert learner.finish_task() is None
    assert not torch.equal(seen[0], seen[1])
    assert all(same(learner._present[name], before[name]) for name in before)
    with learner.serving("one"), torch.no_grad():
        assert torch.equal(net(x), seen[0])


def test_no_adapter_is_written(tmp_path):
    learner = learn(moelora(make_net()), "one", seed=1)
    assert not learner.records[0].factors
    saved = learner.save_pretrained(tmp_path / "out")
    assert not (saved / "adapters").exists()
    assert "no adapter or checkpoint of fixed weights" in get_method("moelora").unmergeable


def test_goes_on_from_disk(tmp_path):
    net, other = make_net(), make_net()
    learner = learn(moelora(net), "one", seed=1)
    again = type(learner).from_pretrained(learner.save_pretrained(tmp_path / "out"), other)
    assert again.options == learner.options
    for which in (learner, again):
        torch.manual_seed(0)  # dropout
        learn(which, "two", seed=2)
    assert same(learner.records[-1].tensors, again.records[-1].tensors)
    net.eval(), other.eval()
    x = torch.randn(2, 3, 12)
    with learner.serving("two"), again.serving("two"):
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 0}, "tuner.options.experts must be at least 1, got 0"),
        (
            {"experts": 3},
            "tuner.r is 4, which cannot be split evenly: it must be a multiple of tuner.options.experts, 3",
        ),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        moelora(make_net(), **values)


def test_experts_that_are_not_finite_are_refused():
    learner = learn(moelora(make_net()), "one", seed=1)
    before = learner._present
    learner.start_task("two", loader(), loss_fn)
    with torch.no_grad():
        learner.open_branches()[UP].B.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=re.escape(f"experts of {UP} hold NaN")):
        learner.finish_task()
    assert same(learner._present[UP], before[UP])
