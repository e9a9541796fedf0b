"""A stream without task labels: cut where it changes, learned as if the tasks had been named."""

from __future__ import annotations

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.methods import get_method
from keeplora.tuner import ranks
from keeplora.tuner.unlabelled import KeptBatches
from tests.tuner.blocks import Samples, config, hooks, loss_fn, make_net, same, weights

SIZE = 8


def of_task(seed: int, n: int):
    data = Samples(n, seed)
    return [(data.x[i : i + SIZE], torch.tensor(data.labels[i : i + SIZE])) for i in range(0, n, SIZE)]


def stream(*tasks: tuple[int, int]):
    for seed, n in tasks:
        yield from of_task(seed, n)


def step(model, batch, optimizer):
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()


def learn(learner, batches, **options):
    """Every task that is found, and the batches that were trained on."""
    found = []
    for task in learner.unlabelled(batches, loss_fn, **{"alarm_rate": 1e-3, "warmup": 64, **options}):
        with task as model:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            trained = []
            for batch in task:
                step(model, batch, optimizer)
                trained.append(batch)
        found.append((task, trained))
    return found


def test_the_stream_is_cut_where_its_tasks_begin():
    learner = ContinualLearner(make_net(), config())
    found = learn(learner, stream((1, 160), (2, 160), (3, 160)))
    assert [record.name for record in learner.records] == ["task-1", "task-2", "task-3"]
    assert hooks(learner.model) == []
    assert learner._open is None
    told = [record.info["unlabelled"] for record in learner.records]
    assert [t["alarm"] is None for t in told] == [False, False, True]
    for (task, trained), after in zip(found, (160, 160, 160), strict=True):
        # An alarm within two batches of the change; what came after it was not trained on as the old task.
        assert after - SIZE <= len(trained) * SIZE == task.samples <= after + SIZE
        assert task.alarm is None or abs(task.alarm.onset + 64 - 160) <= 2 * SIZE
    assert all(record.factors for record in learner.records)


def test_a_new_task_starts_from_the_samples_since_the_change():
    """What belongs to task 2 is no part of task 1's statistics, and of task 2's from its first batch on."""
    learner = ContinualLearner(make_net(), config())
    first, second = of_task(1, 160), of_task(2, 160)
    tasks = [task for task, _ in learn(learner, iter([*first, *second]))]

    def of(batches, kept):
        return [sum(torch.equal(b[0], k[0]) for b in batches) for k in kept]

    assert len(tasks) == 2
    assert sum(of(second, tasks[0].kept)) == 0
    assert sum(of(first, tasks[1].kept)) == 0
    assert sum(of(first, tasks[0].kept)) >= len(first) - 1
    assert sum(of(second, tasks[1].kept)) == len(second)


def test_watching_changes_nothing_that_is_learned():
    """With no alarm, weights and U are those of `learner.task` over the same batches, bit for bit."""
    batches = of_task(1, 160)
    one, other = (ContinualLearner(make_net(), config()) for _ in range(2))
    torch.manual_seed(0)  # dropout draws
    learn(one, iter(batches), name=lambda i: "first")
    torch.manual_seed(0)
    kept = KeptBatches(64, 0)
    for batch in batches[:8]:
        kept.add(batch)
    with other.task("first", kept, loss_fn) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for batch in batches:
            step(model, batch, optimizer)
        for batch in batches[8:]:
            kept.add(batch)
    assert same(weights(one.model), weights(other.model))
    # Pending batches are kept in the stream's order, so the sums are the same too.
    assert all(torch.equal(one.U[name], other.U[name]) for name in one.U)


def test_training_is_no_change_of_the_data():
    """However far B goes, the watch sees the model as it was when the task began."""
    learner = ContinualLearner(make_net(), config(lora_alpha=12))
    alarms = []
    for task in learner.unlabelled(iter(of_task(1, 480)), loss_fn, alarm_rate=1e-4, warmup=64):
        with task as model:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
            for batch in task:
                step(model, batch, optimizer)
            trained = learner._open.adapter
            assert max(float(trained.weights(name)[1].detach().norm()) for name in trained.A0) > 0.1
            assert not any(trained.weights(name)[0].requires_grad for name in trained.A0)
        alarms.append(task.alarm)
    assert alarms == [None]


