"""`accept`: a task that costs the old ones too much is told of, or undone before it enters the ledger."""

from __future__ import annotations

import warnings

import pytest

from keeplora import ContinualLearner
from keeplora.errors import ConfigError
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, same, train, weights


class Scores:
    """What `evaluate` returns: first before the task, then after the merge."""

    def __init__(self, before: dict[str, float], after: dict[str, float]) -> None:
        self.rows = [before, after]
        self.calls = 0

    def __call__(self) -> dict[str, float]:
        self.calls += 1
        return self.rows[self.calls - 1]


@pytest.fixture
def learner(tmp_path):
    return learn(ContinualLearner(make_net(), config(), ledger=tmp_path / "ledger"), "old", seed=5)


def run(learner, accept, scores):
    learner.start_task("new", loader(), loss_fn, accept=accept, evaluate=scores)
    train(learner.model, loader())
    return learner.finish_task()


FALLEN = ({"old": 90.0, "probe": 60.0}, {"old": 87.5, "probe": 59.5})


def test_warn_names_what_fell_and_by_how_much(learner):
    with pytest.warns(UserWarning, match=r"task 'new' costs more than 1 points: old by 2\.5$"):
        record = run(learner, {"max_drop": 1.0}, Scores(*FALLEN))
    assert record is learner.records[-1]
    assert len(learner._ledger.records()) == 2


def test_undo_leaves_no_trace(learner):
    before, U = weights(learner.model), {n: v.clone() for n, v in learner.U.items()}
    files = sorted(learner._ledger.path.rglob("*"))
    with pytest.warns(UserWarning, match=r"old by 2\.5; it is undone and does not enter the ledger"):
        assert run(learner, {"max_drop": 1.0, "action": "undo"}, Scores(*FALLEN)) is None
    assert same(weights(learner.model), before)
    assert same(learner.U, U)
    assert [r.name for r in learner.records] == ["old"]
    assert sorted(learner._ledger.path.rglob("*")) == files
    learn(learner, "new", seed=2)  # the name is free, and so is the learner


@pytest.mark.parametrize("accept", [{"max_drop": 2.5, "action": "undo"}, {"max_drop": 3}])
def test_within_the_limit_nothing_is_said(learner, accept):
    scores = Scores(*FALLEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(learner, accept, scores) is not None
    assert scores.calls == 2


def test_evaluate_sees_the_merged_model(learner):
    states = []

    def evaluate():
        states.append(weights(learner.model))
        return {"old": 1.0}

    run(learner, {"max_drop": 1.0}, evaluate)
    assert states[0].keys() == states[1].keys() == weights(make_net()).keys()  # no adapter inside
    assert not same(states[0], states[1])
    assert same(states[1], weights(learner.model))


def test_score_that_is_not_a_number_does_not_pass(learner):
    with pytest.warns(UserWarning, match="undone"):
        assert run(learner, {"max_drop": 1, "action": "undo"}, Scores({"old": 9.0}, {"old": float("nan")})) is None


def test_exception_in_evaluate_undoes_the_task(learner):
    before = weights(learner.model)
    with pytest.raises(IndexError):
        run(learner, {"max_drop": 1}, iter_scores([{"old": 1.0}]))
    assert learner._open is None
    assert same(weights(learner.model), before)
    assert len(learner.records) == 1


def iter_scores(rows):
    return lambda: rows.pop()


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ({"max_dorp": 1.0}, r"accept: unknown key 'max_dorp'; did you mean 'max_drop'\?"),
        ({}, "max_drop must be a number of points, 0 or more, got None"),
        ({"max_drop": -1}, "got -1"),
        ({"max_drop": True}, "got True"),
        ({"max_drop": "1"}, "got '1'"),
        ({"max_drop": float("nan")}, "got nan"),
        ({"max_drop": 1, "action": "wran"}, r"unknown action 'wran'; did you mean 'warn'\?"),
    ],
)
def test_bad_accept_is_refused_before_anything_happens(learner, accept, text):
    with pytest.raises(ConfigError, match=text):
        learner.start_task("new", loader(), loss_fn, accept=accept, evaluate=dict)
    assert learner._open is None


def test_accept_needs_evaluate(learner):
    with pytest.raises(ConfigError, match="accept needs `evaluate`"):
        learner.start_task("new", loader(), loss_fn, accept={"max_drop": 1.0})
