"""Among which classes a test picture is to be named: its own task's, those seen so far, or those of every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Classes(Protocol):
    """A task, as far as candidates go."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class ClassList:
    """Classes and templates alone."""

    classes: Sequence[str]
    templates: Sequence[str]


@dataclass(frozen=True)
class Candidates:
    """The candidate classes of one task's pictures.

    Attributes:
        groups: (classes, templates) in the order of the logits' columns; a class stands in one group only.
        own: column of each of the task's own classes, by label.
    """

    groups: list[tuple[list[str], list[str]]]
    own: list[int]

    @property
    def classes(self) -> list[str]:
        """All candidates, in the order of the columns."""
        return [name for classes, _ in self.groups for name in classes]


def candidates_for(task: Classes, others: Sequence[Classes] = ()) -> Candidates:
    """The task's own classes first, then those of ``others`` whose names are not there yet (X-TAIL: one name, one class).

    >>> from types import SimpleNamespace
    >>> a = SimpleNamespace(name="a", classes=["cat", "dog"], templates=["{}"])
    >>> b = SimpleNamespace(name="b", classes=["dog", "owl"], templates=["a {}"])
    >>> found = candidates_for(b, [a, b])
    >>> found.classes, found.own
    (['dog', 'owl', 'cat'], [0, 1])
    """
    known = set(task.classes)
    groups = [(list(task.classes), list(task.templates))]
    for other in others:
        new = [name for name in other.classes if name not in known]
        known.update(new)
        if new:
            groups.append((new, list(other.templates)))
    return Candidates(groups, list(range(len(task.classes))))
