"""What every method must do: leave no trace when a task is dropped, and go on from disk as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keeplora.methods import get_method
from keeplora.models import load_model
from keeplora.tuner import ContinualLearner
from tests.methods.families import FamilyTask
from tests.tuner.blocks import hooks, loader, loss_fn, same, weights


def make_learner(name: str, model: nn.Module, targets: Any, **values: Any) -> ContinualLearner:
    """The method on ``model`` with few, small settings."""
    method = get_method(name)
    values = {"r": 3, "lora_alpha": 3, "energy_features": 0.8, "target_modules": targets, **values}
    return method.learner(model, method.make_config(values))


def train(
    learner: ContinualLearner, model: nn.Module, batches: Any, loss: Callable[..., Tensor] = loss_fn, *, steps: int = 4,
    lr: float = 2e-2, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """The training loop with all that a method may ask of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        for batch in batches:
            optimizer.zero_grad()
            total = loss(model, batch).mean()
            if (extra := learner.penalty(batch, torch.zeros(0))) is not None:
                total = total + extra
            total.backward()
            optimizer.step()
            learner.after_step()


def learn(learner: ContinualLearner, name: str, seed: int, **kwargs: Any) -> ContinualLearner:
    """One task of `tests.tuner.blocks` from start to end."""
    batches = loader(seed=seed)
    with learner.task(name, batches, loss_fn) as model:
        train(learner, model, batches, **kwargs)
    return learner


def _learn_family(learner: ContinualLearner, task: FamilyTask, name: str) -> None:
    model = task.start(learner, name)
    train(learner, model, task.batches, task.loss)
    learner.finish_task()


def _everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, adapters' included."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in tensors.items()}


def check_lifecycle(name: str, folder: Path, out: Path, **values: Any) -> None:
    """Task "one" learned; task "two" dropped halfway; saved; then "two" learned here and by a reloaded learner alike."""
    encoder = load_model(folder)
    learner = make_learner(name, encoder.model, encoder.default_target_modules, **values)
    tasks = {task: FamilyTask(encoder, task) for task in ("one", "two")}
    start = tasks["one"].mean_loss()
    _learn_family(learner, tasks["one"], "one")
    assert tasks["one"].mean_loss() < start - 0.02, "nothing was learned"

    model = encoder.model
    first = learner.store.module(learner.targets[0].name).weight
    first.grad = mine = torch.full_like(first, 2.0)
    before, flags = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    modules, hooked, U = dict(model.named_modules()), hooks(model), dict(learner.U)
    position = tasks["two"].mean_loss()
    opened = tasks["two"].start(learner, "two")
    assert tasks["two"].mean_loss() == pytest.approx(position, rel=1e-6)  # starting moves nothing
    train(learner, opened, tasks["two"].batches, tasks["two"].loss, steps=2)
    assert tasks["two"].mean_loss() != position
    learner.abort_task()
    assert same(weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules
    assert hooks(model) == hooked
    assert first.grad is mine
    assert torch.equal(mine, torch.full_like(first, 2.0))
    first.grad = None
    assert same(learner.U, U)
    assert [r.name for r in learner.records] == ["one"]

    saved = learner.save_pretrained(out)
    other = load_model(folder)
    reloaded = type(learner).from_pretrained(saved, other.model)
    assert reloaded.state_bytes() == learner.state_bytes()
    twin = FamilyTask(other, "two")
    starts = [_everything(task.start(l, "two")) for l, task in ((learner, tasks["two"]), (reloaded, twin))]  # noqa: E741
    assert same(*starts)
    for which, task, root in ((learner, tasks["two"], model), (reloaded, twin, other.model)):
        which.abort_task()
        _learn_family(which, task, "two")
        assert tasks["two"].mean_loss() < position - 0.02, "nothing was learned"
        assert hooks(root) == hooked
    assert same(weights(model), weights(other.model))
    assert same(learner.U, reloaded.U)
