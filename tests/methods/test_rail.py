"""RAIL: the sums are the recursion and the batch solution, the fusion rule, and a state that is the records' alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.methods import get_method
from keeplora.methods.rail import Rail, RailDual, RailPrimal, rbf, ridge
from tests.methods.analytic import CLASSES, D, N, Pictures, features, learn, make, make_model, never
from tests.tuner.blocks import same, weights

METHODS = pytest.mark.parametrize("name", ["rail-primal", "rail-dual"])


# ---- the regression -------------------------------------------------------------------------------------------------


def test_primal_is_the_papers_recursion_and_the_batch_solution(monkeypatch):
    monkeypatch.setattr("keeplora.methods.rail.ROWS", 6)  # several blocks per task
    learner = make("rail-primal", lam=0.1)
    assert isinstance(learner, RailPrimal)
    tasks = [learn(learner, name) for name in ("one", "two")]
    learned = learner._learned()
    columns = {name: i for i, name in enumerate([*CLASSES["one"], *CLASSES["two"]])}
    W = learner.weights(learned, columns, torch.device("cpu"))
    assert W.shape == (32, 5)
    assert W.dtype == torch.float64

    P = learner.projection(D)
    phis, ys = [], []
    for task in tasks:
        phi = (features(learner, task).double() @ P).clamp(min=0)
        one_hot = torch.zeros(N, 5, dtype=torch.float64)
        for row, label in enumerate(task.labels.tolist()):
            one_hot[row, columns[task.classes[int(label)]]] = 1.0
        phis.append(phi)
        ys.append(one_hot)

    # Batch: least squares over [Φ; √λ I] against [Y; 0], all tasks at once.
    rows = torch.cat([*phis, math.sqrt(0.1) * torch.eye(32, dtype=torch.float64)])
    targets = torch.cat([*ys, torch.zeros(32, 5, dtype=torch.float64)])
    batch = torch.linalg.lstsq(rows, targets).solution
    assert float((W - batch).abs().max()) < 1e-5 * float(batch.abs().max())

    # The recursion of the paper (Theorem 1), over batches of 7: R by Woodbury, W by its correction.
    R = torch.eye(32, dtype=torch.float64) / 0.1
    recursive = torch.zeros(32, 5, dtype=torch.float64)
    for phi, y in zip(torch.cat(phis).split(7), torch.cat(ys).split(7), strict=True):
        inner = torch.linalg.inv(torch.eye(len(phi), dtype=torch.float64) + phi @ R @ phi.T)
        R = R - R @ phi.T @ inner @ phi @ R
        recursive = recursive + R @ phi.T @ (y - phi @ recursive)
    assert float((W - recursive).abs().max()) < 1e-5 * float(batch.abs().max())

    first = learner.weights(learned[:1], columns, torch.device("cpu"))
    assert float((W[:, :3] - first[:, :3]).abs().max()) > 1e-3  # the second task's pictures count against the first's
    x = features(learner, tasks[0])
    names, scores = learner.scores(x)
    assert names == list(columns)
    torch.testing.assert_close(scores, (x.double() @ P).clamp(min=0) @ batch, atol=1e-6, rtol=1e-5)


def test_dual_is_kernel_ridge_regression_over_everything_seen():
    learner = make("rail-dual", lam=1e-3, gamma=0.7)
    tasks = [learn(learner, name) for name in ("one", "two")]
    X = torch.cat([features(learner, task) for task in tasks]).double()
    labels = torch.cat([tasks[0].labels, tasks[1].labels + 3])
    K = torch.exp(-0.7 * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist").square())
    alpha = torch.linalg.inv(K + 1e-3 * torch.eye(2 * N, dtype=torch.float64)) @ torch.eye(5).double()[labels]
    new = torch.nn.functional.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    k = torch.exp(-0.7 * (new.double().unsqueeze(1) - X).square().sum(-1))
    names, scores = learner.scores(new)
    assert names == [*CLASSES["one"], *CLASSES["two"]]
    torch.testing.assert_close(scores, k @ alpha, atol=1e-6, rtol=1e-5)
    # It does not forget: the first task's pictures are still told apart.
    _, scores = learner.scores(features(learner, tasks[0]))
    assert torch.equal(scores.argmax(1), tasks[0].labels)


def test_primal_and_dual_ridge_agree_on_a_linear_kernel():
    """(XᵀX + λI)⁻¹XᵀY = Xᵀ(XXᵀ + λI)⁻¹Y: `ridge` in both of its uses."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(9, k, dtype=torch.float64, generator=generator) for k in (4, 2))
    torch.testing.assert_close(ridge(X.T @ X, X.T @ Y, 0.3), X.T @ ridge(X @ X.T, Y, 0.3))
    near = 1e8 * torch.randn(64, 7, dtype=torch.float64, generator=generator)
    assert float(rbf(near, near, 1.0).amax()) <= 1.0  # a distance that cancels to below zero counts as zero


