"""Leaks of factors: into every basis, against what was protected at the time, and measured once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.tuner.leaks import factors
from tests.tuner.blocks import config, learn, make_net
from tests.tuner.leaks.learned import LAYER, TASKS, ends, three_tasks


@pytest.fixture(scope="module")
def learner():
    return three_tasks()


@pytest.fixture
def calls(monkeypatch):
    """How often a leak is worked out."""
    made = []
    original = factors.factor_leaks

    def counted(B, A, U, widths):
        made.append(len(widths))
        return original(B, A, U, widths)

    monkeypatch.setattr(factors, "factor_leaks", counted)
    return made


def test_each_update_is_measured_against_U0_and_every_earlier_increment(learner):
    audit = learner.audit()
    assert audit.bases == (None, *TASKS)
    for row in audit.rows:
        i = TASKS.index(row.task)
        f, U, stops = learner.records[i].factors[row.layer], learner.U[row.layer].double(), ends(learner, row.layer)
        BA = f.B.double() @ f.A.double()
        expected = []
        for start, stop in zip([0, *stops[:i]], stops[: i + 1], strict=True):
            expected.append(float((BA @ U[:, start:stop]).norm() / BA.norm()) if stop > start else None)
        assert row.by_basis == pytest.approx(tuple(expected), rel=1e-6)
        assert row.factor_leak == pytest.approx(float((BA @ U[:, : stops[i]]).norm() / BA.norm()), rel=1e-6)
        assert max(v or 0.0 for v in row.by_basis) <= 1e-5


def test_a_leak_into_one_tasks_directions_shows_there_alone():
    learner = three_tasks()
    start, stop = ends(learner, LAYER)[1:3]  # what task b added
    f = learner.records[2].factors[LAYER]
    learner.records[2].factors[LAYER] = dataclasses.replace(f, A=f.A + 0.1 * learner.U[LAYER][:, start:stop].mean(1))
    bad = [(r.layer, r.task) for r in learner.audit().rows if r.factor_leak > 1e-5]
    assert bad == [(LAYER, "c")]
    (row,) = [r for r in learner.audit().rows if (r.layer, r.task) == (LAYER, "c")]
    assert [v > 1e-3 for v in row.by_basis] == [False, False, True]


def test_a_figure_is_worked_out_once(calls):
    learner = ContinualLearner(make_net(), config())
    layers = len(learner.targets)
    for i in range(4):
        learn(learner, f"t{i}", i)
        found = learner.audit()
        assert calls == [i + 1] * layers, "only the new task's, against U₀ and the tasks before it"
        calls.clear()
        assert learner.audit() == found
        assert learner.audit("exports").rows == found.rows
        assert not calls


def test_what_was_changed_since_is_measured_again(calls):
    learner = three_tasks()
    before = learner.audit()
    calls.clear()
    learner.records[1].factors[LAYER].A.data[0] += 1.0  # torch counts no write through .data
    assert learner.audit() != before
    assert calls == [2]
    calls.clear()
    first = learner.records[0].basis[LAYER]
    learner.records[0].basis[LAYER] = first.flip(0)  # the same numbers in each column, in another order
    assert not learner.audit().passed
    assert calls == [2, 3]


def test_two_learners_do_not_share_figures(learner):
    other = three_tasks(energy_weights=0.5)
    assert learner.audit() != other.audit()
    assert learner.audit() == three_tasks().audit()


class Removed(ContinualLearner):
    """A learner from whose weights a task was taken, while its directions stay protected."""

    out: tuple[str, ...] = ()
    all_records: list = []  # noqa: RUF012

    @property
    def history(self):
        return self.all_records if self.out else self.records


def without(name: str, **kwargs) -> Removed:
    from keeplora.tuner.persistence import all_updates

    learner = Removed(make_net(), config(energy_features=0.9, **kwargs))
    torch.manual_seed(0)
    for i, task in enumerate(TASKS):
        learn(learner, task, i)
    learner.all_records, learner.out = list(learner.records), (name,)
    learner.records = [r for r in learner.records if r.name != name]
    learner.store.restore(all_updates(learner.records))
    return learner


def test_directions_of_a_removed_task_still_count():
    learner, whole = without("b"), three_tasks()
    audit = learner.audit("full")
    assert audit.passed
    assert audit.bases == (None, *TASKS)
    assert {row.task for row in audit.rows} == {"a", "c"}
    expected = {(r.layer, r.task): r.by_basis for r in whole.audit().rows}
    for row in audit.rows:
        assert row.by_basis == expected[row.layer, row.task]
        assert len(row.by_basis) == (1 if row.task == "a" else 3)
    # What is left in the weights: a before it, c after it.
    running = {(r.layer, r.basis) for r in audit.exports if r.export == "running"}
    assert {basis for _, basis in running} == {None, "a", "b"}
    assert all(r.leak is None or r.leak <= 1e-5 for r in audit.exports if r.export == "running")
    # The last task of all is the one taken out: nothing came after b, and nothing after c.
    last = without("c").audit("full")
    assert {r.basis for r in last.exports} == {None, "a"}
    assert {row.task for row in last.rows} == {"a", "b"}


def test_an_update_that_no_history_explains_is_refused():
    learner = without("b")
    learner.records = [*learner.records, dataclasses.replace(learner.records[0], name="smuggled")]
    with pytest.raises(KeepLoraError, match="task 'smuggled' is in the weights but not among the tasks behind"):
        learner.audit()


def test_a_task_that_left_a_layer_alone_has_no_figures():
    learner = three_tasks()
    del learner.records[1].factors[LAYER]
    (row,) = [r for r in learner.audit().rows if (r.layer, r.task) == (LAYER, "b")]
    assert (row.factor_leak, row.by_basis) == (0.0, ())
    assert torch.isfinite(torch.tensor([r.factor_leak for r in learner.audit().rows])).all()


def with_budget():
    """Three tasks; as task b ended, a memory budget took the first of task a's columns out of force, and c learned after."""
    learner = three_tasks(keep_covariance=True)
    first = learner.records[0].basis[LAYER]
    width = first.shape[1] + learner.records[1].basis[LAYER].shape[1]
    kept = torch.ones(width, dtype=torch.bool)
    kept[0] = False
    learner.records[1].kept = {LAYER: kept}  # type: ignore[attr-defined]
    f = learner.records[2].factors[LAYER]
    learner.records[2].factors[LAYER] = dataclasses.replace(f, A=f.A + first[:, :1].T)
    return learner, first


