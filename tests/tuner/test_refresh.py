"""Half of A's rows taken at the task's half: where they lie, what they are the best of, and that nothing else moves then."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.errors import ConfigError
from keeplora.math import residual_factor
from keeplora.methods import get_method
from keeplora.tuner.ledger_check import verify
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.persistence import open_ledger
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, per_sample, same, weights


def half_way(learner: ContinualLearner, name: str, seed: int, steps: int = 6) -> Any:
    """Learn a task as a training loop does; what was seen around its half."""
    batches, seen = loader(seed=seed), {}
    items = list(batches)
    model = learner.start_task(name, batches, per_sample)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
    model.eval()
    for i in range(steps):
        optimizer.zero_grad()
        loss_fn(model, items[i % len(items)]).backward()
        optimizer.step()
        if 2 * (i + 1) == steps:
            adapter = learner._open.adapter
            pairs = {n: tuple(w.detach().clone() for w in adapter.weights(n)) for n in adapter.targets}
            seen["before"], seen["y"] = pairs, model(items[0][0]).detach()
            forget = learner.midway()
            for p in forget:
                assert optimizer.state.pop(p, None) is not None
            seen["forgotten"] = {id(p) for p in forget} == {id(p) for p in parameters}
            seen["after"] = {n: tuple(w.detach().clone() for w in adapter.weights(n)) for n in adapter.targets}
            seen["after y"] = model(items[0][0]).detach()
            seen["trains"] = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in seen["trains"]} == {id(p) for p in parameters}
    seen["record"] = learner.finish_task()
    return seen


def test_the_second_half_of_the_rows_is_the_best_beyond_the_first():
    learner = ContinualLearner(make_net(), config(r=4, lora_alpha=4, refresh_factor=True))
    half_way(learner, "a", 0)
    seen = half_way(learner, "b", 1)
    assert torch.equal(seen["y"], seen["after y"])
    assert seen["forgotten"]
    new = 0
    for t in learner.targets:
        A, B = seen["before"][t.name]
        A2, B2 = seen["after"][t.name]
        first = -(-len(A) // 2)
        assert not A[first:].any()
        assert not B[:, first:].any(), "a column of B without its row was moved"
        assert torch.equal(A2[:first], A[:first])
        assert torch.equal(B2, B)
        f, U = seen["record"].factors[t.name], learner.U.after(t.name, 1)
        assert torch.allclose(f.A @ f.A.T, torch.eye(len(f.A)), atol=1e-5)
        assert float((f.A @ U).abs().max()) <= 1e-6
        assert f.B.shape[1] == len(f.A) <= 4
        assert f.B.abs().amax(0).min() > 0, "a row that is there did not train"
        new += len(f.A) - first
    assert new == learner.records[1].info["refreshed"] > 0


def test_the_gradient_is_that_of_the_weights_with_the_adapter():
    """At W + s B A, from a model into which that was written, projected off U and the rows that are there."""
    learner = ContinualLearner(make_net(), config(r=4, lora_alpha=4, refresh_factor=True))
    seen = half_way(learner, "a", 0)
    net = make_net()
    twin = ContinualLearner(net, config(r=4, lora_alpha=4))
    with torch.no_grad():
        for t in learner.targets:
            A, B = seen["before"][t.name]
            net.get_submodule(t.name).weight += t.s * B @ A
    G = collect_gradients(net, twin.targets, twin.store, loader(seed=0), per_sample)
    for t in learner.targets:
        A2 = seen["after"][t.name][0]
        first = -(-len(A2) // 2)
        taken = learner.U.after(t.name, 0)
        wanted = residual_factor(G[t.name], torch.cat([taken, A2[:first].T], dim=1), len(A2) - first)
        found = A2[first:][A2[first:].abs().amax(1) > 0]
        assert found.shape == wanted.shape
        assert torch.allclose(found.T @ found, wanted.T @ wanted, atol=1e-3)


def test_what_is_protected_stays_and_the_ledger_holds_up(tmp_path):
    learner = ContinualLearner(make_net(), config(r=4, lora_alpha=4, refresh_factor=True), ledger=tmp_path / "ledger")
    for i in range(3):
        half_way(learner, f"task {i}", i)
    for i, record in enumerate(learner.records):
        for name, f in record.factors.items():
            assert float((f.delta @ learner.U.after(name, i)).abs().max()) <= 1e-5 * float(f.delta.norm()) + 1e-8
    verify(open_ledger(tmp_path / "ledger"))
    shutil.copytree(tmp_path / "ledger", tmp_path / "copy")
    again = ContinualLearner.from_pretrained(tmp_path / "copy", make_net(), append=True)
    assert same(weights(learner.model), weights(again.model))
    half_way(learner, "more", 7)
    half_way(again, "more", 7)
    assert same(weights(learner.model), weights(again.model))


def test_a_task_opened_again_knows_which_half_it_is_in():
    learner = ContinualLearner(make_net(), config(r=4, lora_alpha=4, refresh_factor=True))
    learner.start_task("a", loader(), loss_fn)
    first = learner.task_state()
    learner.midway()
    second = learner.task_state()
    learner.abort_task()
    learner.start_task("a", loader(), loss_fn, saved=first)
    learner.midway()
    found = learner.task_state()
    assert found.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(found.tensors[k], second.tensors[k]) for k in found.tensors)
    learner.abort_task()
    learner.start_task("a", loader(), loss_fn, saved=second)
    assert all(torch.equal(v, second.tensors[k]) for k, v in learner.task_state().tensors.items())
    assert learner.task_state().values["info"]["refreshed"] == second.values["info"]["refreshed"]
    learner.abort_task()


def test_a_loop_that_never_says_that_it_is_half_way_is_told():
    learner = ContinualLearner(make_net(), config(r=4, lora_alpha=4, refresh_factor=True))
    with pytest.warns(UserWarning, match=r"call the learner's midway\(\)"):
        learn(learner, "a", 0)
    assert max(len(f.A) for f in learner.records[0].factors.values()) == 2


def test_without_the_option_midway_does_nothing():
    learner = ContinualLearner(make_net(), config())
    learner.start_task("a", loader(), loss_fn)
    state = learner.task_state()
    assert learner.midway() == []
    assert all(torch.equal(v, state.tensors[k]) for k, v in learner.task_state().tensors.items())
    learner.abort_task()


@pytest.mark.parametrize("more", [{"refresh_factor": True}, {"rank_allocation": "gain"}], ids=str)
def test_methods_with_another_A_refuse_it(more: dict[str, Any]):
    for name in ("lora", "inflora", "gpm-lora", "sd-lora"):
        method = get_method(name)
        values = {k: v for k, v in vars(config()).items() if k not in more}
        settings: KeepLoraConfig = method.make_config({**values, **more})
        with pytest.raises(ConfigError, match=f"{next(iter(more))} is for the methods"):
            method.learner(make_net(), settings)
    with pytest.raises(ConfigError, match="refresh_factor must be true or false"):
        config(refresh_factor=1)


def test_it_goes_with_the_other_choices():
    net: nn.Module = make_net()
    learner = ContinualLearner(
        net, config(refresh_factor=True, rank_allocation="gain", energy_allocation="pooled", schedule="measured")
    )
    seen = half_way(learner, "a", 0)
    assert torch.equal(seen["y"], seen["after y"])
    for f in seen["record"].factors.values():
        assert torch.allclose(f.A @ f.A.T, torch.eye(len(f.A)), atol=1e-5)
