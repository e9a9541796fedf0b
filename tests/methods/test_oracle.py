"""The per-task oracle: each task's adapter is learned from W₀ and is in the model only while that task is served."""

from __future__ import annotations

import pytest
import torch

from keeplora.methods import get_method
from keeplora.models import load_model
from tests.methods.families import FamilyTask
from tests.methods.lifecycle import learn, make_learner, train
from tests.tuner.blocks import TARGETS, hooks, make_net, same, weights


def learned(seed: int = 0):
    net = make_net()
    learner = make_learner("oracle", net, TARGETS, seed=seed)
    for i, name in enumerate(("one", "two"), 1):
        torch.manual_seed(0)  # dropout
        learn(learner, name, seed=i)
    return net, learner


def test_the_model_stays_at_its_start_and_serving_puts_the_update_in():
    before = weights(make_net())
    net, learner = learned()
    assert same(weights(net), before)
    assert not learner.store.delta
    served = {}
    for record in learner.records:
        with learner.serving(record.name):
            served[record.name] = weights(net)
        assert same(weights(net), before)
        changed = {name for name in before if not torch.equal(before[name], served[record.name][name])}
        assert changed == {f"{t.name}.weight" for t in learner.targets}
        for t in learner.targets:
            f = record.factors[t.name]
            expected = before[f"{t.name}.weight"] + f.s * f.B @ f.A
            torch.testing.assert_close(served[record.name][f"{t.name}.weight"], expected)
    assert not same(served["one"], served["two"])


def test_a_task_is_learned_as_if_it_were_the_first():
    """The second task starts from W₀: alone, with the same random start, sequential LoRA reaches the same weights."""
    net, learner = learned()
    alone = make_net()
    lora = make_learner("lora", alone, TARGETS)
    lora.sit_out("one")  # the random start depends on how many tasks there were
    torch.manual_seed(0)
    learn(lora, "two", seed=2)
    with learner.serving("two"):
        assert same(weights(net), weights(alone))


def test_a_task_that_is_not_learned_is_served_by_the_untouched_model():
    net, learner = learned()
    before = weights(net)
    for task in ("three", None):
        with learner.serving(task):
            assert same(weights(net), before)


def test_serving_inside_serving():
    net, learner = learned()
    before = weights(net)
    with learner.serving("one"):
        one = weights(net)
        with learner.serving("two"):
            two = weights(net)
            with learner.serving(None):
                assert same(weights(net), before)
            assert same(weights(net), two)
        assert same(weights(net), one)
    assert not same(one, two)
    assert same(weights(net), before)


def test_the_model_is_given_back_when_serving_fails():
    net, learner = learned()
    before = weights(net)
    with pytest.raises(RuntimeError, match="boom"), learner.serving("one"):
        raise RuntimeError("boom")
    assert same(weights(net), before)
    assert not learner.store.delta


def test_low_precision_is_given_back_bit_for_bit():
    net = make_net(dtype=torch.bfloat16)
    before = weights(net)
    learner = make_learner("oracle", net, TARGETS)
    model = learner.start_task("one", [], lambda model, batch: torch.zeros(()))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    learner.finish_task()
    assert same(weights(net), before)
    with learner.serving("one"):
        assert not same(weights(net), before)
    assert same(weights(net), before)


def test_a_task_in_training_is_served_with_its_adapter():
    """`validate` during training asks for the task that is open: the adapter must stay in place."""
    net, learner = learned()
    model = learner.start_task("three", [], lambda model, batch: torch.zeros(()))
    B = next(p for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        B.fill_(1.0)
    inside = weights(model)
    with learner.serving("three"):
        assert same(weights(model), inside)
    learner.abort_task()
    assert same(weights(net), weights(make_net()))


def test_dropped_and_reloaded(clip_folder, tmp_path):
    encoder, other = load_model(clip_folder), load_model(clip_folder)
    learner = make_learner("oracle", encoder.model, encoder.default_target_modules)
    before, hooked = weights(encoder.model), hooks(encoder.model)
    flags = {n: p.requires_grad for n, p in encoder.model.named_parameters()}
    tasks = {name: FamilyTask(encoder, name) for name in ("one", "two")}
    start = {name: task.mean_loss() for name, task in tasks.items()}
    for name, task in tasks.items():
        train(learner, task.start(learner, name), task.batches, task.loss, steps=1)
        learner.abort_task()
        assert same(weights(encoder.model), before)
        assert hooks(encoder.model) == hooked
        assert {n: p.requires_grad for n, p in encoder.model.named_parameters()} == flags
        train(learner, task.start(learner, name), task.batches, task.loss)
        learner.finish_task()
        assert task.mean_loss() == start[name]

    again = get_method("oracle").learner.from_pretrained(learner.save_pretrained(tmp_path / "out"), other.model)
    assert same(weights(other.model), before)
    assert again.state_bytes() == learner.state_bytes()
    for name, task in tasks.items():
        twin = FamilyTask(other, name)
        with learner.serving(name), again.serving(name):
            assert task.mean_loss() < start[name] - 0.02, "nothing was learned"
            assert twin.mean_loss() == task.mean_loss()
            assert same(weights(other.model), weights(encoder.model))


def test_state_bytes():
    _, learner = learned()
    one = sum(4 * (t.n_in + t.n_out) * min(t.r, t.n_in, t.n_out) for t in learner.targets)
    assert learner.state_bytes() == 2 * one


def test_it_must_be_told_the_task():
    method = get_method("oracle")
    assert method.task_identity
    assert not method.learner.accumulates
    assert [name for name in ("lora", "joint", "rail-dual") if get_method(name).task_identity] == []
