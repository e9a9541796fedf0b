"""The protected subspaces of a learner's targets, each direction held once.

What they are made of is kept as it came: U₀ (or the complement of U₀, where that is smaller) and, per task, the columns
that it added. What the method works with is `Subspace`, the smaller side of span(U), and follows from those in order,
bit for bit. A learner without a ledger holds the pieces and makes the rest when it is asked for; one with a ledger leaves
the pieces on disk and holds the smaller side alone.

Under a memory budget columns fall out of force. ``record.kept`` then says which of the columns that tasks have added up to
that record still are; a record without it takes none away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.math import Subspace, held_bytes, orthonormality_error

if TYPE_CHECKING:
    from keeplora.tuner.ledger import TaskRecord

ORTHONORMAL = 1e-5


class StoredTensors(Mapping[str, Tensor]):
    """The tensors ``KIND/NAME`` of a safetensors file by NAME, read one at a time and never held.

    Raises:
        LedgerError: the file is gone or no longer readable.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._prefix = path, f"{kind}/"
        with self._open() as file:
            keys = [key for key in list(file.keys()) if key.startswith(self._prefix)]
            self._shapes = {key.removeprefix(self._prefix): tuple(file.get_slice(key).get_shape()) for key in keys}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        with self._open() as file:
            try:
                found = file.get_tensor(self._prefix + name)
            except SafetensorError as error:
                raise LedgerError(f"{self._path} was changed while it was in use ({error}); restore it") from None
        if tuple(found.shape) != self._shapes[name]:
            raise LedgerError(f"{self._path} was changed while it was in use: {name} has another shape; restore it")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _open(self) -> safe_open:
        try:
            return safe_open(self._path, framework="pt")
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise LedgerError(
                f"{self._path} cannot be read ({error}): the learner goes on from its ledger, which must stay where it is"
            ) from None


class StoredStart(Mapping[str, Subspace]):
    """The pieces of U₀ in a ledger's ``base.safetensors``, read one at a time and never held."""

    def __init__(self, path: Path) -> None:
        self._columns, self._complements = StoredTensors(path, "basis"), StoredTensors(path, "complement")

    def __getitem__(self, name: str) -> Subspace:
        if name in self._complements:
            return Subspace(self._complements[name], True)
        return Subspace.of(self._columns[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._columns
        yield from self._complements

    def __len__(self) -> int:
        return len(self._columns) + len(self._complements)

    def dims(self) -> dict[str, tuple[int, int]]:
        """(in, p) per layer, from the file's header alone."""
        found = {}
        for name in self:
            n, c = (self._complements if name in self._complements else self._columns).shape(name)
            found[name] = (n, n - c if name in self._complements else c)
        return found


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
    mask = torch.zeros(0, dtype=torch.bool)
    for record in history:
        mask = torch.cat([mask, torch.ones(added_columns(record, name), dtype=torch.bool)])
        if (kept := record.kept.get(name)) is not None:
            if kept.shape != mask.shape:
                raise LedgerError(
                    f"task {record.name!r}: kept/{name} names {kept.numel()} columns where the tasks have added {len(mask)}"
                )
            mask = mask & kept.to(torch.bool)
    return mask


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
        S = self.start[name]
        for i in range(len(self.records)):
            S = self._step(S, name, i)
        return S

    def after(self, name: str, tasks: int) -> Tensor:
        """U of a target as it was after the first ``tasks`` tasks, (in, k): what the next one was kept off."""
        V, mask = self.added(name, tasks), in_force(self.records[:tasks], name)
        return torch.cat([self.start[name].basis(), V if bool(mask.all()) else V[:, mask]], dim=1)

    def before_each(self, name: str) -> Iterator[Tensor]:
        """`after` for 0, 1, … tasks, one for each task: U of a target as that task found it."""
        U0, V, width = self.start[name].basis(), self.added(name), 0
        for i, record in enumerate(self.records):
            yield torch.cat([U0, V[:, :width][:, in_force(self.records[:i], name)]], dim=1)
            width += added_columns(record, name)

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
        if self._held is not None:
            last = len(self.records)
            more._held = {name: more._step(S, name, last) for name, S in self._held.items()}
        return more

    def kept_on_disk(self, start: Mapping[str, Subspace]) -> Bases:
        """The same, its pieces on disk: ``start`` and the records' bases are read from there."""
        return Bases(start, self.records, {name: self.subspace(name) for name in self})

    def _step(self, S: Subspace, name: str, i: int) -> Subspace:
        """From the smaller side after ``i`` tasks to that after ``i + 1``."""
        record = self.records[i]
        if name in record.kept:
            before = in_force(self.records[:i], name)
            if not torch.equal(before, in_force(self.records[: i + 1], name)[: len(before)]):
                return Subspace.of(self.after(name, i + 1))
        return S.extended(record.basis[name]) if added_columns(record, name) else S

    def check(self) -> None:
        """`LedgerError` if the columns in force are not orthonormal."""
        for name in self:
            if (error := orthonormality_error(self[name])) > ORTHONORMAL:
                raise LedgerError(f"the stored basis of {name} is not orthonormal: max |UᵀU − I| = {error:.1e}")
