"""Every method on every family, one matrix; and what tells the methods apart."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods import get_method, method_names
from keeplora.models import load_model
from tests.methods.families import TASKS, FamilyTask
from tests.models import tiny
from tests.tuner.blocks import same, weights

METHODS = ("zero-shot", "full-ft", "lora", "keeplora", "keeplora++")
LEARNING_RATE = {"full-ft": 2e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    return {family: tiny.make_tiny(family, root / family) for family in tiny.FAMILIES}


def make_learner(name: str, encoder, **kwargs):
    method = get_method(name)
    values = {"r": 4, "lora_alpha": 4, "gamma": 0.2, "energy_weights": 0.3, "energy_features": 0.8,
              "target_modules": encoder.default_target_modules, **kwargs}  # fmt: skip
    return method.learner(encoder.model, method.make_config(values))


def train(name: str, model, task: FamilyTask, steps: int = 4) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE.get(name, 2e-2))
    for _ in range(steps):
        for batch in task.batches:
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_two_tasks_and_back_from_disk(name, family, folders, tmp_path):
    encoder = load_model(folders[family])
    before = weights(encoder.model)
    learner = make_learner(name, encoder)
    targets = {f"{t.name}.weight" for t in learner.targets}
    for task_name in TASKS:
        task = FamilyTask(encoder, task_name)
        start = task.mean_loss()
        model = task.start(learner, task_name)
        assert task.mean_loss() == pytest.approx(start, rel=1e-5)  # no method moves the model by starting
        train(name, model, task)
        record = learner.finish_task()
        assert record is learner.records[-1]
        if name == "zero-shot":
            assert task.mean_loss() == start
        else:
            assert task.mean_loss() < start - 0.02, "nothing was learned"
    assert [r.name for r in learner.records] == list(TASKS)

    after = weights(encoder.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == (set() if name == "zero-shot" else targets)
    if learner.protects:
        assert learner.audit().passed
        assert all(r.used and r.basis for r in learner.records)
    else:
        assert not learner.U
        assert not any(r.basis or r.used for r in learner.records)

    folder = learner.save_pretrained(tmp_path / "out")
    again = type(learner).from_pretrained(folder, load_model(folders[family]).model)
    assert same(weights(again.model), after)
    assert same(again.U, learner.U)
    assert [r.name for r in again.records] == list(TASKS)


@pytest.fixture
def clip(folders):
    return load_model(folders["clip"])


def trainable(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_what_trains(clip):
    task = FamilyTask(clip, "one")
    expected = {
        "zero-shot": set(),
        "full-ft": lambda n: {f"{n}.weight"},
        "lora": lambda n: {f"base_model.model.{n}.lora_{x}.default.weight" for x in "AB"},
        "keeplora": lambda n: {f"base_model.model.{n}.lora_B.default.weight"},
        "keeplora++": lambda n: {f"base_model.model.{n}.lora_B.default.weight"},
    }
    for name, names in expected.items():
        flags = {n: p.requires_grad for n, p in clip.model.named_parameters()}
        learner = make_learner(name, clip)
        model = task.start(learner, "one")
        wanted = set().union(*(names(t.name) for t in learner.targets)) if names else set()
        assert trainable(model) == wanted
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        assert learner._open.info["trained_parameters"] == sum(sizes[n] for n in wanted)
        learner.abort_task()
        assert {n: p.requires_grad for n, p in clip.model.named_parameters()} == flags


def test_lora_moves_A_and_keeplora_does_not(clip):
    task = FamilyTask(clip, "one")
    for name, moves in (("lora", True), ("keeplora++", False)):
        learner = make_learner(name, clip)
        model = task.start(learner, "one")
        A = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
        train(name, model, task)
        now = {n: p for n, p in model.named_parameters() if n in A}
        assert all(torch.equal(A[n], now[n]) != moves for n in A)
        learner.abort_task()


def test_lora_starts_from_its_seed(clip):
    task = FamilyTask(clip, "one")

    def A(seed: int):
        learner = make_learner("lora", clip, seed=seed)
        torch.rand(3)  # whatever else drew numbers
        model = task.start(learner, "one")
        found = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
        learner.abort_task()
        return found

    first = A(1)
    assert same(first, A(1))
    assert not same(first, A(2))
    for value in first.values():
        assert float(value.abs().max()) <= value.shape[1] ** -0.5  # Kaiming-uniform with a = √5


def test_full_finetuning_that_fails_leaves_no_trace(clip):
    before = weights(clip.model)
    learner = make_learner("full-ft", clip)
    task = FamilyTask(clip, "one")
    flags = {n: p.requires_grad for n, p in clip.model.named_parameters()}
    weight = learner.store.module(learner.targets[0].name).weight
    weight.grad = mine = torch.full_like(weight, 2.0)

    def block() -> None:
        with learner.task("one", task.batches, task.loss) as model:
            train("full-ft", model, task)
            assert not same(weights(clip.model), before)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        block()
    assert same(weights(clip.model), before)
    assert {n: p.requires_grad for n, p in clip.model.named_parameters()} == flags
    assert learner.records == []
    assert weight.grad is mine
    assert torch.equal(mine, torch.full_like(weight, 2.0))


def test_gamma_one_and_gamma_fifth(clip):
    one, plus = make_learner("keeplora", clip), make_learner("keeplora++", clip)
    assert {t.scale for t in one.targets} == {1.0}
    for t in plus.targets:
        assert t.scale == pytest.approx(0.2 + 0.8 * t.depth / (t.blocks - 1))
    assert {t.scale for t in make_learner("lora", clip).targets} == {1.0}


def test_what_defines_a_method_wins_over_the_user():
    config = get_method("keeplora").make_config({"gamma": 0.3, "schedule": "linear", "r": 7, "target_modules": ["q"]})
    assert (config.gamma, config.schedule, config.r) == (1.0, "constant", 7)
    assert get_method("keeplora++").make_config({"gamma": 0.3, "target_modules": ["q"]}).gamma == 0.3


def test_registry():
    names = method_names()
    assert set(METHODS) | {"keeplora-cls", "keeplora++-cls"} == set(names)
    for name in names:
        method = get_method(name)
        assert method.name == name
        assert method.summary
        assert method.title
        assert method.classifier == name.endswith("-cls")
        assert method.trains == (name != "zero-shot")
    with pytest.raises(ConfigError, match=re.escape("method: unknown name 'kepplora'; did you mean 'keeplora'?")):
        get_method("kepplora")
