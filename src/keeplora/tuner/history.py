"""Which tasks are in force: entering one, going back, taking one out, and putting it in again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from keeplora.errors import KeepLoraError, LedgerError
from keeplora.math import Subspace
from keeplora.tuner import ranks
from keeplora.tuner.basis import Bases
from keeplora.tuner.chain import REMOVE, RESTORE, ROLLBACK, TASK, Chain, State, Step
from keeplora.tuner.hooks import MethodHooks
from keeplora.tuner.ledger import Ledger, TaskRecord, now
from keeplora.tuner.persistence import all_updates, versions
from keeplora.tuner.stored import StoredFactors, StoredStart, StoredTensors
from keeplora.tuner.weights import Update, WeightStore

if TYPE_CHECKING:
    from keeplora.tuner.config import KeepLoraConfig
    from keeplora.tuner.targets import Target
    from keeplora.tuner.task import OpenTask


class TaskHistory(MethodHooks):
    """The part of a learner that knows its tasks; everything here is the same for all methods."""

    config: KeepLoraConfig
    targets: list[Target]
    store: WeightStore

    def __init__(self) -> None:
        self.records: list[TaskRecord] = []
        """The active tasks in order: their updates add up to the model."""
        self._chain = Chain()
        self._shelf: dict[int, TaskRecord] = {}
        self._outlines: dict[int, TaskRecord] = {}
        self._source: Ledger | None = None
        self._ledger: Ledger | None = None
        self._U: Bases | None = None
        self._open: OpenTask | None = None

    if TYPE_CHECKING:

        @property
        def U(self) -> Bases: ...

    @property
    def history(self) -> list[TaskRecord]:
        """The tasks whose directions are in U, in order: the active ones, and removed ones that later ones rely on.

        A count of them goes on as if nothing had been removed, which seeds and schedules need.
        """
        return [self._shelf[i] for i in self._chain.state.history]

    @property
    def removed(self) -> list[TaskRecord]:
        """The tasks that were taken out with `remove`, and are not active under that name now; maybe without tensors."""
        active = {record.name for record in self.records}
        found = [self._shelf.get(i) or self._outline(i) for i in self._chain.state.removed]
        return [record for record in found if record.name not in active]

    def rollback(self, to: int | str) -> None:
        """Go back to the state after a task (its name), or after an entry of the ledger (its number; 0: untouched).

        Weights, U and what the next task starts from are as if nothing had been learned since. The tasks that are taken
        back stay in the ledger: go to the entry before the rollback to undo it.

        Raises:
            KeepLoraError: a task is open; there is no such task or entry; a task of that state was purged.
        """
        entry = self._chain.find_entry(to)
        name = self._chain.steps[entry - 1].name if 1 <= entry <= len(self._chain) else ""
        self._apply(Step(ROLLBACK, name, entry))

    def remove(self, task: int | str) -> None:
        """Take a task's update out of the weights, exactly: they are what the sum without it gives, bit for bit.

        What later tasks learned in its presence stays as it is, and so do its directions in U while an active task was
        learned after it: those tasks' features inside them were counted as protected already.

        Args:
            task: its name, or the number of its entry in the ledger.

        Raises:
            KeepLoraError: a task is open; there is no such task; the method says why none can be removed (`irremovable`).
        """
        if self.irremovable:
            raise KeepLoraError(
                f"task {task!r} cannot be removed: this method {self.irremovable}; go back to an earlier task with "
                "rollback"
            )
        self._apply(self._about(REMOVE, self._chain.find(task, self._chain.state.active)))

    def restore(self, task: int | str) -> None:
        """Put a removed (or rolled back) task in again; the weights are those of before it was taken out.

        Raises:
            KeepLoraError: a task is open; there is no such task; it is active, or was purged; its directions were given up
                with it and others learned in them since.
        """
        aside = [i for i in self._chain.tasks() if i not in self._chain.state.active]
        self._apply(self._about(RESTORE, self._chain.find(task, aside)))

    def start_bases(self) -> dict[str, Tensor]:
        """U₀ per target (M1)."""
        return {name: self.U.after(name, 0) for name in self.U}

    def restore_bases(self, start: Mapping[str, Subspace], records: Sequence[TaskRecord]) -> None:
        """U = [U₀, increments of the records in order] without what went out of force, as it was when they were learned."""
        if not start:
            return
        for record in records:
            if odd := [name for name in record.basis if name not in start]:
                raise LedgerError(f"task {record.name!r} holds a basis of {odd[0]}, which has none at the start")
        found = Bases(start, records)
        found.check()
        self._U = found

    def _write_to(self, ledger: Ledger) -> None:
        """Further tasks go into this ledger; what a crash left half-way in it is finished first."""
        ledger.heal()
        self._ledger = ledger
        self._leave_on_disk()

    def _leave_on_disk(self) -> None:
        """What U is made of is in the ledger: hold the smaller side of each subspace, and no column twice."""
        self._leave_factors_on_disk()
        if self._ledger is None or not self.protects:
            return
        folders = self._ledger.folders()
        held = self.U.kept_on_disk(StoredStart(self._ledger.path / "base.safetensors"))
        for record in held.records:
            file = folders[record.entry - 1] / "tensors.safetensors"
            if file.is_file():  # of a purged task the directions are elsewhere, and few
                record.basis = StoredTensors(file, "basis")
        self._U = held

    def _leave_factors_on_disk(self) -> None:
        """Factors of weights whose Σ the store holds are in the ledger: read them from there when a task is taken out."""
        if self._ledger is None or not (summed := self.store.summed()):
            return
        stored: dict[int, Update] = {}
        folders = self._ledger.folders()
        for record in self._shelf.values():
            held = [name for name, f in record.factors.items() if name in summed and not isinstance(f, StoredFactors)]
            file = folders[record.entry - 1] / "tensors.safetensors"
            if held and file.is_file():
                A, B = StoredTensors(file, "A"), StoredTensors(file, "B")
                found = {name: StoredFactors(A, B, name, record.factors[name].s) for name in held}
                stored |= {id(record.factors[name]): f for name, f in found.items()}
                record.factors = {**record.factors, **found}
        self.store.exchange(stored)

    def _enter(self, record: TaskRecord) -> TaskRecord:
        """The task joins the active ones, on disk first where there is a ledger (rank 0 has it)."""
        record.config, record.versions, record.time = self.config.to_dict(), versions(), now()
        # Times and what a loop of its own left there are those of rank 0, as in the ledger.
        record.time, record.info, record.tensors = ranks.agreed(
            "the task's record", (record.time, record.info, record.tensors)
        )
        ranks.first("writing the ledger", lambda: self._write_entry(record))
        self._chain.add(Step(TASK, record.name))
        record.entry = len(self._chain)
        self._shelf[record.entry] = record
        self.records.append(record)
        return record

    def _write_entry(self, record: TaskRecord) -> None:
        if self._ledger is not None:
            self._check_in_step(self._ledger)
            folder = self._ledger.append(record)
            if record.basis:
                record.basis = StoredTensors(folder / "tensors.safetensors", "basis")

    def _require_open(self) -> OpenTask:
        if self._open is None:
            raise KeepLoraError("no task is open: call start_task() first")
        return self._open

    def _require_none_open(self) -> None:
        if self._open is not None:
            raise KeepLoraError(f"task {self._open.name!r} is still open: finish_task() or abort_task() first")

    def _about(self, kind: str, k: int) -> Step:
        return Step(kind, self._chain.steps[k - 1].name, k)

    def _task(self, entry: int) -> TaskRecord:
        """A task there ever was, read from the ledger where it is not at hand."""
        if entry in self._shelf:
            return self._shelf[entry]
        assert self._source is not None
        return self._source.record(entry)

    def _outline(self, entry: int) -> TaskRecord:
        """What a task's record says, without its tensors."""
        if entry not in self._outlines:
            assert self._source is not None
            value = self._source.entries()[entry - 1].value
            self._outlines[entry] = TaskRecord(value["name"], info=value["info"], entry=entry)
        return self._outlines[entry]

    def _adopt(self, ledger: Ledger, chain: Chain, shelf: dict[int, TaskRecord]) -> None:
        """Take over the state of a ledger; ``shelf`` holds the tasks of its history."""
        self._check_selection(chain.state, str(ledger.path))
        self._chain, self._shelf, self._source = chain, shelf, ledger
        self.records = [shelf[i] for i in chain.state.active]

    def _check_selection(self, state: State, where: str) -> None:
        if self.irremovable and state.active != state.history:
            raise LedgerError(
                f"{where}: a task was taken out of it, but this method {self.irremovable}; restore that task"
            )

    def _check_in_step(self, ledger: Ledger) -> None:
        if (found := len(ledger.folders())) != len(self._chain):
            raise LedgerError(
                f"{ledger.path} has {found} entries, but had {len(self._chain)} when this learner last wrote or read it: "
                "something else changed it; open the learner anew"
            )

    def _apply(self, step: Step) -> None:
        """An operation: on the weights, on U, then in the ledger; all of it or nothing."""
        self._require_none_open()
        state = self._chain.after(step)
        self._check_selection(state, "the learner")
        shelf = {i: self._task(i) for i in state.history}
        records = [shelf[i] for i in state.active]
        before, U = self.store.snapshot(), self._U
        try:
            self.restore_bases(self.U.start if self.protects else {}, list(shelf.values()))
            if self.accumulates:
                self.store.restore(all_updates(records))
            ranks.first("writing the ledger", lambda: self._write_step(step))
        except BaseException:
            self.store.restore(before)
            self._U = U
            raise
        self._chain.add(step)
        self._shelf |= shelf
        self.records = records
        self._leave_on_disk()
        self._recall(records)

    def _write_step(self, step: Step) -> None:
        if self._ledger is not None:
            self._check_in_step(self._ledger)
            self._ledger.enter(step)
