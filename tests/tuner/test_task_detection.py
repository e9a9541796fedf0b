"""Which layers are watched, what is measured there, and that new tasks are seen while the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError, TargetError
from keeplora.math import Subspace
from keeplora.tuner.task_detection import ShareObserver, TaskDetector, reduce_layers
from tests.tuner.blocks import Samples, config, hooks, loss_fn, make_net, same, weights


def batches(seed: int, n: int = 160, size: int = 8):
    data = Samples(n, seed)
    return [(data.x[i : i + size], torch.tensor(data.labels[i : i + size])) for i in range(0, n, size)]


def detector(learner, forward=loss_fn, **kwargs) -> TaskDetector:
    return TaskDetector(
        learner.model, learner.targets, learner.store, forward, subspace=learner.U.subspace, energy=learner.feature_energy,
        **kwargs,
    )  # fmt: skip


def run(found: TaskDetector, stream) -> list[int]:
    """Samples at which alarms came."""
    at, out = 0, []
    for batch in stream:
        if (alarm := found.update(batch)) is not None:
            out.append(alarm.at)
        at += len(batch[1])
    return out


def test_the_share_is_that_of_the_definition():
    learner = ContinualLearner(make_net(), config())
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    seen = {t.name: learner.U.subspace(t.name) for t in learner.targets}
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        learner.store.module(t.name).register_forward_pre_hook(lambda m, a, n=t.name: inputs.update({n: a[0]}))
        for t in learner.targets
    ]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    with torch.no_grad(), ShareObserver(learner.targets, learner.store, dict(seen)) as observer:
        observer.begin(3, {"": mask})
        learner.model(x)
    for handle in handles:
        handle.remove()
    assert set(observer.shares()) == set(seen)
    for name, share in observer.shares().items():
        rows = inputs[name].double() * mask.unsqueeze(-1)
        outside = rows - rows @ learner.U[name].double() @ learner.U[name].double().T
        wanted = outside.square().sum((1, 2)) / rows.square().sum((1, 2))
        assert torch.allclose(share.double(), wanted, atol=1e-5)


def test_by_either_side_of_a_subspace():
    learner = ContinualLearner(make_net(), config())
    x = torch.randn(2, 4, 12)
    U = torch.linalg.qr(torch.randn(12, 5)).Q
    N = torch.linalg.qr(U, mode="complete").Q[:, 5:]
    target = [t for t in learner.targets if t.n_in == 12][:1]
    found = []
    for S in (Subspace(U), Subspace(N, True)):
        with torch.no_grad(), ShareObserver(target, learner.store, {target[0].name: S}) as observer:
            observer.begin(2, {})
            learner.model(x)
        found.append(observer.shares()[target[0].name])
    assert torch.allclose(*found, atol=1e-5)


def test_a_new_task_is_seen_and_no_weight_flag_or_hook_is_touched():
    learner = ContinualLearner(make_net(), config())
    before, flags = weights(learner.model), [p.requires_grad for p in learner.model.parameters()]
    found = detector(learner, alarm_rate=1e-3, trace=True)
    found.calibrate(batches(1)[:8])
    random_state = torch.get_rng_state()
    assert run(found, batches(1)[8:]) == []
    alarms = run(found, batches(2)[:3])
    assert alarms
    assert alarms[0] <= 96 + 12
    assert len(found.values) == len(found.statistics) >= 97
    assert torch.equal(random_state, torch.get_rng_state())
    assert same(before, weights(learner.model))
    assert [p.requires_grad for p in learner.model.parameters()] == flags
    assert learner.model.training
    assert hooks(learner.model) == []


def test_layers_with_one_input_are_watched_once():
    learner = ContinualLearner(make_net(), config())
    found = detector(learner)
    found.calibrate(batches(1)[:4])
    assert [name.rsplit(".", 1)[1] for name in found.watched] == ["q", "up", "down"] * 2


class Prompted(nn.Module):
    """Pictures against class prompts, which are the same rows in every batch, and not one per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model, self.text_model = make_net(0), make_net(1)
        self.register_buffer("prompts", torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vision_model(x) @ self.text_model(self.prompts).T


def test_what_is_not_given_sample_by_sample_is_left_out():
    learner = ContinualLearner(Prompted(), config())
    found = detector(learner)
    found.calibrate(batches(1)[:4])
    assert found.watched
    assert all(name.startswith("vision_model") for name in found.watched)
    with pytest.raises(TargetError, match="nothing to watch; give a watch_fn"):
        detector(learner, lambda m, b: m.text_model(m.prompts)).calibrate(batches(1)[:4])


def test_what_is_refused():
    learner = ContinualLearner(make_net(), config())
    for bad in (0, 0.5, -1e-3, True, "often"):
        with pytest.raises(KeepLoraError, match="alarm_rate is the number of false alarms per sample"):
            detector(learner, alarm_rate=bad)
    with pytest.raises(KeepLoraError, match="two at least are needed"):
        detector(learner).calibrate(batches(1)[:1])


def test_layers_on_one_scale():
    shares = torch.tensor([[0.2, 0.001], [0.2, 0.003]])
    numbers = reduce_layers(shares, torch.tensor([0.2, 0.001]), torch.tensor([0.1, 0.001]))
    assert numbers.tolist() == pytest.approx([0.0, 1.0])
