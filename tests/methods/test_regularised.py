"""L2 and EWC: Fisher against a plain loop, the penalty's value and gradient against the formula, state from records."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from keeplora.errors import ConfigError
from keeplora.methods.regularised import EWC, FISHER, singles
from keeplora.models import load_model
from keeplora.tuner.sampling import stratified_indices
from tests.methods.families import FamilyTask
from tests.methods.steps import check_resumes, learn, make_learner, start, train
from tests.tuner.blocks import Samples, config, loss_fn, make_net, per_sample, same, weights


@pytest.fixture
def clip(clip_folder):
    return load_model(clip_folder)


def plain_fisher(learner, task) -> dict[str, torch.Tensor]:
    """Sample by sample: the gradient of one entry of a whole batch's losses, squared."""
    W = {n: learner.store.parameter(n) for n in learner.store.names}
    for p in W.values():
        p.requires_grad_(True)
    total = {n: torch.zeros_like(p) for n, p in W.items()}
    count = 0
    for batch in task.batches:
        losses = task.loss(learner.model, batch)
        for loss in losses:
            for n, g in zip(W, torch.autograd.grad(loss, list(W.values()), retain_graph=True), strict=True):
                total[n] += g**2
            count += 1
    for p in W.values():
        p.requires_grad_(False)
    return {n: t / count for n, t in total.items()}


def perturb(learner) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in learner.store.names:
            p = learner.store.parameter(name)
            p += 0.05 * torch.randn(p.shape, generator=generator)


def test_fisher_is_the_mean_of_squares_over_single_samples(clip):
    learner = make_learner("ewc", clip)
    task = FamilyTask(clip, "one")
    task.batches = [
        {k: v[i : i + 2] if k in ("pixel_values", "labels") else v for k, v in batch.items()}
        for batch in task.batches
        for i in (0, 2)
    ]  # as many pictures as prompts: neither may be taken for the other
    learn(learner, task, "one")
    record = learner.records[-1]
    expected = plain_fisher(learner, task)
    assert set(record.tensors) == {FISHER + n for n in learner.store.names}
    towers = {n.split(".")[0] for n in expected}
    assert towers == {"vision_model", "text_model"}
    for n, F in expected.items():
        found = record.tensors[FISHER + n]
        assert float(found.max()) > 1e-8
        torch.testing.assert_close(found, F, rtol=1e-3, atol=1e-6 * float(F.max()))
    # The square of a batch's mean gradient is something else.
    W = list(map(learner.store.parameter, learner.store.names))
    for p in W:
        p.requires_grad_(True)
    mean = torch.autograd.grad(torch.cat([task.loss(clip.model, b) for b in task.batches]).mean(), W)
    for p in W:
        p.requires_grad_(False)
    ratio = sum(float(g.square().sum()) for g in mean) / sum(float(F.sum()) for F in expected.values())
    assert ratio < 0.9


