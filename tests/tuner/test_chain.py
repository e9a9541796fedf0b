"""What entries add up to, against a model that keeps whole states by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.errors import LedgerError
from keeplora.tuner.chain import PURGE, REMOVE, RESTORE, ROLLBACK, TASK, Chain, Step


class Naive:
    """The same rules, told otherwise: lists of (task, active) as U has them, copied whole at every entry.

    A task remembers the row of tasks that it was learned behind. A row is cut behind its last active task.
    """

    def __init__(self) -> None:
        self.row: list[tuple[int, bool]] = []
        self.removed: set[int] = set()
        self.gone: set[int] = set()
        self.behind: dict[int, list[int]] = {}
        self.past: list[tuple[list[tuple[int, bool]], set[int]]] = [([], set())]
        self.count = 0

    def apply(self, kind: str, subject: int) -> bool:
        row, removed = list(self.row), set(self.removed)
        active = {t for t, on in row if on}
        new = self.count + 1
        if kind == TASK:
            self.behind[new] = [t for t, _ in row]
            row.append((new, True))
        elif kind == ROLLBACK:
            if subject >= len(self.past):
                return False
            row, removed = list(self.past[subject][0]), set(self.past[subject][1])
            if any(on and t in self.gone for t, on in row):
                return False
        elif subject not in self.behind:
            return False
        elif kind == REMOVE:
            if subject not in active:
                return False
            row = [(t, on and t != subject) for t, on in row]
            while row and not row[-1][1]:
                row.pop()
            removed.add(subject)
        elif kind == RESTORE:
            if subject in active or subject in self.gone:
                return False
            names = [t for t, _ in row]
            if subject not in names:
                if self.behind[subject][: len(names)] != names:
                    return False
                row += [(t, False) for t in self.behind[subject][len(names) :]] + [(subject, False)]
            row = [(t, on or t == subject) for t, on in row]
            removed.discard(subject)
        elif kind == PURGE:
            if subject in active or subject in self.gone:
                return False
            self.gone.add(subject)
        self.row, self.removed, self.count = row, removed, new
        self.past.append((list(row), set(removed)))
        return True


steps = st.lists(
    st.tuples(st.sampled_from([TASK, TASK, TASK, REMOVE, RESTORE, ROLLBACK, PURGE]), st.integers(0, 12)), max_size=14
)


@given(steps)
@settings(max_examples=400, deadline=None)
def test_replay_is_what_the_rules_say(drawn):
    chain, naive = Chain(), Naive()
    for kind, subject in drawn:
        before, length = chain.state, len(chain)
        name = f"t{length + 1}" if kind == TASK else ""
        fits = naive.apply(kind, subject)
        if not fits:
            with pytest.raises(LedgerError):
                chain.add(Step(kind, name, subject))
            assert (chain.state, len(chain)) == (before, length)
            continue
        state = chain.add(Step(kind, name, 0 if kind == TASK else subject))
        assert state.history == tuple(t for t, _ in naive.row)
        assert state.active == tuple(t for t, on in naive.row if on)
        assert set(state.removed) == naive.removed
        assert set(state.purged) == naive.gone
        # Each task stands in U behind just those that it was learned behind, so that the whole is orthonormal.
        for place, task in enumerate(state.history):
            assert chain.before[task] == state.history[:place]
        assert not state.history or state.history[-1] in state.active
        assert Chain(chain.steps).state == state
        # Whatever U of a task that can still be in force needs of a purged one is said to be needed.
        for gone in state.purged:
            for task in chain.tasks():
                if task not in state.purged and gone in chain.before[task]:
                    assert chain.needed(gone)
        assert not set(state.active) & set(state.purged)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_every_operation_but_a_purge_is_undone_by_going_back(drawn):
    chain = Chain()
    for kind, subject in drawn:
        if kind == PURGE:
            continue
        before = chain.state
        try:
            chain.add(Step(kind, f"t{len(chain) + 1}", 0 if kind == TASK else subject))
        except LedgerError:
            continue
        other = Chain(chain.steps)
        assert other.add(Step(ROLLBACK, subject=len(chain) - 1)) == before


def tasks(*names: str) -> Chain:
    return Chain([Step(TASK, name) for name in names])


def test_names_and_numbers():
    chain = tasks("a", "b", "3")
    assert [chain.find(x) for x in ("a", "2", 2, "3")] == [1, 2, 2, 3]
    assert [chain.find_entry(x) for x in ("a", "0", 0, "3", 7)] == [1, 0, 0, 3, 7]
    with pytest.raises(LedgerError, match=r"no task 'bb'; did you mean 'b'\?"):
        chain.find("bb")
    with pytest.raises(LedgerError, match="it holds none"):
        Chain().find("x")
    chain.add(Step(ROLLBACK, subject=1))
    chain.add(Step(TASK, "b"))
    assert chain.find("b") == 5
    assert chain.find("b", [2]) == 2  # the one that can be restored
    assert chain.status(2) == "rolled back"


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (Step(REMOVE, subject=9), "there is no task at entry 9"),
        (Step(ROLLBACK, subject=5), "there is no entry 5 to roll back to: the last one is 4"),
        (Step(REMOVE, subject=2), r"task 'b' \(entry 2\) is not active"),
        (Step(RESTORE, subject=1), "is active already"),
        (Step(PURGE, subject=1), "remove it before its tensors are purged"),
        (Step("compact", subject=1), "kind 'compact' is unknown"),
    ],
)
def test_what_does_not_fit_is_one_sentence(step, sentence):
    chain = tasks("a", "b", "c")
    chain.add(Step(REMOVE, subject=2))
    with pytest.raises(LedgerError, match=sentence):
        chain.add(step)


def test_directions_that_were_given_up_do_not_come_back_beside_later_tasks():
    chain = tasks("a", "b")
    chain.add(Step(REMOVE, subject=2))
    assert chain.state.history == (1,)
    assert Chain(chain.steps).add(Step(RESTORE, subject=2)).active == (1, 2)
    chain.add(Step(TASK, "c"))
    with pytest.raises(LedgerError, match=r"its directions were given up with it, and 'c' learned in them since"):
        chain.add(Step(RESTORE, subject=2))
    assert chain.add(Step(ROLLBACK, subject=2)).active == (1, 2)


def test_a_purged_task_is_gone_from_every_state():
    chain = tasks("a", "b", "c")
    chain.add(Step(REMOVE, subject=2))
    chain.add(Step(PURGE, subject=2))
    assert chain.needed(2)
    assert chain.status(2) == "purged"
    with pytest.raises(LedgerError, match="it can only be learned again"):
        chain.add(Step(RESTORE, subject=2))
    with pytest.raises(LedgerError, match="entry 3 cannot be gone back to"):
        chain.add(Step(ROLLBACK, subject=3))
    with pytest.raises(LedgerError, match="was purged already"):
        chain.add(Step(PURGE, subject=2))
    assert chain.add(Step(ROLLBACK, subject=4)).active == (1, 3)


def test_two_tasks_of_one_name_are_never_active_together():
    chain = tasks("a", "b")
    chain.add(Step(REMOVE, subject=1))
    chain.add(Step(TASK, "a"))
    with pytest.raises(LedgerError, match="beside another of its name"):
        chain.add(Step(RESTORE, subject=1))
