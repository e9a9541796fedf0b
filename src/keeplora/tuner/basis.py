"""The protected subspaces of a learner's targets, each direction held once.

What they are made of is kept as it came: U₀ (or the complement of U₀, where that is smaller) and, per task, the columns
that it added. What the method works with is `Subspace`, the smaller side of span(U), and follows from those in order,
bit for bit. A learner with a ledger leaves the pieces on disk and holds the smaller side alone. One without holds the pieces,
and puts U together when it is asked for; of a layer past half its width it holds the complement as well, which follows from
the one before and not from all tasks anew. Pieces and complement are at most ``in`` directions together: what is held, and
what a boundary takes, is bounded by the width and not by the number of tasks.

Under a memory budget columns fall out of force. ``record.kept`` then says which of the columns that tasks have added up to
that record still are; a record without it takes none away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.math import Subspace, held_bytes, orthonormality_error
from keeplora.tuner.stored import StoredStart, StoredTensors

if TYPE_CHECKING:
    from keeplora.tuner.ledger import TaskRecord

ORTHONORMAL = 1e-5


def added_columns(record: TaskRecord, name: str) -> int:
    """How many columns the task added to a layer's U; what is on disk is not read."""
    basis = record.basis
    if name not in basis:
        return 0
    return basis.shape(name)[1] if isinstance(basis, StoredTensors) else basis[name].shape[1]


def check_values(record: TaskRecord, before: Sequence[TaskRecord], where: object) -> None:
    """`LedgerError` unless a record says of every column, its own and those of the tasks before, what it is worth; or of none,
    as records of version 0 do.

    Args:
        before: the tasks behind U when it was learned. where: for the sentence.
    """
    if record.values and (odd := sorted(set(record.basis) ^ set(record.values))):
        there, lacking = ("basis", "values") if odd[0] in record.basis else ("values", "basis")
        raise LedgerError(
            f"{where}: there is {there}/{odd[0]} but no {lacking}/{odd[0]}, and a direction goes with its worth; restore the "
            "ledger from a copy"
        )
    for name, values in record.values.items():
        if (wanted := sum(added_columns(r, name) for r in (*before, record))) != values.numel():
            raise LedgerError(
                f"{where}: values/{name} tells of {values.numel()} directions where the tasks have added {wanted}: the file was "
                "changed; restore the ledger from a copy"
            )


def in_force(history: Sequence[TaskRecord], name: str) -> Tensor:
    """Which of the columns that the tasks of ``history`` added to a layer's U still count after the last of them, (Σ m,)."""
    return _forces(history, name)[-1]


def _forces(history: Sequence[TaskRecord], name: str) -> list[Tensor]:
    """`in_force` of no task, of the first, …, and of all of ``history``: views of one mask where nothing went out of force."""
    widths = [added_columns(record, name) for record in history]
    mask, width, found = torch.ones(sum(widths), dtype=torch.bool), 0, [torch.zeros(0, dtype=torch.bool)]
    for record, m in zip(history, widths, strict=True):
        width += m
        if (kept := record.kept.get(name)) is not None:
            if kept.shape != (width,):
                raise LedgerError(
                    f"task {record.name!r}: kept/{name} names {kept.numel()} columns where the tasks have added {width}"
                )
            mask = mask.clone()
            mask[:width] &= kept.to(torch.bool)
        found.append(mask[:width])
    return found