def test_directions_out_of_force_are_no_leak():
    learner, first = with_budget()
    audit = learner.audit("full")
    assert audit.passed
    assert all(r.leak is None or r.leak <= 1e-5 for r in audit.exports if r.export in ("running", "adapter"))
    (row,) = [r for r in audit.rows if (r.layer, r.task) == (LAYER, "c")]
    assert (row.by_basis[1] is None) == (first.shape[1] == 1)
    assert row.factor_leak <= 1e-5
    # Had they still counted, it would have been one.
    learner.records[1].kept = {}
    assert not learner.audit().passed


def test_the_bound_takes_what_is_still_explained():
    learner, _ = with_budget()
    C, U = learner.records[0].covariance[LAYER].double(), learner.records[0].basis[LAYER].double()
    shares = (U * (C @ U)).sum(0) / C.trace()
    learner.records[0].values = {}  # type: ignore[attr-defined]
    before = {(r.layer, r.task): r for r in learner.audit("full").backward}[LAYER, "a"]
    assert before.explained == learner.records[0].explained[LAYER]
    learner.records[0].values = {LAYER: shares.float()}  # type: ignore[attr-defined]
    after = {(r.layer, r.task): r for r in learner.audit("full").backward}[LAYER, "a"]
    assert after.explained == pytest.approx(before.explained - float(shares[0]), rel=1e-5)
    assert after.bound > before.bound
    assert after.holds
