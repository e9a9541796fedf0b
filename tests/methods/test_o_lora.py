"""O-LoRA: the penalty's value and gradient against a plain computation, and what it does to the overlap."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods import get_method
from keeplora.tuner.adapter import ADAPTER
from tests.methods.lifecycle import check_lifecycle, learn, make_learner, train
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net

NOTHING = torch.zeros(0)


def o_lora(net, **options):
    return make_learner("o-lora", net, TARGETS, options=options)


def factors_of(net, learner):
    layers = {t.name: net.get_submodule(t.name) for t in learner.targets}
    return {n: (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for n, layer in layers.items()}


def test_value_and_gradient_against_loops():
    net = make_net()
    learner = o_lora(net, lam1=0.3, lam2=0.2)
    learn(learner, "one", seed=1)
    learn(learner, "two", seed=2)
    learner.start_task("three", loader(seed=3), loss_fn)
    now = factors_of(net, learner)
    with torch.no_grad():
        for _, B in now.values():
            B.normal_(generator=torch.Generator().manual_seed(4))
    learner.penalty(None, NOTHING).backward()
    total = 0.0
    for name, (A, B) in now.items():
        gradient = torch.zeros_like(A)
        for record in learner.records:
            for old in record.factors[name].A:
                for j, row in enumerate(A.detach()):
                    product = float(old @ row)
                    total += 0.3 * abs(product)
                    gradient[j] += 0.3 * (1 if product > 0 else -1) * old
        for M, extra in ((A, gradient), (B, torch.zeros_like(B))):
            norm = float(M.detach().square().sum().sqrt())
            total += 0.2 * norm
            assert torch.allclose(M.grad, extra + 0.2 * M.detach() / norm, atol=1e-5)
    assert float(learner.penalty(None, NOTHING).detach()) == pytest.approx(total, rel=1e-5)
    learner.abort_task()


def test_no_penalty_where_there_is_nothing_to_turn_from():
    net = make_net()
    learner = o_lora(net)
    assert (learner.options.lam1, learner.options.lam2) == (0.5, 0.0)
    assert learner.penalty(None, NOTHING) is None  # no task is open
    learner.start_task("one", loader(), loss_fn)
    assert learner.penalty(None, NOTHING) is None  # no task before it
    learner.abort_task()
    learn(learner, "one", seed=1)
    assert learner.penalty(None, NOTHING) is None  # finished
    learner.start_task("two", loader(), loss_fn)
    assert float(learner.penalty(None, NOTHING).detach()) > 0
    learner.abort_task()
    assert learner.penalty(None, NOTHING) is None


def test_norms_alone_start_at_a_finite_gradient():
    net = make_net()
    learner = o_lora(net, lam1=0.0, lam2=1.0)
    learner.start_task("one", loader(), loss_fn)
    learner.penalty(None, NOTHING).backward()
    for _, B in factors_of(net, learner).values():  # the norm of B = 0 has no gradient of its own; it must not be NaN
        assert torch.equal(B.grad, torch.zeros_like(B))


def test_overlap_falls_with_lambda():
    def overlap(lam1: float) -> float:
        net = make_net()
        learner = learn(o_lora(net, lam1=lam1), "one", seed=1)
        batches = loader(seed=2)
        model = learner.start_task("two", batches, loss_fn)
        train(learner, model, batches, steps=30, lr=5e-3)
        record = learner.finish_task()
        return sum(float((learner.records[0].factors[n].A @ f.A.T).abs().sum()) for n, f in record.factors.items())

    assert overlap(0.5) < 0.2 * overlap(0.0)


def test_without_the_penalty_it_is_sequential_lora():
    ours, plain = o_lora(make_net(), lam1=0.0), make_learner("lora", make_net(), TARGETS)
    for learner in (ours, plain):
        torch.manual_seed(0)  # the net has dropout
        learn(learner, "one", seed=1)
        learn(learner, "two", seed=2)
    assert all(torch.equal(ours.store.current(t.name), plain.store.current(t.name)) for t in plain.targets)


@pytest.mark.parametrize(("options", "message"), [
    ({"lam1": -1.0}, "tuner.options.lam1 must be a finite number of at least 0, got -1.0"),
    ({"lam2": float("inf")}, "tuner.options.lam2 must be a finite number of at least 0, got inf"),
    ({"lam": 1.0}, "unknown option 'lam'; did you mean 'lam2'"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        o_lora(make_net(), **options)


def test_table():
    method = get_method("o-lora")
    assert method.state == "A of every task and target"
    assert "2310.14152" in method.paper


def test_lifecycle(clip_folder, tmp_path):
    check_lifecycle("o-lora", clip_folder, tmp_path / "out", options={"lam1": 0.1, "lam2": 0.01})
