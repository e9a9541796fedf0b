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

METHODS = (
    "zero-shot", "full-ft", "full-ft-all", "lora", "l2", "ewc", "lwf", "zscl", "wise-ft", "gpm-lora", "inflora", "o-lora",
    "reglora", "sd-lora", "moelora", "nusa-cl", "rail-primal", "rail-dual", "replay", "keeplora", "keeplora++", "joint", "oracle",
)  # fmt: skip
WHOLE_WEIGHTS = {"full-ft", "full-ft-all", "l2", "ewc", "lwf", "zscl", "wise-ft"}
ANALYTIC = {"rail-primal", "rail-dual"}
STILL = {"zero-shot", "oracle", "moelora"} | ANALYTIC  # the model's own weights never move


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    return {family: tiny.make_tiny(family, root / family) for family in tiny.FAMILIES}


def make_learner(name: str, encoder, **kwargs):
    method = get_method(name)
    values = {"r": 4, "lora_alpha": 4, "gamma": 0.2, "energy_weights": 0.3, "energy_features": 0.8,
              "target_modules": encoder.default_target_modules, **kwargs}  # fmt: skip
    return method.learner(encoder.model, method.make_config(values))


def train(name: str, learner, model, task: FamilyTask, steps: int = 4) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    rate = 2e-3 if name in WHOLE_WEIGHTS else 2e-1 if name == "nusa-cl" else 2e-2
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(steps):
        for batch in task.batches:
            optimizer.zero_grad()
            logits = task.logits(batch)
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
            extra = learner.penalty(batch, logits)
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
            learner.after_step()


def accuracy(learner, task: FamilyTask) -> float:
    """As an experiment measures it: the model that answers for the task, and the method's read-out."""
    right = total = 0
    with learner.serving(task.name), torch.no_grad():
        for batch in task.batches:
            logits = learner.readout(task.image_features(batch), task.logits(batch), task.classes)
            right, total = right + int((logits.argmax(1) == batch["labels"]).sum()), total + len(logits)
    return right / total


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_two_tasks_and_back_from_disk(name, family, folders, tmp_path):
    encoder = load_model(folders[family])
    before = weights(encoder.model)
    learner = make_learner(name, encoder)
    targets = {f"{t.name}.weight" for t in learner.targets}
    tasks = {task_name: FamilyTask(encoder, task_name) for task_name in TASKS}
    for task_name, task in tasks.items():
        with learner.serving(task_name):
            start = task.mean_loss()
        flags = {n: p.requires_grad for n, p in encoder.model.named_parameters()}
        model = task.start(learner, task_name, reference=task.batches)
        assert task.mean_loss() == pytest.approx(start, rel=1e-5)  # no method moves the model by starting
        planned = learner.planned_parameters()
        assert learner._open.info["trained_parameters"] <= planned
        train(name, learner, model, task)
        record = learner.finish_task()
        assert record is learner.records[-1]
        assert {n: p.requires_grad for n, p in encoder.model.named_parameters()} == flags
        assert not any("lora" in n or "branch" in n for n, _ in encoder.model.named_modules())
        with learner.serving(task_name):
            loss = task.mean_loss()
        if name == "zero-shot" or name in ANALYTIC:
            assert loss == start
        else:
            assert loss < start - (0.005 if name == "zscl" else 0.02), (
                "nothing was learned"
            )  # a teacher that never learned
        if name in ANALYTIC:
            assert accuracy(learner, task) == 1.0  # noise around one picture per class
    assert [r.name for r in learner.records] == list(TASKS)

    after = weights(encoder.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    if name in STILL:
        assert changed == set()
    elif name == "full-ft-all":
        assert targets < changed
    else:
        assert changed == targets
    if learner.protects:
        assert learner.audit().passed
        assert all(r.used and r.basis for r in learner.records)
    else:
        assert not learner.U

    folder = learner.save_pretrained(tmp_path / "out")
    again = type(learner).from_pretrained(folder, load_model(folders[family]).model)
    assert same(weights(again.model), after)
    assert same(again.U, learner.U)
    assert again.options == learner.options
    assert again.state_bytes() == learner.state_bytes()
    assert [r.name for r in again.records] == list(TASKS)
    second = load_model(folders[family])
    again = type(learner).from_pretrained(folder, second.model)
    for task_name, task in tasks.items():
        twin = FamilyTask(second, task_name)
        with torch.no_grad(), learner.serving(task_name), again.serving(task_name):
            batch = task.batches[0]
            found = [
                owner.readout(t.image_features(batch), t.logits(batch), t.classes)
                for owner, t in ((learner, task), (again, twin))
            ]  # fmt: skip
            assert torch.equal(*found)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "zero-shot"])
def test_a_task_that_fails_leaves_no_trace(name, clip):
    """Not in weights, flags, hooks, gradients or state: the next task starts as if nothing had been."""
    task, other = FamilyTask(clip, "one"), FamilyTask(clip, "two")
    learner = make_learner(name, clip)
    train(name, learner, task.start(learner, "one", reference=task.batches), task)
    learner.finish_task()
    before, state = weights(clip.model), learner.state_bytes()
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in clip.model.named_modules()}
    for how in ("while training", "while finishing"):
        model = other.start(learner, "two", reference=task.batches)
        train(name, learner, model, other, steps=2)
        if how == "while training":
            learner.abort_task()
        else:
            learner._remember = lambda task, record: 1 / 0
            with pytest.raises(ZeroDivisionError):
                learner.finish_task()
            del learner._remember
        assert same(weights(clip.model), before)
        assert learner.state_bytes() == state
        assert len(learner.records) == 1
        found = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in clip.model.named_modules()}
        assert found == hooks
    with torch.no_grad():
        logits = learner.readout(task.image_features(task.batches[0]), task.logits(task.batches[0]), task.classes)
        assert torch.isfinite(logits).all()


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
        train(name, learner, model, task)
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
            train("full-ft", learner, model, task)
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
    assert names == [*METHODS[:-2], "keeplora-cls", "keeplora++-cls", *METHODS[-2:]]
    for name in names:
        method = get_method(name)
        assert method.name == name
        assert method.summary
        assert method.title
        assert method.classifier == name.endswith("-cls")
        assert method.trains == (name != "zero-shot")
    with pytest.raises(ConfigError, match=re.escape("method: unknown name 'kepplora'; did you mean 'keeplora'?")):
        get_method("kepplora")


def test_a_new_file_and_another_package_s_module_are_found(tmp_path, monkeypatch):
    import importlib.metadata

    from keeplora.methods import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._load()))
    unnamed = tuple(m for m in registry.METHOD_MODULES if m != "oracle")
    monkeypatch.setattr(registry, "METHOD_MODULES", unnamed)
    assert "keeplora.methods.oracle" in registry._modules()[len(unnamed) :]  # a file that the tuple does not name
    assert not any(name.endswith("registry") for name in registry._modules())

    (tmp_path / "their_method.py").write_text(
        "from keeplora.methods import Method, register\n"
        "from keeplora.methods.lora import SequentialLora\n"
        "register(Method('theirs', 'Theirs', SequentialLora, 'a method of another package'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint("theirs", "their_method", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else []
    )
    assert get_method("theirs").title == "Theirs"
    assert method_names()[-1] == "theirs"
