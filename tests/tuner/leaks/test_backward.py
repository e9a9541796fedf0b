"""The backward bound beside what happened: exact where C_t was kept, broken where A U = 0 is, silent where it does not apply."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from keeplora import ContinualLearner
from tests.tuner.blocks import config, learn, make_net
from tests.tuner.leaks.learned import LAYER, TASKS, three_tasks


def test_rows_are_the_definition():
    learner = three_tasks(keep_covariance=True)
    audit = learner.audit("full")
    assert len(audit.backward) == 2 * len(learner.targets)  # a and b; nothing came after c
    for row in audit.backward:
        t = TASKS.index(row.task)
        record = learner.records[t]
        later = [r.factors[row.layer] for r in learner.records[t + 1 :]]
        D = sum(f.s * f.B.double() @ f.A.double() for f in later)
        C = record.covariance[row.layer].double()
        assert row.harm == pytest.approx(float((D @ C @ D.T).trace()), rel=1e-5)
        norm = float(torch.linalg.matrix_norm(D, 2))
        assert row.bound == pytest.approx(norm**2 * (1 - row.explained) * record.trace[row.layer], rel=1e-5)
        assert row.explained == record.explained[row.layer]
        assert row.tightness == pytest.approx(row.harm / row.bound)
        assert row.holds
        assert 0 < row.tightness <= 1
    assert "bound alone" not in " ".join(audit.notes)


def test_an_update_into_what_was_protected_breaks_the_bound_and_is_named():
    learner = three_tasks(keep_covariance=True)
    f, U = learner.records[2].factors[LAYER], learner.U[LAYER]
    learner.records[2].factors[LAYER] = dataclasses.replace(f, A=f.A + 3 * U[:, : len(f.A)].T)
    audit = learner.audit("full")
    broken = {(r.layer, r.task) for r in audit.backward if not r.holds}
    assert broken
    assert {layer for layer, _ in broken} == {LAYER}
    text = str(audit)
    assert f"{LAYER}: tasks after" in text
    assert "above the bound" in text
    assert not audit.passed  # the factor leak says it first


def test_without_covariance_the_bound_stands_alone():
    audit = three_tasks().audit("full")
    assert audit.backward
    assert all(row.harm is None and row.tightness is None and row.holds is None for row in audit.backward)
    assert all(row.bound >= 0 for row in audit.backward)
    assert "Backward stability: the bound alone, since C_t was not kept" in " ".join(audit.notes)
    assert "bound alone" in str(audit)


def test_everything_explained_bounds_by_zero():
    learner = ContinualLearner(make_net(), config(keep_covariance=True, energy_features=1.0, energy_weights=0.0))
    audit = learn(learn(learner, "a", 0), "b", 1).audit("full")
    assert audit.backward
    for row in audit.backward:
        assert row.holds
        assert row.tightness is None
        assert row.bound <= 1e-5


def test_gradient_memory_has_no_bound_and_says_so():
    learner = three_tasks(memory="gradients", keep_covariance=True)
    audit = learner.audit("full")
    assert audit.passed
    assert audit.backward == ()
    assert "With gradient memory (M8g) the stored share and trace are those of ‖G‖²" in str(audit)
    assert {r.basis for r in audit.exports} == {None, "a", "b"}  # leaks apply as ever


def test_nothing_of_it_is_measured_unless_asked_for():
    learner = three_tasks(keep_covariance=True)
    for detail in ("quick", "exports"):
        audit = learner.audit(detail)
        assert audit.backward == ()
        assert all(r.worst is None for r in audit.exports)
        assert "backward" not in audit.to_dict()
