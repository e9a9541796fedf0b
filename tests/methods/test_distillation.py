"""LwF and ZSCL: the loss against a plain computation, who teaches, on what, and which weights are kept."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.methods.distillation import endless, soft_cross_entropy
from keeplora.models import load_model
from tests.methods.families import FamilyTask
from tests.methods.steps import check_resumes, learn, make_learner, reference_of, start, train
from tests.tuner.blocks import same, weights


@pytest.fixture
def clip(clip_folder):
    return load_model(clip_folder)


def plain_loss(student: torch.Tensor, teacher: torch.Tensor, T: float) -> float:
    """Both directions, entry by entry."""

    def softmax(row: list[float]) -> list[float]:
        top = max(row)
        e = [math.exp((v - top) / T) for v in row]
        return [v / sum(e) for v in e]

    total = 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        rows = [
            -sum(p * math.log(q) for p, q in zip(softmax(b), softmax(a), strict=True))
            for a, b in zip(s.tolist(), t.tolist(), strict=True)
        ]
        total += sum(rows) / len(rows)
    return T * T * total


def similarities(encoder, batch) -> torch.Tensor:
    """exp(logit_scale) · cos from the stock model's own features."""
    model = encoder.model
    x = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    z = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    normal = torch.nn.functional.normalize
    return model.logit_scale.exp() * normal(x, dim=1) @ normal(z, dim=1).T


@torch.no_grad()
def nudge(learner) -> None:
    generator = torch.Generator().manual_seed(5)
    for name in learner.store.names:
        p = learner.store.parameter(name)
        p += 0.05 * torch.randn(p.shape, generator=generator)


def put(encoder, values) -> None:
    with torch.no_grad():
        for n, p in encoder.model.named_parameters():
            p.copy_(values[n])


@pytest.mark.parametrize("T", [1.0, 2.0, 7.5])
def test_soft_cross_entropy_is_the_formula(T):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (5 * torch.randn(4, 3, generator=generator) for _ in range(2))
    assert float(soft_cross_entropy(student, teacher, T)) == pytest.approx(plain_loss(student, teacher, T), rel=1e-5)


def test_its_gradient_vanishes_at_the_teacher_and_nowhere_else():
    generator = torch.Generator().manual_seed(0)
    teacher = 5 * torch.randn(4, 3, generator=generator)
    student = teacher.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(soft_cross_entropy(student, teacher, 2.0), student)
    assert float(g.abs().max()) < 1e-6
    (g,) = torch.autograd.grad(soft_cross_entropy(student + torch.eye(4, 3), teacher, 2.0), student)
    assert float(g.abs().max()) > 1e-2


def test_lwf_is_taught_by_the_model_before_the_task(clip, clip_folder):
    learner = make_learner("lwf", clip, {"temperature": 3.0, "weight": 0.5})
    learn(learner, FamilyTask(clip, "one"), "one")
    before = weights(clip.model)
    task = FamilyTask(clip, "two")
    start(learner, task, "two")
    batch = task.batches[0]
    W = [learner.store.parameter(n) for n in learner.store.names]
    at_start = torch.autograd.grad(learner.penalty(batch, task.logits(batch)), W)
    nudge(learner)
    penalty = learner.penalty(batch, task.logits(batch))
    away = torch.autograd.grad(penalty, W)
    for tower in ("vision_model", "text_model"):  # both towers are held
        sizes = [
            max(float(g.abs().max()) for n, g in zip(learner.store.names, grads, strict=True) if n.startswith(tower))
            for grads in (at_start, away)
        ]
        assert sizes[0] < 1e-3 * sizes[1]
    teacher = load_model(clip_folder)
    put(teacher, before)
    with torch.no_grad():
        expected = 0.5 * plain_loss(similarities(clip, batch), similarities(teacher, batch), 3.0)
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    untouched = load_model(clip_folder)
    with torch.no_grad():
        wrong = 0.5 * plain_loss(similarities(clip, batch), similarities(untouched, batch), 3.0)
    assert penalty.item() != pytest.approx(wrong, rel=1e-3)
    learner.abort_task()


def test_zscl_is_taught_by_the_original_on_the_reference_in_turn(clip, clip_folder):
    reference = reference_of(clip)
    learner = make_learner("zscl", clip, {"l2": 0.25})
    learn(learner, FamilyTask(clip, "one"), "one", reference)
    assert not torch.equal(learner.store.current(learner.targets[0].name), learner.store.W0[learner.targets[0].name])
    before = weights(clip.model)
    original = load_model(clip_folder)
    task = FamilyTask(clip, "two")
    start(learner, task, "two", reference)
    nudge(learner)
    l2 = 0.25 * sum(float((p.detach() - before[n]).square().sum()) for n, p in clip.model.named_parameters())
    seen = []
    for i in (0, 1, 0):
        with torch.no_grad():
            student, teacher = (similarities(e, reference[i]) for e in (clip, original))
        penalty = learner.penalty(task.batches[0], torch.zeros(4, 2))
        assert penalty.item() == pytest.approx(plain_loss(student, teacher, 2.0) + l2, rel=1e-4)
        seen.append(penalty.item())
    assert seen[0] == pytest.approx(seen[2], rel=1e-6)
    assert seen[0] != pytest.approx(seen[1], rel=1e-3)
    learner.abort_task()
    W0 = learner.store.W0.values()
    assert learner.state_bytes() == sum(W.numel() * W.element_size() for W in W0)


