"""SD-LoRA: the live layer is the formula, the records add up to it, and magnitudes are a function of the records."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods import get_method
from keeplora.tuner.persistence import concatenated
from tests.methods.lifecycle import check_lifecycle, learn, make_learner, train
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net, weights

UP = "encoder.layers.0.up"


def sd_lora(net, **options):
    return make_learner("sd-lora", net, TARGETS, options=options)


def three_tasks(net):
    learner = sd_lora(net)
    for i in range(3):
        learn(learner, f"task {i}", seed=i, steps=6)
    return learner


def test_live_layer_is_the_formula():
    net = make_net()
    W0 = {n: p.double() for n, p in weights(net).items()}
    learner = learn(learn(sd_lora(net), "one", seed=1), "two", seed=2)
    batches = loader(seed=3)
    model = learner.start_task("three", batches, loss_fn)
    train(learner, model, batches, steps=6)
    for name, branch in learner.open_branches().items():
        linear = net.get_submodule(name)
        x = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(0))
        alpha = branch.alpha.detach().double()
        y = x.double() @ W0[f"{name}.weight"].T + linear.bias.double()
        for i, record in enumerate(learner.records):  # α_i B_i A_i x / (‖B_i‖ ‖A_i‖), from each task's own factors
            f, r = record.factors[name], branch.A.shape[0]
            A, B = f.A[-r:].double(), f.B[:, -r:].double()
            y = y + alpha[i] * (x.double() @ A.T @ B.T) / (A.norm() * B.norm())
        y = y + alpha[-1] * (x.double() @ branch.A.double().T @ branch.B.double().T)
        assert torch.allclose(linear(x).double(), y, atol=1e-5)
    moved = [float((b.alpha[:-1] - b.start).abs().min().detach()) for b in learner.open_branches().values()]
    assert min(moved) > 1e-3, "old magnitudes are to train"


def test_merged_is_live():
    net, batches = make_net(), loader(seed=3)
    net.eval()
    learner = learn(learn(sd_lora(net), "one", seed=1), "two", seed=2)
    x = torch.randn(5, 4, 12)
    model = learner.start_task("three", batches, loss_fn)
    train(learner, model, batches, steps=6)
    net.eval()
    live = net(x).detach()
    learner.finish_task()
    assert torch.allclose(net(x), live, atol=1e-5)


def test_records_add_up_to_the_directions():
    net = make_net()
    W0 = weights(net)
    learner = three_tasks(net)
    export = concatenated(learner.records)
    for t in learner.targets:
        directions, alpha = learner.directions(t.name)
        assert len(directions) == len(alpha) == 3
        wanted = sum(a * d.B @ d.A for a, d in zip(alpha, directions, strict=True))
        moved = learner.store.current(t.name) - W0[f"{t.name}.weight"]
        assert torch.allclose(moved, wanted, atol=1e-6)
        assert torch.allclose(export[t.name].delta, wanted, atol=1e-6)  # one adapter says the same
        assert [f.A.shape[0] for f in (r.factors[t.name] for r in learner.records)] == [3, 6, 9]
        for d in directions:
            assert float(d.A.norm()) == pytest.approx(1, abs=1e-6)
            assert float(d.B.norm()) == pytest.approx(1, abs=1e-6)


def test_where_magnitudes_start_and_go():
    net = make_net()
    learner = sd_lora(net, alpha=0.6)
    learner.start_task("one", loader(), loss_fn)
    branch = learner.open_branches()[UP]
    assert branch.alpha.tolist() == pytest.approx([0.6])
    assert {n for n, p in branch.named_parameters() if p.requires_grad} == {"A", "B", "alpha"}
    planned = sum(3 * (t.n_in + t.n_out) + 1 for t in learner.targets)
    assert learner._open.info["trained_parameters"] == learner.planned_parameters() == planned
    train(learner, net, loader(), steps=6)
    A, B, a = branch.A.detach(), branch.B.detach(), float(branch.alpha.detach()[0])
    assert a != pytest.approx(0.6, abs=1e-4)
    learner.finish_task()
    assert sd_lora(make_net()).options.alpha == 0.8
    learner.start_task("two", loader(seed=2), loss_fn)
    assert learner._open.info["trained_parameters"] == learner.planned_parameters() == planned + len(learner.targets)
    after = learner.open_branches()[UP]
    # The old one goes on where it was, in units of its direction; the new one starts afresh.
    assert after.alpha.tolist() == pytest.approx([a * float(A.norm() * B.norm()), 0.6])
    assert torch.allclose(after.A_old, A / A.norm())
    learner.abort_task()


def test_a_direction_that_never_moved_is_zero_and_stays_finite():
    net = make_net()
    learner = sd_lora(net)
    learner.start_task("one", loader(), loss_fn)
    learner.finish_task()  # not trained: B = 0
    learn(learner, "two", seed=2)
    _, alpha = learner.directions(UP)
    assert float(alpha[0]) == 0.0
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_a_task_that_sat_out_has_no_direction():
    learner = sd_lora(make_net())
    learn(learner, "one", seed=1)
    learner.sit_out("two")
    learn(learner, "three", seed=3)
    assert len(learner.directions(UP)[0]) == 2


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf")])
def test_bad_options(alpha):
    message = re.escape(f"tuner.options.alpha must be a finite number above 0, got {alpha!r}")
    with pytest.raises(ConfigError, match=message):
        sd_lora(make_net(), alpha=alpha)


def test_table():
    method = get_method("sd-lora")
    assert method.trained == "A, B and all magnitudes of every target"
    assert "2501.13198" in method.paper


def test_lifecycle(clip_folder, tmp_path):
    check_lifecycle("sd-lora", clip_folder, tmp_path / "out")
