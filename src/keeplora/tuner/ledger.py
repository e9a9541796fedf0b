"""The ledger: a chain of sealed entries on disk, to which entries are added and of which none is ever changed (format v1).

Layout::

    ledger.json              format, version, base model (name, revision, class, hash of target weights), targets, config
    base.safetensors         "basis/<layer>": U₀ (in, p), float32; or "complement/<layer>": (in, in − p), where that is smaller
    HEAD.json                how many entries there are, and the hash of the last: a missing end is noticed
    0001-<task>/record.json  what the task was: layers (s, rank, ε_t, tr C_t), classes, config, parent hash, ...
    0001-<task>/tensors.safetensors   "A/<layer>", "B/<layer>", "basis/<layer>" (new directions), "delta/<layer>"
                             (full updates), "covariance/<layer>" (if kept), "extra/<name>" (heads), "values/<layer>"
                             (what each direction protects), "kept/<layer>" (which are in force, where a budget took some)
    0001-<task>/metrics.json what was measured after it, if anything was
    0004-remove-<task>/record.json    an operation: remove, restore, rollback or purge, and what it speaks of

An entry is written into a hidden folder and renamed, so it is there whole or not at all. ``parent`` is the SHA-256 of
the previous record.json (of ledger.json for the first), each record names the SHA-256 of its tensors, and each JSON
file's ``seal`` is the SHA-256 of its other keys. `keeplora.tuner.chain` says what the entries add up to.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.files import atomic_dir, sha256_file
from keeplora.math import Subspace
from keeplora.tuner.chain import PURGE, REMOVE, RESTORE, ROLLBACK, TASK, Chain, State, Step
from keeplora.tuner.ledger_entries import Entry, entry_folders, read_entries
from keeplora.tuner.ledger_files import (
    FORMAT,
    VERSION,
    file_hash,
    need,
    read_sealed,
    read_tensors,
    write_sealed,
)
from keeplora.tuner.records import TaskRecord, group, read_record, slug

__all__ = ["FORMAT", "VERSION", "Entry", "Ledger", "TaskRecord", "now", "slug"]


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Ledger:
    """A ledger's folder. Use `create` for a new one and `open` for one that is there.

    `rollback`, `remove`, `restore` and `purge` need no model: they say which tasks are in force, and the weights are made
    from them whenever the ledger is opened. All but `purge` can be taken back.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.head = head

    @classmethod
    def create(
        cls, path: str | Path, *, base: dict[str, Any], targets: list[dict[str, Any]], config: dict[str, Any],
        bases: Mapping[str, Subspace], versions: dict[str, str], learner: Mapping[str, Any] | None = None,
    ) -> Ledger:  # fmt: skip
        """Write ledger.json, base.safetensors and HEAD.json into a new folder, whole or not at all."""
        path = Path(path)
        if path.exists():
            raise LedgerError(f"{path} exists already: choose another folder, or open it with from_pretrained")
        head = {
            "format": FORMAT, "version": VERSION, "base": base, "targets": targets, "config": config,
            "versions": versions, "learner": dict(learner or {}), "time": now(),
        }  # fmt: skip
        with atomic_dir(path) as part:
            file = part / "base.safetensors"
            save_file(
                {f"{'complement' if S.by_complement else 'basis'}/{n}": S.held.contiguous() for n, S in bases.items()},
                file,
            )
            head["tensors_sha256"] = sha256_file(file)
            write_sealed(part / "ledger.json", head)
            _write_end(part, 0, file_hash(part / "ledger.json"))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Open a ledger's folder; `LedgerError` names what is missing, damaged or too new."""
        path = Path(path)
        file = path / "ledger.json"
        head = read_sealed(file)
        need(head, file, base=dict, targets=list, config=dict, tensors_sha256=str)
        need(head["base"], file, hash=str)
        for target in head["targets"]:
            if not isinstance(target, dict):
                raise LedgerError(f"{file}: its 'targets' hold {target!r:.60}; restore it from a copy")
            need(target, file, name=str, n_in=int, n_out=int)
        return cls(path, head)

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each target."""
        return {t["name"]: (t["n_in"], t["n_out"]) for t in self.head["targets"]}

    @property
    def told(self) -> dict[str, Any]:
        """What the method that wrote the ledger says of itself (`learner` in ledger.json); empty in version 0."""
        found = self.head.get("learner")
        return found if isinstance(found, dict) else {}

    @property
    def irremovable(self) -> str:
        """Why no task can be taken out, as words that follow "the method"; empty where one can, or in version 0."""
        return str(self.told.get("irremovable") or "")

    def bases(self) -> dict[str, Subspace]:
        """U₀ per layer, by its smaller side."""
        tensors = read_tensors(self.path / "base.safetensors", self.head["tensors_sha256"])
        if odd := [key for key in tensors if not key.startswith(("basis/", "complement/"))]:
            raise LedgerError(
                f"{self.path / 'base.safetensors'} holds {odd[0]!r}, which is no basis; restore it from a copy"
            )
        for key, held in tensors.items():
            name = key.partition("/")[2]
            n_in = self.targets.get(name, (None, None))[0]
            if n_in is None:
                raise LedgerError(
                    f"{self.path / 'base.safetensors'}: {key} is of no target of ledger.json; restore it from a copy"
                )
            fits = held.ndim == 2 and held.shape[0] == n_in and held.shape[1] <= n_in and held.dtype == torch.float32
            if not fits or not bool(torch.isfinite(held).all()):
                raise LedgerError(
                    f"{self.path / 'base.safetensors'}: {key} has shape {tuple(held.shape)} in {held.dtype}, or holds numbers "
                    f"that are not finite; the layer asks for {n_in} × at most {n_in} in float32"
                )
        found = {name: Subspace.of(U) for name, U in group(tensors, "basis").items()}
        return found | {name: Subspace(N, True) for name, N in group(tensors, "complement").items()}

    def folders(self) -> list[Path]:
        """Entries' folders in order."""
        return entry_folders(self.path)

    def entries(self) -> list[Entry]:
        """All entries in order, with seals, the chain of parent hashes and its end checked; no tensor is read."""
        return read_entries(self.path, self.head)[0]

    def chain(self) -> Chain:
        """What the entries add up to."""
        return read_entries(self.path, self.head)[1]

    def state(self) -> State:
        """Which tasks are in force now."""
        return self.chain().state

    def record(self, index: int) -> TaskRecord:
        """A task with its tensors; of a purged one the directions alone."""
        entries, chain = read_entries(self.path, self.head)
        return self._record(entries, chain, index)

    def records(self) -> list[TaskRecord]:
        """The active tasks in order; `LedgerError` names the first bad file."""
        entries, chain = read_entries(self.path, self.head)
        return [self._record(entries, chain, i) for i in chain.state.active]

    def history(self) -> list[TaskRecord]:
        """The tasks whose directions are in U, in order; the chain is read once, and not for each of them."""
        entries, chain = read_entries(self.path, self.head)
        return [self._record(entries, chain, i) for i in chain.state.history]

    def _record(self, entries: list[Entry], chain: Chain, index: int) -> TaskRecord:
        if not 1 <= index <= len(entries) or entries[index - 1].kind != TASK:
            raise LedgerError(f"{self.path} has no task at entry {index}")
        entry = entries[index - 1]
        purged = index in chain.state.purged
        if entry.step.purged and not purged:
            raise LedgerError(
                f"{entry.folder / 'record.json'} says that its tensors were purged, and no entry purged them"
            )
        if not purged or entry.step.purged:
            tensors = read_tensors(entry.folder / "tensors.safetensors", entry.value["tensors_sha256"])
        else:
            by = next(e for e in reversed(entries) if e.kind == PURGE and e.step.subject == index)
            digest = by.value.get("tensors_sha256")
            tensors = read_tensors(by.folder / "tensors.safetensors", digest) if digest else {}
        return read_record(entry.value, tensors, self.targets, entry.folder, purged=purged)

    # ---- writing -------------------------------------------------------------------------------------------------

    def append(self, record: TaskRecord, *, purged: bool = False) -> Path:
        """Add a task after the last entry; atomic. Sets ``record.entry``.

        Args:
            purged: the task's tensors are gone: the record keeps what it says and its directions.
        """
        if purged:
            record = record.emptied()
        value = {
            "kind": TASK, "name": record.name, "layers": record.layers(), "info": record.info, "config": record.config,
            "versions": record.versions, "time": record.time or now(), **({"purged": True} if purged else {}),
        }  # fmt: skip
        folder = self._add(Step(TASK, record.name, purged=purged), value, slug(record.name), record.file())
        record.entry = int(folder.name.partition("-")[0])
        return folder

    def rollback(self, to: int | str) -> State:
        """Go back to the state after entry ``to``, a number (0: before everything) or a task's name."""
        chain = self.chain()
        entry = chain.find_entry(to)
        name = chain.steps[entry - 1].name if 1 <= entry <= len(chain) else ""
        return self.enter(Step(ROLLBACK, name, entry))

    def remove(self, task: int | str) -> State:
        """Take a task out of the sum; its record stays. See docs/ledger.md for what that does not undo."""
        if self.irremovable:
            raise LedgerError(
                f"{self.path}: no task of this ledger can be removed, for the method {self.irremovable}; go back to an "
                "earlier task with rollback"
            )
        chain = self.chain()
        return self.enter(self._about(REMOVE, chain, chain.find(task, chain.state.active)))

    def restore(self, task: int | str) -> State:
        """Put a removed or rolled back task into the sum again."""
        chain = self.chain()
        aside = [i for i in chain.tasks() if i not in chain.state.active]
        return self.enter(self._about(RESTORE, chain, chain.find(task, aside)))

    def purge(self, task: int | str) -> State:
        """Delete the tensors of a task that is not active, for good.

        Its directions are kept where a task that can still be in force was learned after it. Its record.json stays.
        """
        chain = self.chain()
        aside = [i for i in chain.tasks() if i not in (*chain.state.active, *chain.state.purged)]
        return self.enter(self._about(PURGE, chain, chain.find(task, aside)))

    @staticmethod
    def _about(kind: str, chain: Chain, k: int) -> Step:
        return Step(kind, chain.steps[k - 1].name, k)

    def enter(self, step: Step) -> State:
        """Add the entry of an operation; `LedgerError`, and nothing written, where the state does not allow it."""
        entries, chain = read_entries(self.path, self.head)
        chain.after(step)
        value: dict[str, Any] = {"kind": step.kind, "name": step.name, "subject": step.subject, "time": now()}
        tensors: dict[str, Tensor] | None = None
        if step.kind == PURGE and not entries[step.subject - 1].step.purged and chain.needed(step.subject):
            tensors = self._record(entries, chain, step.subject).directions()
        label = f"{step.kind}-{slug(step.name)}" if step.name else step.kind
        self._add(step, value, label, tensors)
        return self.chain().state

    def write_metrics(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Put beside a task's record what was measured after it; JSON values. Written again, it replaces what was there."""
        entries = self.entries()
        if not 1 <= index <= len(entries) or entries[index - 1].kind != TASK:
            raise LedgerError(f"{self.path} has no task at entry {index}")
        value = {"format": FORMAT, "version": VERSION, "record": entries[index - 1].hash, "metrics": dict(metrics)}
        write_sealed(entries[index - 1].folder / "metrics.json", {**value, "time": now()})

    def heal(self) -> None:
        """Finish what a crash cut short between two writes: HEAD.json, and the deletion that a purge announced."""
        self._heal(self.entries())

    def _heal(self, entries: list[Entry]) -> None:
        last = entries[-1].hash if entries else file_hash(self.path / "ledger.json")
        file = self.path / "HEAD.json"
        if not file.exists() or read_sealed(file)["entries"] != len(entries):
            _write_end(self.path, len(entries), last)
        for entry in entries:
            if entry.kind == PURGE and not (task := entries[entry.step.subject - 1]).step.purged:
                (task.folder / "tensors.safetensors").unlink(missing_ok=True)

    def _add(self, step: Step, value: Mapping[str, Any], label: str, tensors: Mapping[str, Tensor] | None) -> Path:
        entries = self.entries()
        self._heal(entries)  # also of a version-0 ledger: from here on it has an end that can be checked
        index = len(entries) + 1
        parent = entries[-1].hash if entries else file_hash(self.path / "ledger.json")
        target = self.path / f"{index:04d}-{label}"
        digest = None
        with atomic_dir(target) as part:
            if tensors is not None:
                file = part / "tensors.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
                digest = sha256_file(file)
            write_sealed(
                part / "record.json",
                {
                    "format": FORMAT, "version": VERSION, "index": index, "base_hash": self.head["base"]["hash"],
                    "parent": parent, "tensors_sha256": digest, **value,
                },
            )  # fmt: skip
        self._heal(self.entries())
        return target


def _write_end(folder: Path, entries: int, last: str) -> None:
    write_sealed(folder / "HEAD.json", {"format": FORMAT, "version": VERSION, "entries": entries, "last": last})