class Bases(Mapping[str, Tensor]):
    """U per target. As a mapping: the columns in force, (in, k) float32 on the CPU, U₀'s first, made when asked for.

    Args:
        start: U₀ per target (M1). records: the tasks whose columns came after, in order.
        held: the smaller side per target, where the pieces are on disk; None: it is made from them when asked for.

    A `Bases` never changes; `extended` gives another.
    """

    def __init__(
        self,
        start: Mapping[str, Subspace],
        records: Sequence[TaskRecord] = (),
        held: Mapping[str, Subspace] | None = None,
    ) -> None:
        self.start = start
        self.records = tuple(records)
        self._held = held
        self._past_half: dict[str, Subspace] = {}
        """Complements that were asked for, where nothing is `held`."""

    @classmethod
    def of(cls, U: Mapping[str, Tensor | Subspace]) -> Bases:
        """From a basis per target."""
        return cls({name: u if isinstance(u, Subspace) else Subspace.of(u) for name, u in U.items()})

    def __getitem__(self, name: str) -> Tensor:
        if self._held is not None and not self._held[name].by_complement:
            return self._held[name].held
        return self.after(name, len(self.records))

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)

    def subspace(self, name: str) -> Subspace:
        """span(U) of a target by its smaller side: what projections are made with."""
        if self._held is not None:
            return self._held[name]
        start = self.start[name]
        if 2 * (start.k + int(self.in_force(name).sum())) <= start.n_in:
            return Subspace(self[name])
        if name not in self._past_half:
            S = self.start[name]
            for i in range(len(self.records)):
                S = self._step(S, name, i)
            self._past_half[name] = S
        return self._past_half[name]

    def after(self, name: str, tasks: int) -> Tensor:
        """U of a target as it was after the first ``tasks`` tasks, (in, k): what the next one was kept off."""
        V, mask = self.added(name, tasks), in_force(self.records[:tasks], name)
        return torch.cat([self.start[name].basis(), V if bool(mask.all()) else V[:, mask]], dim=1)

    def before_each(self, name: str) -> Iterator[Tensor]:
        """`after` for 0, 1, … tasks, one for each task: U of a target as that task found it."""
        U0, V = self.start[name].basis(), self.added(name)
        for mask in _forces(self.records, name)[:-1]:
            yield torch.cat([U0, V[:, : len(mask)][:, mask]], dim=1)

    def added(self, name: str, tasks: int | None = None) -> Tensor:
        """Every column that the first ``tasks`` tasks (None: all) added to a target's U, in force or not, (in, Σ m)."""
        parts = [r.basis[name] for r in self.records[:tasks] if name in r.basis]
        return torch.cat(parts, dim=1) if parts else torch.zeros((self.start[name].n_in, 0))

    def in_force(self, name: str) -> Tensor:
        """Which columns of `added` count now."""
        return in_force(self.records, name)

    def added_in_force(self, name: str) -> Tensor:
        """The columns of `added` that count now, (in, k − p)."""
        mask = self.in_force(name)
        if self._held is not None and not self._held[name].by_complement:
            S = self._held[name]
            return S.held[:, S.k - int(mask.sum()) :]
        return self.added(name)[:, mask]

    def start_dims(self) -> dict[str, tuple[int, int]]:
        """(in, p) per target: its width and the dimensions of U₀."""
        if isinstance(self.start, StoredStart):
            return self.start.dims()
        return {name: (S.n_in, S.k) for name, S in self.start.items()}

    def dims(self) -> dict[str, int]:
        """k per target."""
        return {name: p + int(self.in_force(name).sum()) for name, (_, p) in self.start_dims().items()}

    @property
    def bytes(self) -> int:
        """What the smaller sides of all targets cost."""
        dims = self.dims()
        return sum(held_bytes(n, dims[name]) for name, (n, _) in self.start_dims().items())

    def extended(self, record: TaskRecord) -> Bases:
        """With the columns that a task added, and without those that it took out of force."""
        more = Bases(self.start, (*self.records, record))
        last = len(self.records)
        if self._held is not None:
            more._held = {name: more._step(S, name, last) for name, S in self._held.items()}
        steps = ((name, more._step(S, name, last)) for name, S in self._past_half.items())
        more._past_half = {name: S for name, S in steps if S.by_complement}
        return more

    def kept_on_disk(self, start: Mapping[str, Subspace]) -> Bases:
        """The same, its pieces on disk: ``start`` and the records' bases are read from there."""
        return Bases(start, self.records, {name: self.subspace(name) for name in self})

    def _step(self, S: Subspace, name: str, i: int) -> Subspace:
        """From the smaller side after ``i`` tasks to that after ``i + 1``."""
        record = self.records[i]
        if name in record.kept:
            *_, before, now = _forces(self.records[: i + 1], name)
            if not torch.equal(before, now[: len(before)]):
                return Subspace.of(self.after(name, i + 1))
        return S.extended(record.basis[name]) if added_columns(record, name) else S

    def check(self) -> None:
        """`LedgerError` if the columns in force are not orthonormal."""
        for name in self:
            if (error := orthonormality_error(self[name])) > ORTHONORMAL:
                raise LedgerError(f"the stored basis of {name} is not orthonormal: max |UᵀU − I| = {error:.1e}")