@pytest.mark.parametrize(("every", "steps"), [(3, 8), (2, 4), (100, 4), (1, 2), (0, 4)])
def test_zscl_keeps_the_mean_of_start_every_nth_and_last(clip, every, steps):
    learner = make_learner("zscl", clip, {"average_every": every})
    reference = reference_of(clip)
    learn(learner, FamilyTask(clip, "one"), "one", reference)
    task = FamilyTask(clip, "two")
    model = start(learner, task, "two", reference)
    path = [weights(model)]
    after_step = learner.after_step

    def note() -> None:
        after_step()
        path.append(weights(model))

    learner.after_step = note
    train(learner, model, task, steps=steps // 2)
    assert len(path) == steps + 1
    learner.finish_task()
    members = sorted({0, steps, *range(0, steps, every)}) if every else [steps]
    kept = weights(clip.model)
    for n in kept:
        mean = torch.stack([path[i][n].double() for i in members]).mean(0)
        torch.testing.assert_close(kept[n].double(), mean, rtol=3e-7, atol=1e-7)
    last = learner.targets[-1].name + ".weight"
    assert torch.allclose(kept[last], path[-1][last], atol=1e-6) == (every == 0)


def test_a_task_without_a_step_changes_nothing(clip):
    learner = make_learner("zscl", clip)
    before = weights(clip.model)
    start(learner, FamilyTask(clip, "one"), "one", reference_of(clip))
    learner.finish_task()
    assert same(weights(clip.model), before)


@pytest.mark.parametrize("name", ["lwf", "zscl"])
@pytest.mark.parametrize("end", ["finish_task", "abort_task"])
def test_the_teacher_goes_with_the_task(name, end, clip):
    learner = make_learner(name, clip)
    task = FamilyTask(clip, "one")
    model = start(learner, task, "one", reference_of(clip))
    train(learner, model, task, steps=1)
    teacher = weakref.ref(learner._teacher)
    assert not any(p.requires_grad for p in teacher().parameters())
    assert teacher() is not clip.model
    getattr(learner, end)()
    gc.collect()
    assert teacher() is None


def test_what_is_missing_is_told_before_anything_is_touched(clip):
    task = FamilyTask(clip, "one")
    flags = {n: p.requires_grad for n, p in clip.model.named_parameters()}
    for name, kwargs, message in (
        ("lwf", {}, r"task 'one': LwF compares features .* start_task\(objective=...\)"),
        ("zscl", {"objective": task}, r"task 'one': zscl needs a reference set.* `reference:` in the config"),
        ("zscl", {"reference": reference_of(clip)}, r"task 'one': ZSCL compares features"),
    ):
        learner = make_learner(name, clip)
        with pytest.raises(KeepLoraError, match=message):
            learner.start_task("one", task.batches, task.loss, **kwargs)
        with pytest.raises(KeepLoraError, match="no task is open"):
            learner.abort_task()
    assert {n: p.requires_grad for n, p in clip.model.named_parameters()} == flags


def test_endless():
    stream = endless([1, 2])
    assert [next(stream) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(KeepLoraError, match="reference: it holds no batch"):
        next(endless([]))


def test_lwf_resumes(clip_folder, tmp_path):
    assert min(check_resumes("lwf", clip_folder, tmp_path / "out", {})) > 0


def test_zscl_resumes(clip_folder, tmp_path):
    options = {"average_every": 3, "l2": 0.1}
    assert min(check_resumes("zscl", clip_folder, tmp_path / "out", options, reference=reference_of)) > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lwf", {"temperature": 0.0}, r"tuner.options.temperature must be a finite number above 0, got 0.0"),
        ("lwf", {"weight": -1}, r"tuner.options.weight must be a finite number of at least 0, got -1.0"),
        ("zscl", {"temperature": -1.0}, r"tuner.options.temperature"),
        ("zscl", {"average_every": -5}, r"tuner.options.average_every must be at least 1, or 0 for none, got -5"),
        ("zscl", {"l2": float("inf")}, r"tuner.options.l2 must be a finite number of at least 0, got inf"),
    ],
)
def test_bad_options(name, options, message, clip):
    with pytest.raises(ConfigError, match=message):
        make_learner(name, clip, options)
