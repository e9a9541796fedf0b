"""G and C come from hooks on the targets alone, and equal what autograd and stacked inputs give."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keeplora.errors import TargetError
from keeplora.tuner.observers import _Observer
from keeplora.tuner.passes import collect_features, collect_gradients
from keeplora.tuner.targets import resolve_targets
from keeplora.tuner.weights import WeightStore
from tests.tuner.blocks import (
    CLASSES,
    TARGETS,
    WIDTH,
    Samples,
    config,
    hooks,
    loader,
    loss_fn,
    make_net,
    make_towers,
    per_sample,
)

DATA = Samples(10, seed=3, rank=WIDTH)
X, Y = DATA.x, torch.tensor(DATA.labels)


def batches(size: int):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, len(Y), size)]


def parts(model, targets=TARGETS):
    found = resolve_targets(model, config(target_modules=targets))
    return found, WeightStore(model, [t.name for t in found])


def gradients(model, data, loss=loss_fn, targets=TARGETS, **kwargs):
    return collect_gradients(model, *parts(model, targets), data, loss, **kwargs)


def features(model, data, forward=loss_fn, targets=TARGETS, **kwargs):
    return collect_features(model, *parts(model, targets), data, forward, **kwargs)


def autograd_gradients(model, data=None, loss=loss_fn):
    """W.grad of an ordinary backward over everything at once, on a copy whose weights all require gradients."""
    model = copy.deepcopy(model).eval()
    model.requires_grad_(True)
    loss(model, data or (X, Y)).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters()}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())


# ---- G -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("loss", [loss_fn, per_sample, "pair"])
def test_gradient_is_autograds_whatever_the_batch_size_and_form_of_the_loss(size, loss):
    if loss == "pair":
        loss = lambda m, b: (per_sample(m, b).sum(), len(b[1]))  # noqa: E731
    net = make_net().train()  # the pass itself must switch dropout off
    G = gradients(net, batches(size), loss)
    exact = autograd_gradients(net)
    assert set(G) == {f"encoder.layers.{i}.{t}" for i in (0, 1) for t in TARGETS}
    for name, value in G.items():
        assert value.dtype == torch.float64
        assert float(exact[name].norm()) > 1e-4
        assert close(value, exact[name], 1e-5), name
    assert net.training
    assert net.dropout.training


def test_one_loss_per_answer_token():
    net = make_net()
    tokens = lambda m, b: per_sample(m, b).repeat_interleave(torch.arange(len(b[1])) % 3 + 1)  # noqa: E731
    exact = autograd_gradients(net, loss=lambda m, b: tokens(m, b).mean())
    for name, value in gradients(net, [(X, Y)], tokens).items():
        assert close(value, exact[name], 1e-5), name


def test_no_parameter_is_ever_given_a_gradient():
    net = make_net()
    for p in net.encoder.parameters():  # flags as a user might have left them
        p.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    seen = []

    def check(*_):
        seen.append(1)
        assert not any(p.requires_grad for p in net.parameters())
        assert all(p.grad is None or name == "head.weight" for name, p in net.named_parameters())

    def loss(model, batch):
        check()
        out = loss_fn(model, batch)
        out.register_hook(lambda g: check())
        return out

    handles = [m.register_forward_hook(lambda *a: check()) for m in net.modules()]
    gradients(net, batches(5), loss)
    features(net, batches(5), lambda m, b: (check(), m(b[0])))
    for handle in handles:
        handle.remove()
    assert len(seen) > 40
    after = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    assert before.keys() == after.keys()
    assert all(before[n][0] == after[n][0] and before[n][1] is after[n][1] for n in before)
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert hooks(net) == []


def test_weights_do_not_even_enter_the_graph():
    """AccumulateGrad nodes are what holds a weight's gradient: there is none behind the loss but the hooks' own leaves."""
    net = make_net()
    shapes = {tuple(p.shape) for p in net.parameters() if p.ndim == 2}

    def loss(model, batch):
        out = loss_fn(model, batch)
        stack, seen = [out.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            assert variable is None or tuple(variable.shape) not in shapes
            stack += [n for n, _ in node.next_functions]
        return out

    gradients(net, batches(5), loss)


def test_loss_that_is_not_finite_is_told():
    calls = iter([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match="the loss is nan in the gradient pass, after 4 samples"):
        gradients(make_net(), batches(4), lambda m, b: loss_fn(m, b) * next(calls))
    with pytest.raises(ValueError, match="given no sample"):
        gradients(make_net(), [])
    with pytest.raises(TypeError, match=r"loss_fn returned a float: return a scalar tensor"):
        gradients(make_net(), batches(4), lambda m, b: 1.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_count_once(reentrant):
    net = make_net()
    plain = gradients(net, batches(5), targets=[*TARGETS, "embed"])
    plain_C = features(net, batches(5), targets=[*TARGETS, "embed"])
    calls = []
    for layer in net.encoder.layers:
        forward = layer.forward
        layer.forward = functools.partial(checkpoint, lambda x, f=forward: (calls.append(1), f(x))[1],
                                          use_reentrant=reentrant)  # fmt: skip
    G = gradients(net, batches(5), targets=[*TARGETS, "embed"])
    assert len(calls) == 8, "the blocks were not computed again, so the test shows nothing"
    for name in plain:
        assert close(G[name], plain[name], 1e-6), name
    C = features(net, batches(5), targets=[*TARGETS, "embed"])
    assert all(torch.equal(C.C(name), plain_C.C(name)) for name in plain)


def test_input_changed_in_place_later_on_is_detected():
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            h = x.mean(1) * 2
            y = self.first(h)
            h.add_(1.0)
            return y

    with pytest.raises(TargetError, match="the input of first is changed in place"):
        gradients(Careless(), batches(5), targets=["first"])


def test_output_changed_in_place_is_fine():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, 7), nn.Linear(7, CLASSES)

        def forward(self, x):
            return self.last(self.first(x.mean(1)).mul_(2.0).relu_())

    torch.manual_seed(0)
    net = InPlace()
    G, exact = gradients(net, batches(5), targets=["first", "last"]), autograd_gradients(net)
    assert all(close(G[name], exact[name], 1e-5) for name in G)


def test_weight_that_is_used_twice_collects_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loop, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.last(torch.tanh(self.loop(torch.tanh(self.loop(x.mean(1))))))

    torch.manual_seed(0)
    net = Twice()
    G, exact = gradients(net, batches(5), targets=["loop"]), autograd_gradients(net)
    assert close(G["loop"], exact["loop"], 1e-5)


# ---- precision -----------------------------------------------------------------------------------------------------


def test_bf16_autocast():
    net = make_net()

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, batch)

    G, full = gradients(net, batches(5), loss), gradients(net, batches(5))
    exact = autograd_gradients(net, loss=loss)
    C, exact_C = features(net, batches(5), loss), features(net, batches(5))
    for name in G:
        assert G[name].dtype == torch.float64
        assert float((G[name] - full[name]).norm()) > 0  # it did run in bf16
        assert close(G[name], exact[name], 0.02), name
        assert close(G[name], full[name], 0.15), name
        assert close(C.C(name), exact_C.C(name), 0.02), name
    # Sums are not rounded to bf16: they hold digits that bf16 cannot.
    assert any(not torch.equal(v, v.bfloat16().double()) for v in G.values())


def test_bf16_model():
    net = make_net(dtype=torch.bfloat16)
    twin = copy.deepcopy(net).float()
    cast = lambda m, b: loss_fn(m, (b[0].bfloat16(), b[1]))  # noqa: E731
    G, exact = gradients(net, batches(5), cast), autograd_gradients(net, loss=cast)
    C, exact_C = features(net, batches(5), cast), features(twin, batches(5))
    for name in G:
        assert exact[name].dtype == torch.bfloat16
        assert close(G[name], exact[name], 0.02), name
        assert close(C.C(name), exact_C.C(name), 0.03), name


# ---- C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 10])
def test_covariance_is_that_of_the_stacked_inputs(size):
    net = make_net()
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: inputs.setdefault(n, []).append(args[0].detach().clone()))
        for name, module in net.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
    net.eval()(X)
    for handle in handles:
        handle.remove()
    observer = features(net, batches(size))
    for name in (f"encoder.layers.{i}.{t}" for i in (0, 1) for t in TARGETS):
        x = torch.cat(inputs[name]).double().flatten(0, -2)
        assert observer.C(name).shape == (x.shape[1], x.shape[1])
        assert close(observer.C(name), x.T @ x, 1e-5), name
    assert hooks(net) == []


def test_q_k_v_share_one_matrix():
    observer = features(make_net(), batches(5))
    for i in (0, 1):
        q, k, v, up, down = (f"encoder.layers.{i}.{t}" for t in TARGETS)
        assert observer.C(q) is observer.C(k)
        assert observer.C(q) is observer.C(v)
        assert observer.C(q) is not observer.C(up)
        assert {q, up, down} <= set(observer._C)
    assert len(observer._C) == 6  # of ten targets


def test_inputs_shared_only_now_and_then_are_refused():
    net = make_net(blocks=1)

    def forward(model, batch):
        model(batch[0])
        layer = model.encoder.layers[0]
        h = batch[0] * 1
        layer.q(h), layer.k(h.clone())

    with pytest.raises(
        TargetError, match=r"layers\.0\.k shared its input with encoder\.layers\.0\.q in an earlier batch"
    ):
        features(net, batches(5), forward, targets=["q", "k"])


# ---- padding -------------------------------------------------------------------------------------------------------


def padded(extra: int = 3):
    """The data with rows of rubbish behind it, and the mask that says so."""
    generator = torch.Generator().manual_seed(9)
    rubbish = 5 * torch.randn(len(Y), extra, WIDTH, generator=generator)
    mask = torch.cat([torch.ones(len(Y), X.shape[1]), torch.zeros(len(Y), extra)], dim=1).long()
    return {"x": torch.cat([X, rubbish], dim=1), "attention_mask": mask, "labels": Y}


def masked_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"], batch["attention_mask"]), batch["labels"])


def test_padding_counts_neither_in_G_nor_in_C():
    net = make_net()
    G, C = gradients(net, [padded()], masked_loss), features(net, [padded()], masked_loss)
    plain_G, plain_C = gradients(net, [(X, Y)]), features(net, [(X, Y)])
    unmasked = features(net, [padded()], masked_loss, mask_fn=lambda b: {})
    for name in G:
        assert close(G[name], plain_G[name], 1e-5), name
        assert close(C.C(name), plain_C.C(name), 1e-5), name
        assert not close(unmasked.C(name), plain_C.C(name), 0.05), "the padding would not have shown"


def test_gradient_rows_of_padding_are_dropped_even_where_the_loss_reads_them():
    net = make_net()
    read_all = lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["labels"])  # noqa: E731
    masked = gradients(net, [padded()], read_all, targets=["down"])
    everything = gradients(net, [padded()], read_all, targets=["down"], mask_fn=lambda b: {})
    assert not any(close(masked[name], everything[name], 0.01) for name in masked)


@pytest.mark.parametrize("shape", [(10, 6), (10,), (10, 7, 1)])
def test_mask_of_the_wrong_shape_is_refused(shape):
    wrong = lambda batch: {"": torch.ones(shape).bool()}  # noqa: E731
    for collect, call in ((gradients, masked_loss), (features, masked_loss)):
        with pytest.raises(
            TargetError, match=r"the mask of tower '' has shape .* but encoder\.layers\.\d\.\w+ was given"
        ):
            collect(make_net(), [padded()], call, mask_fn=wrong)


def test_masks_go_to_their_own_tower():
    model = make_towers()
    mask = torch.ones(len(Y), X.shape[1], dtype=torch.bool)
    mask[:, 2:] = False
    C = features(model, [(X, Y)], mask_fn=lambda b: {"text_model": mask})
    plain = features(model, [(X, Y)], mask_fn=lambda b: {})
    first = "model.encoder.layers.0.q"
    assert torch.equal(C.C(f"vision_{first}"), plain.C(f"vision_{first}"))
    short = features(model, [(X[:, :2], Y)], mask_fn=lambda b: {})
    assert close(C.C(f"text_{first}"), short.C(f"text_{first}"), 1e-5)


# ---- what does not take part ---------------------------------------------------------------------------------------


def test_module_that_does_not_fire_is_refused_by_name():
    net = make_net()
    net.spare, net.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TargetError, match=r"^spare, other: no gradient reached them in the first batch"):
        gradients(net, batches(5), targets=["q", "spare", "other"])
    with pytest.raises(TargetError, match=r"^spare: no input reached it"):
        features(net, batches(5), targets=["q", "spare"])
    assert hooks(net) == []


def test_module_whose_output_the_loss_does_not_use_is_refused_by_name():
    net = make_net()
    net.spare = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TargetError, match=r"^spare: no gradient reached it"):
        gradients(net, batches(5), lambda m, b: (m.spare(b[0]), loss_fn(m, b))[1], targets=["q", "spare"])


def test_towers_may_be_fed_by_separate_batches_but_all_must_be_fed():
    model = make_towers()
    forward = lambda m, b: getattr(m, b[0])(b[1])  # noqa: E731
    both = features(model, [("vision_model", X), ("text_model", X)], forward)
    plain = features(model, [(X, Y)], mask_fn=lambda b: {})
    assert all(torch.equal(both.C(n), plain.C(n)) for n in both.leader)
    with pytest.raises(TargetError, match=r"^text_model\.encoder.* and 7 more: no input reached them"):
        features(model, [("vision_model", X)], forward)


def test_loader_of_the_learner_gives_the_same():
    net = make_net()
    data = Samples(10, 0)
    exact = autograd_gradients(net, (data.x, torch.tensor(data.labels)))
    G = gradients(net, loader(10, 0, batch_size=3))
    assert all(close(G[name], exact[name], 1e-5) for name in G)


@pytest.mark.parametrize("collect", [gradients, features])
def test_products_are_float32_whatever_the_user_lets_a_gpu_do(collect, monkeypatch):
    """TF32 for the model's own passes, none in C and G; and the user's choice is in force again behind them."""
    passes, products = [], []
    model = make_net()
    model.head.register_forward_hook(lambda *_: passes.append(torch.backends.cuda.matmul.fp32_precision))
    rows = _Observer._rows
    monkeypatch.setattr(
        _Observer, "_rows", lambda *a: (products.append(torch.backends.cuda.matmul.fp32_precision), rows(*a))[1]
    )
    torch.set_float32_matmul_precision("high")
    try:
        collect(model, batches(5))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(passes) == {"tf32"}
    assert set(products) == {"ieee"}
