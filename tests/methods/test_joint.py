"""Joint training: the learner is sequential LoRA's; what differs is that the data of all tasks is trained on at once."""

from __future__ import annotations

import torch

from keeplora.methods import get_method
from tests.methods.lifecycle import check_lifecycle, learn, make_learner
from tests.tuner.blocks import TARGETS, make_net, same, weights


def test_dropped_and_reloaded(clip_folder, tmp_path):
    check_lifecycle("joint", clip_folder, tmp_path / "out")


def test_it_is_scheduled_jointly_and_sequential_lora_is_not():
    assert get_method("joint").learner.schedule == "joint"
    assert get_method("lora").learner.schedule == "sequential"
    assert get_method("joint").trains


def test_the_adapter_is_sequential_loras():
    nets = [make_net(), make_net()]
    learners = [make_learner(name, net, TARGETS) for name, net in zip(("joint", "lora"), nets, strict=True)]
    before = weights(nets[0])
    for learner in learners:
        torch.manual_seed(0)  # dropout
        learn(learner, "all", seed=1)
    assert same(weights(nets[0]), weights(nets[1]))
    assert not same(weights(nets[0]), before)
    factors = [learner.records[0].factors for learner in learners]
    for name in factors[0]:
        assert torch.equal(factors[0][name].A, factors[1][name].A)
        assert torch.equal(factors[0][name].B, factors[1][name].B)


def test_tasks_that_wait_for_the_last_keep_the_model_as_it_is():
    net = make_net()
    learner = make_learner("joint", net, TARGETS)
    before = weights(net)
    learner.sit_out("first", {"deferred": True})
    assert same(weights(net), before)
    learn(learner, "second", seed=1)
    assert [bool(record.factors) for record in learner.records] == [False, True]
    assert not same(weights(net), before)