def test_whoever_stops_early_still_gets_the_next_task():
    learner = ContinualLearner(make_net(), config())
    for task in learner.unlabelled(stream((1, 160), (2, 160)), loss_fn, alarm_rate=1e-3, warmup=64):
        with task as model:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for i, batch in enumerate(task):
                if i == 3:
                    break
                step(model, batch, optimizer)
        assert len(task.kept) >= 18  # the rest was read for the statistics
    assert [record.name for record in learner.records] == ["task-1", "task-2"]


def test_an_exception_undoes_the_task_under_way():
    learner = ContinualLearner(make_net(), config())
    before = weights(learner.model)

    def train():
        for task in learner.unlabelled(stream((1, 160)), loss_fn, warmup=64):
            with task as model:
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
                for batch in task:
                    step(model, batch, optimizer)
                    raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train()
    assert same(before, weights(learner.model))
    assert learner._open is None
    assert learner.records == []


def test_a_short_end_is_a_task_of_its_own():
    learner = ContinualLearner(make_net(), config())
    found = learn(learner, stream((1, 24)))
    assert len(found) == 1
    assert len(found[0][1]) == 3
    assert learner.records[0].info["unlabelled"]["alarm"] is None
    assert learn(learner, iter([])) == []


def test_a_method_without_subspaces_is_watched_by_the_tasks_own():
    learner = get_method("lora").learner(make_net(), config())
    learn(learner, stream((1, 160), (2, 160)))
    assert len(learner.records) == 2


@pytest.mark.parametrize(("outside", "inside_U"), [("seen", True), ("task", False)])
def test_outside_of_what(outside, inside_U):
    """ "seen" holds the protected subspace, "task" does not."""
    learner = ContinualLearner(make_net(), config(energy_weights=0.5))
    for task in learner.unlabelled(stream((1, 160)), loss_fn, warmup=64, outside=outside):
        with task:
            detector = task._detector
            left = [float(S.project_out(learner.U[name].T).norm()) for name, S in detector.seen.items()]
        assert all((norm < 1e-4) is inside_U for norm in left)


def test_what_is_refused(monkeypatch):
    learner = ContinualLearner(make_net(), config())
    for bad in ({"warmup": 1}, {"keep": True}, {"alarm_rate": 0.7}, {"outside": "U"}):
        with pytest.raises(KeepLoraError, match=r"warmup|keep|alarm_rate|outside"):
            learner.unlabelled([], loss_fn, **bad)
    with pytest.raises(KeepLoraError, match="was left out: write `with task as peft_model:`"):
        for _ in learner.unlabelled(stream((1, 160)), loss_fn, warmup=64):
            pass
    for task in learner.unlabelled(stream((1, 160)), loss_fn, warmup=64):
        with pytest.raises(KeepLoraError, match="has not begun"):
            iter(task)
        break
    full = get_method("full-ft").learner(make_net(), config())
    with pytest.raises(KeepLoraError, match="needs a method that trains an adapter"):
        learn(full, stream((1, 160)))
    assert full._open is None
    monkeypatch.setattr(ranks, "active", lambda: True)
    with pytest.raises(KeepLoraError, match="in one process"):
        learner.unlabelled([], loss_fn)


def test_free_modules_are_refused():
    learner = ContinualLearner(make_net(), config(free_modules=["head"]))
    with pytest.raises(KeepLoraError, match="free_modules"):
        learner.unlabelled([], loss_fn)


def test_the_reservoir_keeps_each_alike():
    counts = [0] * 20
    for seed in range(400):
        kept = KeptBatches(5, seed)
        for i in range(20):
            kept.add(i)
        assert len(kept) == 5
        for i in kept:
            counts[i] += 1
    assert all(60 <= c <= 145 for c in counts)  # 100 expected, sd 8.7