@METHODS
def test_a_class_of_two_tasks_is_one_column_fed_by_both(name):
    learner = make(name)
    for task in ("one", "again"):
        learn(learner, task)
    x = features(learner, Pictures(learner.model, "again"))
    names, scores = learner.scores(x)
    assert names == ["cat", "dog", "owl", "tram"]

    # The same pictures as one task with the union of the classes.
    one, again = (Pictures(learner.model, task) for task in ("one", "again"))
    together = Pictures(learner.model, "one")
    together.classes = ["cat", "dog", "owl", "tram"]
    together.batches = [
        {"pixel_values": torch.cat([one.x, again.x]), "labels": torch.cat([one.labels, again.labels + 2])}
    ]
    other = make(name, learner.model)
    with other.task("union", together.batches, never, objective=together):
        pass
    torch.testing.assert_close(other.scores(x)[1], scores, atol=1e-7, rtol=1e-6)


# ---- the learner ----------------------------------------------------------------------------------------------------


@METHODS
def test_the_model_stays_untouched_and_the_tasks_are_learned(name):
    learner = make(name)
    before, flags = weights(learner.model), {n: p.requires_grad for n, p in learner.model.named_parameters()}
    learner.model.train()
    logits = torch.randn(3, 2)
    assert learner.readout(torch.zeros(3, D), logits, ["cat", "dog"]) is logits  # zero-shot before anything is learned
    task = Pictures(learner.model, "one")
    model = learner.start_task("one", task.batches, never, objective=task)
    assert not any(p.requires_grad for p in model.parameters())
    record = learner.finish_task()
    assert record is not None
    assert record.info["trained_parameters"] == 0
    assert not record.deltas
    assert same(weights(learner.model), before)
    assert {n: p.requires_grad for n, p in learner.model.named_parameters()} == flags
    assert learner.model.training
    second = learn(learner, "two")
    candidates = [*CLASSES["one"], *CLASSES["two"]]
    for known, offset in ((task, 0), (second, 3)):
        found = learner.readout(features(learner, known), torch.zeros(N, 5), candidates)
        assert (found.argmax(1) == known.labels + offset).float().mean() > 0.9


@METHODS
def test_back_from_disk(name, tmp_path):
    model = make_model()
    learner = make(name, model, seed=4)
    for task in ("one", "two"):
        learn(learner, task)
    x = features(learner, Pictures(model, "two"))
    logits = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    candidates = [*CLASSES["two"], *CLASSES["one"]]
    found = learner.readout(x, logits, candidates)
    learner.save_pretrained(tmp_path / "out")
    again = get_method(name).learner.from_pretrained(tmp_path / "out", make_model())
    assert torch.equal(again.readout(x, logits, candidates), found)
    assert again.state_bytes() == learner.state_bytes()
    # Going on is the same from memory and from disk.
    for each in (learner, again):
        assert isinstance(each, Rail)
        learn(each, "again")
    assert torch.equal(again.readout(x, logits, candidates), learner.readout(x, logits, candidates))
    assert not torch.equal(learner.readout(x, logits, candidates), found)


def test_state_bytes():
    primal, dual = make("rail-primal"), make("rail-dual")
    assert primal.state_bytes() == dual.state_bytes() == 0
    sizes = []
    for task in ("one", "two"):
        learn(primal, task)
        learn(dual, task)
        sizes.append((primal.state_bytes(), dual.state_bytes()))
    # ΦᵀΦ once, a column per class; features (float32) and labels (int32) of every picture.
    assert sizes == [(8 * (32 * 32 + 32 * 3), N * (4 * D + 4)), (8 * (32 * 32 + 32 * 5), 2 * N * (4 * D + 4))]


def test_random_features_come_from_the_seed():
    a, b, c = (make("rail-primal", seed=seed) for seed in (1, 1, 2))
    assert isinstance(a, RailPrimal)
    assert isinstance(b, RailPrimal)
    assert isinstance(c, RailPrimal)
    torch.rand(3)
    assert torch.equal(a.projection(D), b.projection(D))
    assert not torch.equal(a.projection(D), c.projection(D))
    assert 0.9 < float(a.projection(D).abs().max()) * D**0.5 <= 1.0


