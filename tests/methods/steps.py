"""The experiment's training step on a tiny dual encoder, and what dropping, saving and going on must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.methods import get_method
from keeplora.models import load_model
from keeplora.tuner import ContinualLearner
from tests.methods.families import FamilyTask
from tests.tuner.blocks import hooks, same, weights


def make_learner(name: str, encoder: Any, options: dict[str, Any] | None = None, **values: Any) -> Any:
    method = get_method(name)
    values = {"r": 3, "lora_alpha": 3, "target_modules": encoder.default_target_modules, **values}
    return method.learner(encoder.model, method.make_config({**values, "options": options or {}}))


def start(learner: ContinualLearner, task: Any, name: str, reference: Any = None) -> Any:
    """Start ``task`` under a name of its own, so that one can be learned twice."""
    return learner.start_task(
        name, task.batches, task.loss, objective=task, reference=reference,
        feature_batches=list(task.feature_batches()), forward_fn=task.forward, mask_fn=task.masks,
    )  # fmt: skip


def train(learner: ContinualLearner, model: nn.Module, task: Any, *, steps: int = 2, lr: float = 2e-3) -> list[float]:
    """Steps over all batches; returns the penalties, NaN where there was none."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    penalties = []
    for _ in range(steps):
        for batch in task.batches:
            optimizer.zero_grad()
            logits = task.logits(batch)
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            extra = learner.penalty(batch, logits)
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
            learner.after_step()
            penalties.append(float("nan") if extra is None else extra.item())
    return penalties


def learn(learner: ContinualLearner, task: FamilyTask, name: str, reference: Any = None, **kwargs: Any) -> list[float]:
    """One task from start to end."""
    model = start(learner, task, name, reference)
    penalties = train(learner, model, task, **kwargs)
    learner.finish_task()
    return penalties


def reference_of(encoder: Any) -> list[dict[str, Tensor]]:
    """Two batches of other pictures than the tasks', three pictures and two texts each."""
    generator = torch.Generator().manual_seed(7)
    text = dict(encoder.tokenize(["a drawing of a fish.", "a small green house."]))
    return [{"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), **text} for _ in range(2)]


def check_resumes(
    name: str, folder: Path, out: Path, options: dict[str, Any], *, lr: float = 2e-3,
    reference: Callable[[Any], Any] = lambda encoder: None,
) -> list[float]:  # fmt: skip
    """Two tasks learned, a third dropped halfway, saved; then the third learned here and by a reloaded learner alike.

    Returns the penalties of the third task.
    """
    encoder = load_model(folder)
    learner = make_learner(name, encoder, options)
    tasks = {task: FamilyTask(encoder, task) for task in ("one", "two")}
    for task in tasks:
        learn(learner, tasks[task], task, reference(encoder), lr=lr)
    model = encoder.model
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before, modules, hooked = weights(model), dict(model.named_modules()), hooks(model)
    held, bytes_before = set(vars(learner)), learner.state_bytes()
    opened = start(learner, tasks["one"], "three", reference(encoder))
    train(learner, opened, tasks["one"], lr=lr)
    assert not same(weights(model), before)
    learner.abort_task()
    assert same(weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert dict(model.named_modules()) == modules
    assert hooks(model) == hooked
    assert [r.name for r in learner.records] == ["one", "two"]
    assert set(vars(learner)) == held
    assert learner.state_bytes() == bytes_before

    saved = learner.save_pretrained(out)
    other = load_model(folder)
    reloaded: Any = type(learner).from_pretrained(saved, other.model)
    assert reloaded.options == learner.options
    assert reloaded.state_bytes() == bytes_before
    assert same(weights(other.model), before)
    here = learn(learner, tasks["one"], "three", reference(encoder), lr=lr)
    there = learn(reloaded, FamilyTask(other, "one"), "three", reference(other), lr=lr)
    assert torch.equal(torch.tensor(here), torch.tensor(there)) or all(p != p for p in here + there)
    assert same(weights(model), weights(other.model))
    assert same(learner.records[-1].tensors, reloaded.records[-1].tensors)
    return here
