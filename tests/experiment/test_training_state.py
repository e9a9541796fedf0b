"""The state of a training loop, there and back."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from keeplora.experiment.checkpoint import CheckpointError
from keeplora.experiment.optim import make_optimizer, make_scheduler
from keeplora.experiment.training_state import (
    LoopState,
    Sums,
    TrainingLog,
    restore,
    resume_schedule,
    rng_state,
    set_rng_state,
    take_snapshot,
)
from tests.experiment.test_training import training


def draws() -> list:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(3).tolist()]


def test_random_states_come_back_through_json():
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draws()  # leaves Python and numpy with a second Gaussian in hand
    tensors, values = rng_state()
    expected = draws()
    draws()
    set_rng_state(tensors, json.loads(json.dumps(values)))
    assert draws() == expected


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_a_schedule_goes_on_at_any_step(schedule, total, recwarn):
    config = training(schedule=schedule, warmup=0.4)

    def rates(start: int) -> list:
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = make_optimizer([p], config)
        scheduler = make_scheduler(optimizer, config, total)
        resume_schedule(scheduler, start)
        found = []
        for _ in range(start, total):
            found.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
            p.grad = torch.ones(2)
            optimizer.step()
            scheduler.step()
        return found

    whole = rates(0)
    for start in range(1, total + 1):
        assert rates(start) == whole[start:]
    assert [w for w in recwarn if "lr_scheduler" in str(w.message)] == []


def moved(steps: int):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(steps):
        parameters[0].grad = torch.randn(3, 2)  # the second one never gets a gradient: it has no moments
        optimizer.step()
    return parameters, optimizer


NAMES = ["a.lora_B", "a/odd name"]


def test_parameters_moments_and_the_best_epoch_come_back_bit_for_bit():
    parameters, optimizer = moved(3)
    state = LoopState(
        epoch=2, step=4, sums=Sums(0.1 + 0.2, 1e-17, 12, 7, 1e-3, 2.5), log=TrainingLog([{"loss": 1 / 3}], 1, 9.5),
        best=[p.detach().clone() * 2 for p in parameters], best_score=200 / 3, since_best=1, limit=4, learning_rate=1e-3,
    )  # fmt: skip
    tensors, values = take_snapshot(state, NAMES, parameters, optimizer)
    tensors = {key: value.clone() for key, value in tensors.items()}
    others, other_optimizer = moved(1)
    found = restore((tensors, json.loads(json.dumps(values))), NAMES, others, other_optimizer)
    assert found.values() == state.values()
    assert found.best is not None
    assert state.best is not None
    assert all(torch.equal(a, b) for a, b in zip(found.best, state.best, strict=True))
    for these, opt in ((parameters, optimizer), (others, other_optimizer)):
        torch.manual_seed(8)
        these[0].grad = torch.randn(3, 2)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t, v: t.pop("parameter/a.lora_B"), "it is not complete"),
        (lambda t, v: t.update({"parameter/a.lora_B": torch.zeros(2)}), r"has shape \(2,\), and not \(3, 2\)"),
        (lambda t, v: t.update({"parameter/a.lora_B": torch.zeros(3, 2, dtype=torch.float64)}), "has shape"),
        (lambda t, v: t.update({"parameter/more": torch.zeros(2)}), "it holds other parameters"),
        (lambda t, v: t.pop("rng/torch"), "it is not complete"),
        (lambda t, v: v.pop("loop"), "it is not complete"),
        (lambda t, v: v["loop"].update(more=1), "it is not complete"),
        (lambda t, v: v["rng"].update(python=[3, [1], None]), "it is not complete"),
    ],
)
def test_what_is_not_whole_is_refused(spoil, why):
    parameters, optimizer = moved(2)
    tensors, values = take_snapshot(LoopState(), NAMES, parameters, optimizer)
    values = json.loads(json.dumps(values))
    spoil(tensors, values)
    with pytest.raises(CheckpointError, match=why):
        restore((tensors, values), NAMES, *moved(1))
