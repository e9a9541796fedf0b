"""The adapter of a task: stock PEFT, A from the residual gradient and held still, B = 0."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.optim import optimizer as optimizer_module

from keeplora import ContinualLearner, KeepLoraError
from keeplora.math import project_out, residual_factor
from keeplora.tuner.passes import collect_gradients
from tests.tuner.blocks import (
    WIDTH,
    Samples,
    config,
    hooks,
    loader,
    loss_fn,
    make_net,
    make_towers,
    same,
    train,
    weights,
)

X = Samples(6, 4).x


def lora_layers(model) -> dict[str, LoraLinear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def A_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.lora_A["default"].weight for name, layer in lora_layers(model).items()}


@pytest.fixture
def opened():
    learner = ContinualLearner(make_net(blocks=3), config(gamma=0.2, lora_alpha=6))
    return learner, learner.start_task("a", loader(), loss_fn)


def test_stock_peft_with_an_alpha_per_layer(opened):
    learner, model = opened
    assert type(model) is PeftModel
    layers = lora_layers(model)
    assert set(layers) == {t.name for t in learner.targets}
    for t in learner.targets:
        layer = layers[t.name]
        assert type(layer) is LoraLinear
        scale = 0.2 + 0.8 * t.depth / 2
        assert layer.scaling["default"] == pytest.approx(scale * 6 / 3, rel=1e-12)  # M6: layer_scale · lora_alpha / r
    assert learner.records == []


def test_A_is_the_residual_factor_and_B_is_zero(opened):
    learner, model = opened
    twin = ContinualLearner(make_net(blocks=3), learner.config)
    G = collect_gradients(twin.model, twin.targets, twin.store, loader(), loss_fn)
    for name, A in A_of(model).items():
        assert torch.equal(A, residual_factor(G[name], twin.U[name], 3)), name
        assert A.shape[0] == min(3, torch.linalg.matrix_rank(project_out(G[name], twin.U[name]), rtol=1e-5))
        assert float((A @ learner.U[name]).abs().max()) <= 1e-6
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5)
        # Not any directions of the residual space, but the leading ones (M4).
        G_hat = project_out(G[name], twin.U[name])
        assert float((G_hat @ A.double().T).norm()) >= 0.999 * float(torch.linalg.svdvals(G_hat)[:3].norm())
        assert not lora_layers(model)[name].lora_B["default"].weight.any()


def test_only_B_trains(opened):
    learner, model = opened
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.model.{t.name}.lora_B.default.weight" for t in learner.targets}
    ranks = {name: len(A) for name, A in A_of(model).items()}
    assert set(ranks.values()) == {2, 3}
    assert learner._open.info["trained_parameters"] == sum(ranks[t.name] * t.n_out for t in learner.targets)


def test_output_is_unchanged_at_the_start(opened):
    _, model = opened
    with torch.no_grad():
        assert torch.equal(model.eval()(X), make_net(blocks=3).eval()(X))


@pytest.mark.parametrize("how", ["disable_adapter", "set_adapter", "requires_grad_"])
def test_A_is_frozen_again_before_every_step(opened, how):
    learner, model = opened
    before = {name: A.detach().clone() for name, A in A_of(model).items()}
    if how == "disable_adapter":
        with model.disable_adapter():
            model(X)
    elif how == "set_adapter":
        model.set_adapter("default")
    else:
        model.requires_grad_(True)
    assert any(A.requires_grad for A in A_of(model).values()), "PEFT did not thaw A: the test shows nothing"
    optimizer = torch.optim.AdamW(A_of(model).values(), lr=0.1)
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if "lora_B" in n]})
    for batch in loader():
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    for name, A in A_of(model).items():
        assert not A.requires_grad
        assert torch.equal(A, before[name])
        assert lora_layers(model)[name].lora_B["default"].weight.any()
    learner.finish_task()
    assert learner.audit().passed


def test_step_is_refused_when_A_was_changed(opened):
    _, model = opened
    with torch.no_grad():
        A_of(model)["encoder.layers.1.up"].add_(0.1)
    with pytest.raises(KeepLoraError, match=r"A of encoder\.layers\.1\.up was changed during the task"):
        train(model, loader())


def test_change_behind_torchs_back_is_refused_at_the_end(opened):
    learner, model = opened
    before = weights(make_net(blocks=3))
    A_of(model)["encoder.layers.1.up"].data.mul_(1.01)
    train(model, loader())
    with pytest.raises(KeepLoraError, match=r"A of encoder\.layers\.1\.up was changed"):
        learner.finish_task()
    assert same(weights(learner.model), before)


def test_weight_decay_leaves_the_update_in_the_residual(opened):
    learner, model = opened
    A = {name: A.detach().clone() for name, A in A_of(model).items()}
    train(model, loader(), steps=10, weight_decay=0.5)
    learner.finish_task()
    assert all(torch.equal(learner.records[0].factors[name].A, A[name]) for name in A)
    assert learner.audit().factor_leak_max <= 1e-5


def test_forward_stability(opened):
    """For x in span(U), (W + sBA) x = W x, whatever B has become."""
    learner, model = opened
    W0 = {t.name: learner.store.W0[t.name].clone() for t in learner.targets}
    U0 = {name: U.clone() for name, U in learner.U.items()}
    train(model, loader(), steps=20, lr=0.3)
    learner.finish_task()
    for name in W0:
        moved = learner.store.current(name) - W0[name]
        assert float(moved.norm()) > 0.1
        assert float((moved @ U0[name]).abs().max()) <= 1e-5 * float(moved.norm())


def test_other_models_optimizers_are_left_alone(opened):
    learner, model = opened
    with torch.no_grad():
        A_of(model)["encoder.layers.1.up"].add_(0.1)
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(KeepLoraError, match="was changed during the task"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    learner.abort_task()


def test_learner_that_is_dropped_with_an_open_task_is_freed():
    learner = ContinualLearner(make_net(), config())
    learner.start_task("a", loader(), loss_fn)
    hook = learner._open.adapter._handle.id
    gone = weakref.ref(learner._open.adapter)
    assert hook in optimizer_module._global_optimizer_pre_hooks
    del learner
    gc.collect()
    assert gone() is None
    assert hook not in optimizer_module._global_optimizer_pre_hooks


class Alike(nn.Module):
    """The name of one linear is the end of another's: PEFT matches by suffix, we must not."""

    def __init__(self, train_first: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2)
        self.blocks = make_net().encoder.layers

    def forward(self, x):
        y = self.up(x.mean(1)).sum(1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)[:, :3] * (1 + y)


