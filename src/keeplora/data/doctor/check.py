"""What a look at one task's data found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from keeplora.data.doctor.look import Look
from keeplora.data.sets import Entry

#: Faults of one kind in one split that are named one by one.
NAMED = 5


class Progress(Protocol):
    """Told how far one task's pictures are; ``total`` is 0 while the lists are being read."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@dataclass(slots=True)
class TaskCheck:
    """What was found of one task.

    Attributes:
        name, source: the task's.
        folder: where its data is looked for; "" for a name on the hub.
        found, missing: what the source needs, as paths below ``folder``.
        classes: how many; None where the lists could not be read, and for questions.
        pictures: number of pictures or videos by split; of questions, where the task has these.
        expect: the published counts.
        bytes: of all pictures and videos, encoded.
        smallest, largest: ``(width, height, name)`` of those with the least and the most pixels.
        problems: what must be mended, a sentence each.
        notes: what a person should know and that stops nothing.
        fetch: where to get the data, in words; "" where nothing is missing.
    """

    name: str
    source: str = ""
    folder: str = ""
    found: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    classes: int | None = None
    pictures: dict[str, int] = field(default_factory=dict)
    expect: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    smallest: tuple[int, int, str] | None = None
    largest: tuple[int, int, str] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fetch: str = ""

    def tally(self, pictures: Sequence[tuple[Entry, Look]], split: str, *, skip: bool) -> None:
        """Add what looks at the pictures or videos of one split found; unusable ones are notes where they may be skipped."""
        bad = [look.problem + ("; it will be left out" if skip else "") for _, look in pictures if look.problem]
        what = "videos" if any(entry.medium == "video" for entry, _ in pictures) else "pictures"
        (self.notes if skip else self.problems).extend(cut_short(bad, f"{what} of {split} cannot be used"))
        for entry, look in pictures:
            if look.problem:
                continue
            self.bytes += look.size
            area = look.width * look.height
            if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
                self.smallest = (look.width, look.height, entry.where)
            if self.largest is None or area > self.largest[0] * self.largest[1]:
                self.largest = (look.width, look.height, entry.where)

    @property
    def ok(self) -> bool:
        return not self.problems


def cut_short(told: Sequence[str], what: str) -> list[str]:
    """The first faults of one kind, and how many more there are."""
    more = len(told) - NAMED
    return [*told[:NAMED], f"{more:,} more {what}, like the {NAMED} above"] if more > 0 else list(told)


def miscounted(found: Mapping[str, int | None], wanted: Mapping[str, int | None]) -> list[str]:
    """A sentence where counts are not the published ones."""
    told = {key: count for key, count in wanted.items() if count is not None and key in found}
    if all(found[key] == count for key, count in told.items()):
        return []
    here = ", ".join(f"{found[key]:,} {key}" for key in told)
    there = ", ".join(f"{count:,}" for count in told.values())
    return [f"{here} found, where {there} are expected"]
