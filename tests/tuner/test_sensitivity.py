"""Measured layer scales: what they are measured by, their size, and that they are the task's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError, TargetError
from keeplora.tuner import sensitivity
from tests.tuner.blocks import Samples, config, learn, loader, loss_fn, make_net, make_towers

MEASURED: dict[str, Any] = {"schedule": "measured"}


def scales(learner: ContinualLearner, tower: str = "") -> list[float]:
    return list(learner.records[0].info["layer_scales"][tower].values())


def test_they_have_the_lines_mean_square_and_are_what_the_adapter_learned_with():
    learner, plain = (learn(ContinualLearner(make_towers(), config(**more)), "a", 0) for more in (MEASURED, {}))
    record = learner.records[0]
    for tower in ("vision_model", "text_model"):
        found = scales(learner, tower)
        line = {t.depth: t.scale for t in plain.targets if t.tower == tower}
        assert sum(x * x for x in found) == pytest.approx(sum(x * x for x in line.values()))
        assert max(found) <= min(found) / 0.2 + 1e-9
        assert found != pytest.approx(list(line.values()), rel=1e-3)
    for t in learner.targets:
        assert record.factors[t.name].s == pytest.approx(
            record.info["layer_scales"][t.tower][str(t.depth)] * t.lora_alpha / t.r
        )
    assert "layer_scales" not in plain.records[0].info


def test_a_block_that_moves_the_output_more_is_given_less():
    def amplified(factor: float) -> float:
        net = make_net(blocks=3)
        with torch.no_grad():
            for p in net.encoder.layers[1].mix.parameters():  # behind q, k and v of the second block
                p.mul_(factor)
        found = scales(
            learn(ContinualLearner(net, config(target_modules=["q", "k", "v"], gamma=0.01, **MEASURED)), "a", 0)
        )
        return found[1] / found[0]

    assert amplified(10.0) < 0.5 * amplified(1.0)


def test_gamma_one_is_every_block_at_one():
    learner = learn(ContinualLearner(make_net(), config(gamma=1.0, **MEASURED)), "a", 0)
    assert scales(learner) == pytest.approx([1.0, 1.0])


def test_the_estimate_is_the_jacobians_norm():
    """Mean over many draws of the signs, against ∂f_k(x_n)/∂W · Aᵀ number by number."""
    net = make_net().eval()
    learner = ContinualLearner(net, config(target_modules=["q", "down"], **MEASURED))
    data, draws = Samples(4), 150
    learner.start_task("a", [(data.x, torch.tensor(data.labels))], loss_fn)
    task, A = learner._open, learner._open.adapter.A0
    learner.abort_task()
    found = dict.fromkeys(A, 0.0)
    for seed in range(draws):
        learner.config.seed = seed
        for name, M in sensitivity._responses(learner, task, learner.targets, A).items():
            found[name] += float(M.square().sum()) / draws
    exact = dict.fromkeys(A, 0.0)
    for t in learner.targets:
        W = learner.store.module(t.name).weight.requires_grad_(True)
        for x in data.x:
            for y in net(x[None])[0]:
                (g,) = torch.autograd.grad(y, W, retain_graph=True)
                exact[t.name] += float((g @ A[t.name].T).square().sum())
        W.requires_grad_(False)
    for name, value in found.items():
        assert value == pytest.approx(exact[name], rel=0.25)


def test_a_tower_that_the_feature_pass_does_not_differentiate_is_named():
    @torch.no_grad()
    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])

    learner = ContinualLearner(make_net(), config(**MEASURED))
    with pytest.raises(TargetError, match="set schedule: linear"):
        learner.start_task("a", loader(), loss_fn, feature_batches=loader(), forward_fn=forward)
    with pytest.raises(KeepLoraError, match="only once"):
        learner.start_task("a", loader(), loss_fn, feature_batches=iter(loader()))
    learn(learner, "a", 0)


def test_per_tower_and_without_depth():
    learner = learn(
        ContinualLearner(make_towers(), config(schedule={"vision": "measured", "default": "linear"})), "a", 0
    )
    assert list(learner.records[0].info["layer_scales"]) == ["vision_model"]
    flat = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    learner = ContinualLearner(flat, config(target_modules=["0"], **MEASURED))
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    with learner.task("a", [(x, torch.arange(6) % 3)], loss_fn):
        pass
    assert "layer_scales" not in learner.records[0].info
    assert learner.records[0].factors["0"].s == 1.0
