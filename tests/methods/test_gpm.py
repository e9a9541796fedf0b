"""GPM-LoRA: A stays off the old tasks' inputs, whatever AdamW does."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import CapacityError, KeepLoraError
from keeplora.methods import get_method
from keeplora.tuner.adapter import ADAPTER
from keeplora.tuner.basis import Bases
from tests.methods.lifecycle import check_lifecycle, learn, make_learner, train
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net, same, weights


def gpm(net, **values):
    return make_learner("gpm-lora", net, TARGETS, **values)


def A_of(net, learner):
    return {t.name: net.get_submodule(t.name).lora_A[ADAPTER].weight for t in learner.targets}


def overlap(net, learner) -> float:
    """max |A U| over the layers."""
    return max(float((A.detach() @ learner.U[n]).abs().max()) for n, A in A_of(net, learner).items())


def test_A_stays_off_old_inputs_under_adamw_with_weight_decay():
    net = make_net()
    learner = learn(gpm(net), "one", seed=1)
    assert all(0 < U.shape[1] < U.shape[0] for U in learner.U.values())
    batches = loader(seed=2)
    model = learner.start_task("two", batches, loss_fn)
    start = {n: A.detach().clone() for n, A in A_of(net, learner).items()}
    assert overlap(net, learner) < 1e-6
    assert any(p.requires_grad for p in start.values()) is False
    train(learner, model, batches, steps=10, lr=0.05, weight_decay=0.1)
    assert overlap(net, learner) < 1e-6
    moved = min(float((A.detach() - start[n]).norm() / start[n].norm()) for n, A in A_of(net, learner).items())
    assert moved > 0.05, "A is to train, not to stay where it was"
    one_step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    loss_fn(model, next(iter(batches))).backward()
    one_step.step()
    assert overlap(net, learner) > 1e-3  # what a single step without the projection does
    learner.after_step()
    record = learner.finish_task()
    for name, f in record.factors.items():
        U = learner.U[name][:, : learner.records[0].used[name]]
        assert float((f.delta @ U).norm() / f.delta.norm()) < 1e-5
    assert learner.audit().passed


def test_old_inputs_are_answered_as_before():
    net = make_net()
    learner = learn(gpm(net), "one", seed=1)
    U, W = dict(learner.U), {n: learner.store.current(n).clone() for n in learner.U}
    learn(learner, "two", seed=2, steps=10)
    for name in U:
        moved = learner.store.current(name) - W[name]
        assert float(moved.norm()) > 1e-2
        assert float((moved @ U[name]).norm() / moved.norm()) < 1e-5


def test_a_loop_without_the_projection_is_refused():
    net = make_net()
    learner = learn(gpm(net), "one", seed=1)
    before, U = weights(net), dict(learner.U)
    batches = loader(seed=2)
    model = learner.start_task("two", batches, loss_fn)
    learner.after_step = lambda: None  # a loop that does not know of it
    train(learner, model, batches)
    with pytest.raises(KeepLoraError, match=re.escape("call the learner's after_step() after every optimiser step")):
        learner.finish_task()
    assert same(weights(net), before)
    assert same(learner.U, U)
    assert len(learner.records) == 1


def test_nothing_is_protected_before_the_first_task():
    net = make_net()
    learner = gpm(net, energy_weights=0.9, memory="gradients")  # the method's own values win
    assert all(U.shape[1] == 0 for U in learner.start_bases().values())
    first = learner.start_task("one", loader(), loss_fn)
    lora = make_learner("lora", make_net(), TARGETS)
    other = lora.start_task("one", loader(), loss_fn)
    assert same(weights(first), weights(other))  # as plain LoRA starts
    learner.after_step()
    assert same(weights(first), weights(other))
    learner.abort_task()
    assert learner.config.memory == "features"


def test_rank_shrinks_with_the_room_and_ends_in_an_error():
    net = make_net()
    learner = learn(gpm(net, energy_features=1.0), "one", seed=1)
    learner._U = Bases.of(  # one direction is left everywhere, then none
        {
            name: torch.linalg.qr(torch.cat([U, torch.eye(U.shape[0])], 1)).Q[:, : U.shape[0] - 1]
            for name, U in learner.U.items()
        }
    )
    model = learner.start_task("two", loader(seed=2), loss_fn)
    assert {A.shape[0] for A in A_of(net, learner).values()} == {1}
    assert len(learner._open.info["rank_shrunk"]) == len(learner.targets)
    assert model is not None
    learner.abort_task()
    learner._U = Bases.of({name: torch.eye(U.shape[0]) for name, U in learner.U.items()})
    with pytest.raises(CapacityError, match="task 'two' cannot be learned: no target has residual space left"):
        learner.start_task("two", loader(seed=2), loss_fn)
    assert learner._open is None


def test_table():
    method = get_method("gpm-lora")
    assert (method.trained, method.task_identity, method.extra_data) == ("A and B of every target", False, "none")
    assert "2103.09762" in method.paper


def test_lifecycle(clip_folder, tmp_path):
    check_lifecycle("gpm-lora", clip_folder, tmp_path / "out")
