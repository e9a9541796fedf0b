"""What happens when little or no residual space is left: never a silent truncation (METHOD.md, point 7)."""

from __future__ import annotations

import warnings

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import CapacityError
from keeplora.math import orthonormality_error
from tests.tuner.blocks import config, hooks, learn, loader, loss_fn, make_net, same, train, weights


def test_nothing_left_anywhere_is_an_error_that_says_what_to_do():
    net = make_net()
    before = weights(net)
    learner = ContinualLearner(net, config(target_modules=["q"], energy_weights=1.0))
    with pytest.raises(
        CapacityError, match=r"^task 'a' cannot be learned: no target has residual space left .*lower energy"
    ):
        learner.start_task("a", loader(), loss_fn)
    assert same(weights(net), before)
    assert hooks(net) == []
    record = learner.sit_out("a", {"why": "full"})
    assert (record.factors, [r.name for r in learner.records]) == ({}, ["a"])


def test_layer_without_room_sits_the_task_out_with_a_warning():
    learner = ContinualLearner(make_net(), config(target_modules=["q", "k"], energy_weights=1.0))
    with pytest.warns(
        UserWarning, match=r"task 'a': no residual space is left in 2 of 4 targets, which sit this task out"
    ):
        model = learner.start_task("a", loader(), loss_fn)
    assert learner._open.info["not_adapted"] == ["encoder.layers.0.q", "encoder.layers.1.q"]
    assert not any(".q.lora" in n for n, _ in model.named_parameters())
    train(model, loader())
    record = learner.finish_task()
    assert set(record.factors) == {"encoder.layers.0.k", "encoder.layers.1.k"}
    assert "q" in record.info["not_adapted"][0]
    assert learner.audit().passed
    assert record.layers()["encoder.layers.0.q"]["rank"] == 0


def test_rank_shrinks_to_the_room_and_keeps_the_scale():
    learner = ContinualLearner(
        make_net(), config(target_modules=["up"], r=5, lora_alpha=10, energy_weights=0.97, gamma=0.2)
    )
    room = {name: 12 - U.shape[1] for name, U in learner.U.items()}
    assert all(0 < left < 5 for left in room.values()), room
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a smaller rank is a note in the record, not a warning
        model = learner.start_task("a", loader(), loss_fn)
    assert sorted(learner._open.info["rank_shrunk"]) == sorted(room)
    for t in learner.targets:
        layer = model.base_model.model.get_submodule(t.name)
        assert layer.r["default"] <= room[t.name]
        # alpha / r' of PEFT, with the configured r of 5 behind it: a shrunk layer must not learn faster.
        assert layer.scaling["default"] == pytest.approx((0.2, 1.0)[t.depth] * 10 / 5)
    train(model, loader())
    learner.finish_task()


def test_capacity_runs_out_over_tasks_loudly_and_U_stays_orthonormal():
    learner = ContinualLearner(make_net(), config(r=4, energy_features=0.999))
    outcome = None
    for i in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                learn(learner, f"t{i}", seed=i)
            except CapacityError as error:
                outcome = error
                break
        for name, U in learner.U.items():
            assert orthonormality_error(U) <= 1e-5
            assert U.dtype == torch.float32
            assert U.shape[1] <= U.shape[0]
            assert learner.records[-1].used[name] == U.shape[1]
            if i:
                assert U.shape[1] >= learner.records[-2].used[name]
    assert outcome is not None, "capacity never ran out: the test shows nothing"
    assert len(learner.records) >= 2
    assert learner.audit().passed
    assert any(r.info["not_adapted"] or r.info["rank_shrunk"] for r in learner.records)