@pytest.mark.parametrize("exclude", [None, ["blocks.0.up"]])
def test_name_that_ends_another_name(exclude):
    torch.manual_seed(0)
    learner = ContinualLearner(Alike(), config(target_modules=["up"], exclude_modules=exclude, r=4))
    model = learner.start_task("a", loader(), loss_fn)
    assert set(lora_layers(model)) == {t.name for t in learner.targets}
    for t in learner.targets:
        assert lora_layers(model)[t.name].scaling["default"] == pytest.approx(t.s)
    assert lora_layers(model)["up"].r["default"] <= 2
    assert lora_layers(model)["blocks.1.up"].r["default"] == 4
    assert ("blocks.0.up" in lora_layers(model)) == (exclude is None)
    train(model, loader())
    learner.finish_task()


def test_hooks_that_peft_sets_for_checkpointing_go_with_the_adapter():
    class WithEmbeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.net = nn.Linear(WIDTH, WIDTH), make_net()

        def get_input_embeddings(self):
            return self.table

        def forward(self, x):
            return self.net(self.table(x))

    model = WithEmbeddings()
    mine = model.table.register_forward_hook(lambda *a: None)
    learner = ContinualLearner(model, config())
    for name in ("a", "b"):
        with learner.task(name, loader(), loss_fn) as peft_model:
            assert len(model.table._forward_hooks) == 2, "PEFT set no hook: the test shows nothing"
            train(peft_model, loader())
        assert list(model.table._forward_hooks) == [mine.id]


def test_towers_get_their_own_rank_and_scale():
    learner = ContinualLearner(
        make_towers(), config(r={"vision": 4, "text": 2}, gamma={"vision": 0.5, "text": 1.0}, lora_alpha=4,
                              energy_weights={"vision": 0.5, "text": 0.0}),
    )  # fmt: skip
    model = learner.start_task("a", loader(), loss_fn)
    for name, layer in lora_layers(model).items():
        depth = int(name.split(".layers.")[1][0])
        if name.startswith("text_model"):
            assert (layer.r["default"], layer.scaling["default"]) == (2, 2.0)
            assert learner.U[name].shape[1] == 0
        else:
            assert layer.r["default"] <= 4
            assert layer.scaling["default"] == pytest.approx(0.5 + 0.25 * depth)
            assert learner.U[name].shape[1] > 0
    learner.abort_task()
    assert hooks(learner.model) == []


def test_the_largest_update_is_that_of_the_whole_product():
    learner = ContinualLearner(make_net(blocks=3), config(gamma=0.2, lora_alpha=6))
    learner.start_task("a", loader(), loss_fn)
    assert learner._open is not None
    adapter = learner._open.adapter
    assert adapter is not None
    told = learner.largest_update()
    assert told is not None
    assert told[1] == 0.0  # B = 0
    torch.manual_seed(0)
    with torch.no_grad():
        for name in adapter.targets:
            adapter.weights(name)[1].normal_()
    ratios = {
        name: float((adapter.targets[name].s * B @ A).norm() / learner.store.W0[name].norm())
        for name in adapter.targets for A, B in [[w.detach() for w in adapter.weights(name)]]
    }  # fmt: skip
    layer, ratio = learner.largest_update() or ("", 0.0)
    assert layer == max(ratios, key=ratios.__getitem__)
    assert ratio == pytest.approx(ratios[layer], rel=1e-5)


def test_a_task_opened_again_takes_no_statistics(opened):
    learner, _ = opened
    state = learner.task_state()
    again = ContinualLearner(make_net(blocks=3), config(gamma=0.2, lora_alpha=6))

    def never(*args):
        raise AssertionError("the statistics were taken again")

    model = again.start_task("a", [], never, saved=state)
    one, other = A_of(opened[1]), A_of(model)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert again.task_state().values == state.values
    assert all(not p.requires_grad for p in A_of(model).values())
