"""Optimiser and schedules against their formulas, also for runs of one and two steps."""

from __future__ import annotations

import math

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.experiment.config import load_config
from keeplora.experiment.optim import make_optimizer, make_scheduler, warmup_steps

LR = 0.01


def training(**changes):
    tasks = [{"name": "a", "source": "folder"}, {"name": "b", "source": "folder"}]
    values = {"learning_rate": LR, **changes}
    return load_config({"tasks": tasks, "model": "m", "method": "lora", "training": values}).training


def rates(total, **changes):
    """The rate that each of ``total`` optimiser steps runs at, read in the step itself."""
    cfg = training(**changes)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight], cfg)
    scheduler = make_scheduler(optimizer, cfg, total)
    seen = []
    for _ in range(total):
        weight.grad = torch.ones(2)
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def one_cycle(step, total, share=0.3, start=25, end=1e4):
    """The one-cycle formula with cosine annealing, written from its definition: lr/25 up to lr, down to lr/25/1e4."""
    peak, last = share * total - 1, total - 1
    low = LR / start
    first, second, begin, finish = (low, LR, 0.0, peak) if step <= peak else (LR, low / end, peak, last)
    return second + (first - second) / 2 * (1 + math.cos(math.pi * (step - begin) / (finish - begin)))


@pytest.mark.parametrize("total", [2, 3, 4, 5, 10, 57])
def test_onecycle_follows_the_formula(total):
    assert rates(total, schedule="onecycle") == pytest.approx([one_cycle(k, total) for k in range(total)], rel=1e-9)


@pytest.mark.parametrize("total", [10, 40])
def test_onecycle_equals_torch_defaults(total):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=LR)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=total)
    expected, betas = [], []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert rates(total, schedule="onecycle") == expected
    assert max(betas) > min(betas)  # torch cycles the momentum, and so does the reference


def test_onecycle_warmup_is_its_share_before_the_peak():
    seen = rates(20, schedule="onecycle", warmup=0.5)
    assert seen == pytest.approx([one_cycle(k, 20, share=0.5) for k in range(20)], rel=1e-9)
    assert max(range(20), key=seen.__getitem__) == 9


@pytest.mark.parametrize("warmup", [None, 0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 4])
def test_short_runs_learn_something_and_never_exceed_the_rate(schedule, total, warmup):
    seen = rates(total, schedule=schedule, warmup=warmup)
    assert len(seen) == total
    assert all(0 < rate <= LR * (1 + 1e-9) for rate in seen)
    assert max(seen) >= 0.3 * LR  # torch's one-cycle formula gives lr / 250000 for a single step
    if total == 1:
        assert seen == [LR]


def test_onecycle_where_torch_divides_by_zero():
    assert rates(2, schedule="onecycle", warmup=0.5)[0] == pytest.approx(LR, rel=1e-6)


@pytest.mark.parametrize(("total", "warmup", "warm"), [(100, 0.03, 3), (10, 0.25, 3), (7, 0.0, 0), (30, 0.1, 3)])
def test_cosine_follows_the_formula(total, warmup, warm):
    cfg = training(schedule="cosine", warmup=warmup)
    assert warmup_steps(cfg, total) == warm
    expected = [LR * (k + 1) / (warm + 1) for k in range(warm)]
    expected += [LR * (1 + math.cos(math.pi * k / (total - warm))) / 2 for k in range(total - warm)]
    assert rates(total, schedule="cosine", warmup=warmup) == pytest.approx(expected, rel=1e-12)


def test_warmup_leaves_a_full_step():
    assert [warmup_steps(training(warmup=0.99), total) for total in (1, 2, 3)] == [0, 1, 2]
    assert rates(2, schedule="cosine", warmup=0.99) == [LR / 2, LR]


def test_constant():
    assert rates(5, schedule="constant") == [LR] * 5
    assert rates(5, schedule="constant", warmup=0.4) == pytest.approx([LR / 3, LR * 2 / 3, LR, LR, LR])


def test_steps_after_the_last_do_not_raise():
    cfg = training(schedule="cosine")
    scheduler = make_scheduler(make_optimizer([torch.nn.Parameter(torch.ones(1))], cfg), cfg, 2)
    for _ in range(5):
        scheduler.optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.0, abs=1e-12)]


def test_no_steps_is_refused():
    cfg = training()
    with pytest.raises(ConfigError, match="at least 1 step, got 0"):
        make_scheduler(make_optimizer([torch.nn.Parameter(torch.ones(1))], cfg), cfg, 0)


def test_adamw_follows_the_formula_of_its_first_step():
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = make_optimizer([weight], training(weight_decay=0.1))
    weight.grad = torch.tensor([0.5, 3.0], dtype=torch.float64)
    optimizer.step()
    start, gradient = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    # Decoupled decay, then the bias-corrected first step g / (|g| + eps).
    expected = start * (1 - LR * 0.1) - LR * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


def test_frozen_parameters_are_left_out():
    frozen, trained = torch.nn.Parameter(torch.ones(1), requires_grad=False), torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(iter([frozen, trained]), training())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(trained)]
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        make_optimizer([frozen], training())


def test_a_rate_per_task_must_be_chosen_first():
    cfg = training(learning_rate={"a": 0.1, "b": 0.2})
    with pytest.raises(ConfigError, match="for_task"):
        make_optimizer([torch.nn.Parameter(torch.ones(1))], cfg)
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(1))], cfg.for_task("b"))
    assert optimizer.param_groups[0]["lr"] == 0.2