def test_ewc_penalty_and_gradient_are_the_formulas(clip):
    learner = make_learner("ewc", clip, {"lam": 3.0, "decay": 0.7})
    one, two = FamilyTask(clip, "one"), FamilyTask(clip, "two")
    assert all(map(math.isnan, learn(learner, one, "one")))  # nothing is known of the pretraining
    assert any(p > 0 for p in learn(learner, two, "two"))
    model = start(learner, one, "three")
    star = {n: learner.store.parameter(n).detach().clone() for n in learner.store.names}
    perturb(learner)
    penalty = learner.penalty(one.batches[0], torch.zeros(4, 2))
    penalty.backward()
    W = {n: learner.store.parameter(n) for n in star}
    found = {n: p.grad.clone() for n, p in W.items()}
    F1, F2 = ({n: r.tensors[FISHER + n] for n in star} for r in learner.records)
    F = {n: 0.7 * F1[n] + F2[n] for n in star}
    plain = 3.0 * sum((F[n] * (W[n] - star[n]) ** 2).sum() for n in star)
    expected = torch.autograd.grad(plain, list(W.values()))
    assert penalty.item() == pytest.approx(plain.item(), rel=1e-5)
    for g, (n, h) in zip(expected, found.items(), strict=True):
        torch.testing.assert_close(h, g, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(h, 6.0 * F[n] * (W[n] - star[n]).detach(), rtol=1e-5, atol=1e-9)
    assert model is clip.model
    assert len(learner._held) == len(star)
    learner.abort_task()
    assert len(learner._held) == 0  # θ* and F do not outlive the task


def test_l2_holds_the_first_task_too(clip):
    learner = make_learner("l2", clip, {"lam": 0.5})
    task = FamilyTask(clip, "one")
    start(learner, task, "one")
    assert learner.penalty(task.batches[0], torch.zeros(4, 2)).item() == 0.0
    perturb(learner)
    penalty = learner.penalty(task.batches[0], torch.zeros(4, 2))
    W = {n: learner.store.parameter(n) for n in learner.store.names}
    gradients = torch.autograd.grad(penalty, list(W.values()))
    plain = 0.0
    for g, (n, p) in zip(gradients, W.items(), strict=True):
        moved = (p - learner.store.W0[n]).detach()
        plain += 0.5 * float(moved.square().sum())
        torch.testing.assert_close(g, moved, rtol=1e-5, atol=1e-8)  # 2 · 0.5 · (θ − θ*)
    assert penalty.item() == pytest.approx(plain, rel=1e-5)
    learner.abort_task()
    assert learner.state_bytes() == 0


@pytest.mark.parametrize(("name", "lam"), [("l2", 100.0), ("ewc", 1e5)])
def test_a_strong_penalty_holds_the_weights(name, lam, clip_folder):
    moved = {}
    for strength in (0.0, lam):
        encoder = load_model(clip_folder)
        learner = make_learner(name, encoder, {"lam": strength})
        learn(learner, FamilyTask(encoder, "one"), "one")
        learn(learner, FamilyTask(encoder, "two"), "two", steps=4)
        F = learner.records[0].tensors
        change = learner.records[1].full
        moved[strength] = sum(float((F.get(FISHER + n, torch.ones(())) * d.square()).sum()) for n, d in change.items())
    assert moved[lam] < 0.5 * moved[0.0]


def test_ewc_without_decay_forgets_and_without_loss_adds_up(clip):
    learner = make_learner("ewc", clip, {"decay": 0.0})
    learn(learner, FamilyTask(clip, "one"), "one")
    learn(learner, FamilyTask(clip, "two"), "two")
    last = {n: learner.records[1].tensors[FISHER + n] for n in learner.store.names}
    assert same(learner.fisher(), last)
    assert learner.state_bytes() == sum(4 * F.numel() for F in last.values())


def test_fisher_samples_cuts_within_a_batch(clip_folder):
    found = {}
    for cap in (3, 0):
        encoder = load_model(clip_folder)
        learner = make_learner("ewc", encoder, {"fisher_samples": cap})
        task = FamilyTask(encoder, "one")
        start(learner, task, "one")
        if not cap:  # the same three samples, uncapped
            task.batches[:] = [{k: v[:3] if k in ("pixel_values", "labels") else v for k, v in task.batches[0].items()}]
        learner.finish_task()
        found[cap] = learner.records[0].tensors
    assert same(found[3], found[0])


class Counted:
    """A loss that notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, model: nn.Module, batch) -> torch.Tensor:
        self.seen.append(len(batch[1]))
        return loss_fn(model, batch)


def test_fisher_samples_caps_single_samples_by_class():
    net = make_net()
    learner = EWC(net, config(options={"fisher_samples": 4}))
    data = Samples(10)
    batches = DataLoader(data, batch_size=3, shuffle=True)
    with learner.task("one", batches, loss_fn) as model:
        train_plain(model, batches)
        counted = Counted()
        learner._open.loss_fn = counted
    assert counted.seen == [1, 1, 1, 1]
    chosen = stratified_indices(data.labels, 4, 0)
    W = {n: learner.store.parameter(n) for n in learner.store.names}
    net.eval()
    for p in W.values():
        p.requires_grad_(True)
    losses = per_sample(net, (data.x[chosen], torch.tensor(data.labels)[chosen]))
    squares = [torch.autograd.grad(loss, list(W.values()), retain_graph=True) for loss in losses]
    for i, n in enumerate(W):
        expected = torch.stack([g[i] ** 2 for g in squares]).mean(0)
        torch.testing.assert_close(learner.records[0].tensors[FISHER + n], expected, rtol=1e-4, atol=1e-9)


def train_plain(model: nn.Module, batches) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def test_the_fisher_pass_leaves_gradients_modes_and_random_numbers_alone(clip):
    learner = make_learner("ewc", clip)
    task = FamilyTask(clip, "one")
    other = clip.model.text_model.final_layer_norm.weight
    target = learner.store.parameter(learner.store.names[0])
    other.grad, target.grad = torch.full_like(other, 2.0), torch.full_like(target, 3.0)
    clip.model.train()
    model = start(learner, task, "one")
    train(learner, model, task, steps=1)
    state = torch.random.get_rng_state()
    learner.finish_task()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert clip.model.training
    assert torch.equal(other.grad, torch.full_like(other, 2.0))
    assert torch.equal(target.grad, torch.full_like(target, 3.0))


def test_singles_leaves_prompts_whole_though_there_are_as_many():
    batch = {"pixel_values": torch.arange(6.0).view(2, 3), "labels": torch.tensor([0, 1]), "input_ids": torch.eye(2)}
    cut = list(singles([batch], ["input_ids"]))
    assert [b["labels"].tolist() for b in cut] == [[0], [1]]
    assert [b["pixel_values"].tolist() for b in cut] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert all(torch.equal(b["input_ids"], torch.eye(2)) for b in cut)
    x, y = torch.randn(3, 2), torch.arange(3)
    assert [[t.tolist() for t in b] for b in singles([(x, y)])] == [[[x[i].tolist()], [i]] for i in range(3)]


def test_a_fisher_pass_that_fails_undoes_the_task(clip):
    learner = make_learner("ewc", clip)
    before = weights(clip.model)
    task = FamilyTask(clip, "one")
    model = start(learner, task, "one")
    train(learner, model, task)
    learner._open.loss_fn = lambda model, batch: task.loss(model, batch) * float("nan")
    with pytest.raises(FloatingPointError, match="Fisher pass"):
        learner.finish_task()
    assert same(weights(clip.model), before)
    assert learner.records == []


@pytest.mark.parametrize(("name", "options"), [("l2", {"lam": 0.3}), ("ewc", {"lam": 50.0, "fisher_samples": 5})])
def test_resumes(name, options, clip_folder, tmp_path):
    penalties = check_resumes(name, clip_folder, tmp_path / "out", options)
    assert max(penalties) > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l2", {"lam": -1.0}, r"tuner.options.lam must be a finite number of at least 0, got -1.0"),
        ("ewc", {"lam": float("nan")}, r"tuner.options.lam must be a finite"),
        ("ewc", {"decay": 1.5}, r"tuner.options.decay must lie between 0 and 1, got 1.5"),
        ("ewc", {"fisher_samples": -2}, r"tuner.options.fisher_samples must be at least 1, or 0 for all, got -2"),
        ("ewc", {"lamb": 1}, r"unknown option 'lamb'; did you mean 'lam'"),
    ],
)
def test_bad_options(name, options, message, clip):
    with pytest.raises(ConfigError, match=message):
        make_learner(name, clip, options)
