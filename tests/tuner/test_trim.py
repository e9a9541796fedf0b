"""δ: an update is made as small as the task's own training loss allows, and nothing else about it changes."""

from __future__ import annotations

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import ConfigError
from keeplora.methods import get_method
from keeplora.tuner.trim import STEPS
from tests.tuner.blocks import config, loader, loss_fn, make_net, train


def learned(steps: int = 30, sign: float = 1.0, method: type[ContinualLearner] = ContinualLearner, **more):
    learner = method(make_net(), config(**more))
    torch.manual_seed(0)
    with learner.task("one", loader(24), loss_fn) as model:
        train(model, loader(24), steps=steps, lr=0.01, loss=lambda m, batch: sign * loss_fn(m, batch))
    return learner


@torch.no_grad()
def mean_loss(model: torch.nn.Module) -> float:
    model.eval()
    sums = [(float(loss_fn(model, batch)) * len(batch[0]), len(batch[0])) for batch in loader(24)]
    return sum(loss for loss, _ in sums) / sum(n for _, n in sums)


def test_the_factor_is_the_least_that_keeps_the_loss():
    plain, trimmed = learned(), learned(trim_tolerance=0.2)
    told = trimmed.records[0].info["trim"]
    factor, loss = told["factor"], told["loss"]
    assert 0 < factor < 1
    assert (factor * STEPS) == int(factor * STEPS)
    for name, one in trimmed.records[0].factors.items():
        assert torch.equal(one.A, plain.records[0].factors[name].A)
        assert torch.equal(one.B, plain.records[0].factors[name].B * factor)
    assert loss["without"] == pytest.approx(mean_loss(make_net()), rel=1e-5)
    assert loss["whole"] == pytest.approx(mean_loss(plain.model), rel=1e-4)
    assert loss["trimmed"] == pytest.approx(mean_loss(trimmed.model), rel=1e-4)
    limit = loss["whole"] + 0.2 * (loss["without"] - loss["whole"])
    assert loss["trimmed"] <= limit
    smaller = ContinualLearner(make_net(), config())  # the next smaller one is too small
    smaller.store.add({name: _scaled(f, factor - 1 / STEPS) for name, f in plain.records[0].factors.items()})
    assert mean_loss(smaller.model) > limit


def _scaled(factors, factor):
    return type(factors)(factors.A, factors.B * factor, factors.s)


def test_what_is_merged_is_what_the_record_holds():
    trimmed = learned(trim_tolerance=0.2)
    record = trimmed.records[0]
    for name, factors in record.factors.items():
        merged = trimmed.model.get_submodule(name).weight
        start = trimmed.store.W0[name]
        assert torch.allclose(merged - start, factors.s * factors.B @ factors.A, atol=1e-6)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_an_update_that_took_nothing_off_the_loss_stays_as_it_is(sign):
    trimmed, plain = (learned(3, sign, **more) for more in ({"trim_tolerance": 0.5}, {}))
    assert trimmed.records[0].info["trim"]["factor"] == 1
    for name, one in trimmed.records[0].factors.items():
        assert torch.equal(one.B, plain.records[0].factors[name].B)


def test_without_the_setting_nothing_is_measured():
    assert "trim" not in learned(1).records[0].info


def test_lora_is_trimmed_as_well(tmp_path):
    learner = learned(method=get_method("lora").learner, trim_tolerance=0.3)
    assert learner.records[0].info["trim"]["factor"] < 1
    path = learner.save_pretrained(tmp_path / "saved")
    again = type(learner).from_pretrained(path, make_net())
    assert again.config.trim_tolerance == 0.3
    assert again.records[0].info["trim"] == learner.records[0].info["trim"]


def test_refused():
    for value in (1.0, -0.1, "a"):
        with pytest.raises(ConfigError, match="trim_tolerance must be at least 0 and below 1"):
            config(trim_tolerance=value)
