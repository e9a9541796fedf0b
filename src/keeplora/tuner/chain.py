"""What a ledger's entries add up to: a pure function of their order, without files and tensors.

Entries are numbered from 1. ``task`` enters a task; ``remove``, ``restore``, ``rollback`` and ``purge`` say which tasks are
in force from then on. Nothing is ever taken out of the list, so every state that there was can be come back to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from keeplora.errors import LedgerError, did_you_mean

TASK, REMOVE, RESTORE, ROLLBACK, PURGE = "task", "remove", "restore", "rollback", "purge"
KINDS = (TASK, REMOVE, RESTORE, ROLLBACK, PURGE)


@dataclass(frozen=True)
class Step:
    """One entry.

    Attributes:
        kind: one of `KINDS`. name: of the task that was entered, or that the entry speaks of.
        subject: the entry of the task that is removed, restored or purged; of a rollback, the entry whose state it goes
            back to (0: before the first).
        purged: of a task: its tensors were gone already when this ledger was copied; its purge is a later entry.
    """

    kind: str
    name: str = ""
    subject: int = 0
    purged: bool = False


@dataclass(frozen=True)
class State:
    """Which tasks are in force after an entry; all are entries of tasks, rising.

    Attributes:
        active: those whose updates add up to the model.
        history: those whose directions are in U: the active ones, and the removed ones that an active one was learned
            after, since its features inside their directions were counted as protected.
        removed: taken out and not restored. purged: whose tensors are gone for good.
    """

    active: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    purged: tuple[int, ...] = ()


class Chain:
    """The entries so far and the state after each of them.

    >>> chain = Chain([Step("task", "a"), Step("task", "b"), Step("task", "c"), Step("remove", subject=2)])
    >>> chain.state.active, chain.state.history            # b's directions stay protected: c was learned after it
    ((1, 3), (1, 2, 3))
    >>> chain.add(Step("rollback", subject=1)).active
    (1,)
    >>> chain.add(Step("rollback", subject=4)).active      # a rollback is undone by going to the entry before it
    (1, 3)
    """

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self.steps: list[Step] = []
        self.states: list[State] = [State()]
        self.before: dict[int, tuple[int, ...]] = {}
        """The history that each task was learned after."""
        for step in steps:
            self.add(step)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def state(self) -> State:
        """After the last entry."""
        return self.states[-1]

    def add(self, step: Step) -> State:
        """Append an entry; `LedgerError` if it does not fit the state, and nothing is appended then."""
        state = self.after(step)
        self.steps.append(step)
        self.states.append(state)
        if step.kind == TASK:
            self.before[len(self.steps)] = self.states[-2].history
        return state

    def after(self, step: Step) -> State:
        """The state that the entry would lead to, or `LedgerError`."""
        state, k = self.state, step.subject
        if step.kind == TASK:
            new = len(self.steps) + 1
            return replace(state, active=(*state.active, new), history=(*state.history, new))
        if step.kind == ROLLBACK:
            return self._rolled_back(k)
        if not (1 <= k <= len(self.steps)) or self.steps[k - 1].kind != TASK:
            raise LedgerError(f"there is no task at entry {k}: `keeplora ledger log` lists them")
        if step.kind == REMOVE:
            if k not in state.active:
                raise LedgerError(f"task {self.label(k)} is not active, so it cannot be removed")
            active = tuple(i for i in state.active if i != k)
            kept = max(active, default=0)
            return replace(
                state, active=active, history=tuple(i for i in state.history if i <= kept),
                removed=tuple(sorted((*state.removed, k))),
            )  # fmt: skip
        if step.kind == RESTORE:
            return self._restored(k)
        if step.kind == PURGE:
            if k in state.active:
                raise LedgerError(f"task {self.label(k)} is active: remove it before its tensors are purged")
            if k in state.purged:
                raise LedgerError(f"task {self.label(k)} was purged already")
            return replace(state, purged=tuple(sorted((*state.purged, k))))
        raise LedgerError(f"an entry of kind {step.kind!r} is unknown; upgrade keeplora")

    def _rolled_back(self, to: int) -> State:
        if not 0 <= to <= len(self.steps):
            raise LedgerError(f"there is no entry {to} to roll back to: the last one is {len(self.steps)}")
        wanted = self.states[to]
        if gone := [i for i in wanted.active if i in self.state.purged]:
            raise LedgerError(
                f"entry {to} cannot be gone back to: task {self.label(gone[0])} was part of it, and its tensors were purged"
            )
        return replace(wanted, purged=self.state.purged)

    def _restored(self, k: int) -> State:
        state = self.state
        if k in state.active:
            raise LedgerError(f"task {self.label(k)} is active already")
        if k in state.purged:
            raise LedgerError(
                f"task {self.label(k)} was purged: its tensors are gone, and it can only be learned again"
            )
        if any(self.steps[i - 1].name == self.steps[k - 1].name for i in state.active):
            raise LedgerError(
                f"task {self.label(k)} cannot be restored beside another of its name; remove that one first"
            )
        history = state.history
        if k not in history:
            wanted = self.before[k]
            if wanted[: len(history)] != history:
                since = [self.steps[i - 1].name for i in history if i not in wanted]
                raise LedgerError(
                    f"task {self.label(k)} cannot be restored: its directions were given up with it, and "
                    f"{', '.join(map(repr, since))} learned in them since; roll back to an entry in which it was active"
                )
            history = (*wanted, k)
        active = tuple(i for i in history if i in state.active or i == k)
        return replace(state, active=active, history=history, removed=tuple(i for i in state.removed if i != k))

    def needed(self, k: int) -> bool:
        """Whether the directions of task ``k`` are in U of any task that can still be in force."""
        purged = self.state.purged
        return any(k in before for task, before in self.before.items() if task != k and task not in purged)

    def label(self, k: int) -> str:
        """A task in a sentence."""
        return f"{self.steps[k - 1].name!r} (entry {k})"

    def tasks(self) -> list[int]:
        """The entries of all tasks there ever were."""
        return list(self.before)

    def names(self, entries: Iterable[int]) -> list[str]:
        """The tasks' names."""
        return [self.steps[i - 1].name for i in entries]

    def find(self, task: int | str, among: Iterable[int] | None = None) -> int:
        """The entry of a task by its name or number, the latest of that name; by preference among those given."""
        tasks = self.tasks()
        if isinstance(task, int):
            found = [task] if task in tasks else []
        else:
            named = [i for i in tasks if self.steps[i - 1].name == task]
            number = int(task) if task.isascii() and task.isdecimal() and len(task) < 9 else 0
            preferred = [i for i in named if among is not None and i in set(among)]
            found = preferred or named or ([number] if number in tasks else [])
        if not found:
            if str(task).isdecimal() and 0 < int(task) <= len(self.steps):
                step = self.steps[int(task) - 1]
                raise LedgerError(
                    f"entry {task} of the ledger is a {step.kind}, not a task; `keeplora ledger log` lists both"
                )
            known = dict.fromkeys(self.names(tasks))
            hint = did_you_mean(str(task), known) if known else "; it holds none"
            raise LedgerError(f"the ledger has no task {task!r}{hint}")
        return found[-1]

    def find_entry(self, to: int | str) -> int:
        """The number of the entry to roll back to: a number itself (0: before everything), or a task's name."""
        if isinstance(to, int):
            return to
        if to.isascii() and to.isdecimal() and len(to) < 9 and to not in self.names(self.tasks()):
            return int(to)
        return self.find(to, self.state.active)

    def status(self, k: int) -> str:
        """Of a task: "active", "removed", "rolled back" or "purged"."""
        state = self.state
        if k in state.active:
            return "active"
        if k in state.purged:
            return "purged"
        return "removed" if k in state.removed else "rolled back"