@METHODS
def test_a_task_that_fails_or_is_dropped_leaves_no_trace(name):
    learner = make(name)
    x = features(learner, learn(learner, "one"))
    logits = torch.zeros(N, 5)
    candidates = [*CLASSES["one"], *CLASSES["two"]]
    before = learner.readout(x, logits, candidates)

    def unchanged() -> None:
        assert [r.name for r in learner.records] == ["one"]
        assert torch.equal(learner.readout(x, logits, candidates), before)

    task = Pictures(learner.model, "two")
    learner.start_task("two", task.batches, never, objective=task)
    learner.abort_task()
    unchanged()
    bad = [*task.batches, {"pixel_values": torch.full((1, 8), math.nan), "labels": torch.zeros(1, dtype=torch.long)}]
    with pytest.raises(FloatingPointError, match="task 'two': the image features hold NaN"):
        learn_batches(learner, bad, task)
    unchanged()
    learner.start_task("two", [], never, objective=task)
    with pytest.raises(KeepLoraError, match="has no training picture"):
        learner.finish_task()
    unchanged()


def learn_batches(learner: Rail, batches: Any, task: Pictures) -> None:
    learner.start_task("two", batches, never, objective=task)
    learner.finish_task()


@METHODS
@pytest.mark.filterwarnings("ignore:task 'two' costs")
def test_accept_sees_the_task_and_undoes_it(name):
    learner = make(name)
    x = features(learner, learn(learner, "one"))
    logits = torch.zeros(N, 5)
    candidates = [*CLASSES["one"], *CLASSES["two"]]
    before = learner.readout(x, logits, candidates)
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append(learner.readout(x, logits, candidates))
        return {"guard": 100.0 - 50.0 * len(seen)}

    task = learn(learner, "two", accept={"max_drop": 1.0, "action": "undo"}, evaluate=evaluate)
    assert torch.equal(seen[0], before)
    assert not torch.equal(seen[1], before)  # measured with the new task in
    assert torch.equal(learner.readout(x, logits, candidates), before)
    learner.start_task("two", task.batches, never, objective=task, accept={"max_drop": 1.0, "action": "undo"},
                       evaluate=evaluate)  # fmt: skip
    assert learner.finish_task() is None
    # The same name with other pictures is solved anew, not taken for what was undone.
    learn(learner, "two", seed=9)
    fresh = make(name, learner.model)
    learn(fresh, "one")
    learn(fresh, "two", seed=9)
    assert torch.equal(learner.readout(x, logits, candidates), fresh.readout(x, logits, candidates))
    assert task.classes == CLASSES["two"]


# ---- settings -------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("rail-primal", {"lam": 0.0}, "tuner.options.lam must be a finite number above 0, got 0.0"),
        ("rail-primal", {"beta": 1.5}, "tuner.options.beta must lie between 0 and 1, got 1.5"),
        ("rail-primal", {"hidden": 0}, "tuner.options.hidden must be at least 1, got 0"),
        ("rail-dual", {"gamma": -1.0}, "tuner.options.gamma must be a finite number above 0, got -1.0"),
        ("rail-dual", {"samples_per_class": -1}, "tuner.options.samples_per_class must be at least 1, or 0 for all"),
        ("rail-dual", {"max_samples": 0}, "tuner.options.max_samples must be at least 1, got 0"),
        ("rail-dual", {"hidden": 8}, "unknown option 'hidden'"),
    )
    for name, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            make(name, **options)


def test_an_objective_is_needed():
    learner = make("rail-dual")
    task = Pictures(learner.model, "one")
    with pytest.raises(KeepLoraError, match=r"so start_task[(][)] needs `objective=`"):
        learner.start_task("one", task.batches, never)
    assert learner._open is None


def test_dual_refuses_more_pictures_than_it_can_solve_and_takes_fewer():
    learner = make("rail-dual", max_samples=N + 5)
    learn(learner, "one")
    with pytest.raises(KeepLoraError, match=f"over {2 * N} pictures, more than tuner.options.max_samples"):
        learn(learner, "two")
    assert [r.name for r in learner.records] == ["one"]

    learner = make("rail-dual", samples_per_class=2)
    assert isinstance(learner, RailDual)
    data = [(Pictures(learner.model, "one").x[i], i % 3) for i in range(N)]

    class Set(torch.utils.data.Dataset):
        labels = tuple(label for _, label in data)

        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"pixel_values": data[i][0], "labels": data[i][1]}

    task = Pictures(learner.model, "one")
    with learner.task("one", torch.utils.data.DataLoader(Set(), batch_size=4, shuffle=True), never, objective=task):
        pass
    kept = learner.records[0].tensors["rail/labels"]
    assert sorted(kept.tolist()) == [0, 0, 1, 1, 2, 2]
