"""The entries of a ledger, read: whether each follows the one before it, and whether the last is the last that was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keeplora.errors import LedgerError
from keeplora.tuner.chain import KINDS, TASK, Chain, Step
from keeplora.tuner.ledger_files import file_hash, need, read_sealed, refuse_link
from keeplora.tuner.records import check_layers


@dataclass(frozen=True)
class Entry:
    """One entry as its record.json tells of it; its tensors are not read.

    Attributes:
        index: from 1. step: what it does. folder: where it is. value: all of record.json. hash: of that file.
    """

    index: int
    step: Step
    folder: Path
    value: dict[str, Any]
    hash: str

    @property
    def kind(self) -> str:
        return self.step.kind

    @property
    def name(self) -> str:
        """Of the task that it enters or speaks of; empty for a rollback to the start."""
        return self.step.name

    @property
    def time(self) -> str | None:
        """UTC; None where version 0 wrote it."""
        return self.value.get("time")

    def metrics(self) -> dict[str, Any] | None:
        """What was measured after the task, or None; `LedgerError` if the file was changed or belongs to another record."""
        file = self.folder / "metrics.json"
        if not file.exists() and not file.is_symlink():
            return None
        value = read_sealed(file)
        need(value, file, record=str, metrics=dict)
        if value["record"] != self.hash:
            raise LedgerError(f"{file} belongs to another record than the one beside it; restore it from a copy")
        return value["metrics"]


def entry_folders(path: Path) -> list[Path]:
    """Entries' folders of the ledger in ``path``, in order; `LedgerError` where one is missing."""
    found = sorted(p for p in path.iterdir() if re.match(r"\d{4,}-", p.name))
    found.sort(key=lambda p: int(p.name.partition("-")[0]))
    for i, folder in enumerate(found, 1):
        refuse_link(folder)
        if int(folder.name.partition("-")[0]) != i:
            raise LedgerError(f"{path}: record {i:04d} is missing before {folder.name}")
    return found


def read_entries(path: Path, head: Mapping[str, Any]) -> tuple[list[Entry], Chain]:
    """The entries of the ledger in ``path``, whose ledger.json is ``head``, and what they add up to; no tensor is read.

    Raises:
        LedgerError: a seal, the chain of parent hashes or the end does not fit.
    """
    entries: list[Entry] = []
    chain = Chain()
    parent = file_hash(path / "ledger.json")
    for i, folder in enumerate(entry_folders(path), 1):
        file = folder / "record.json"
        value = read_sealed(file)
        need(value, file, index=int, parent=str, base_hash=str)
        if value["index"] != i or value["parent"] != parent:
            raise LedgerError(
                f"{file} does not follow the record before it: the ledger was reordered or changed by hand"
            )
        if value["base_hash"] != head["base"]["hash"]:
            raise LedgerError(f"{file} belongs to another base model than {path / 'ledger.json'}")
        parent = file_hash(file)
        step = _step(value, file)
        try:
            chain.add(step)
        except LedgerError as error:
            raise LedgerError(f"{file} does not fit the entries before it: {error}") from None
        entries.append(Entry(i, step, folder, value, parent))
    _check_end(path, head, entries)
    return entries, chain


def _check_end(path: Path, head: Mapping[str, Any], entries: list[Entry]) -> None:
    """HEAD.json: one entry more than it names is a crash between two writes; fewer are a loss."""
    file = path / "HEAD.json"
    if not file.exists() and not file.is_symlink():
        if head["version"] >= 1 or any(entry.value["version"] >= 1 for entry in entries):
            raise LedgerError(f"{file} is missing: it says where the ledger ends; copy the whole folder again")
        return
    end = read_sealed(file)
    need(end, file, entries=int, last=str)
    count = end["entries"]
    if count > len(entries):
        raise LedgerError(
            f"{path} ends with record {len(entries):04d}, but {file.name} names {count} entries: record "
            f"{len(entries) + 1:04d} and what follows were deleted; restore them from a copy (to go back to an "
            "earlier task, use `keeplora ledger rollback`)"
        )
    if not len(entries) - 1 <= count <= len(entries):
        raise LedgerError(
            f"{file} names {count} entries and there are {len(entries)}: it is not of this ledger; restore it"
        )
    last = entries[count - 1].hash if count else file_hash(path / "ledger.json")
    if end["last"] != last:
        raise LedgerError(f"{file} names another record {count:04d} than is there: the ledger was changed by hand")


def _step(value: Mapping[str, Any], file: Path) -> Step:
    """What a record.json enters, its keys checked."""
    kind = value.get("kind", TASK) if value["version"] >= 1 else TASK
    if kind not in KINDS:
        raise LedgerError(f"{file} is an entry of kind {kind!r}, which this keeplora does not know: upgrade keeplora")
    need(value, file, name=str)
    for key, wanted in (("time", str), ("versions", dict), ("config", dict)):  # version 0 has none of them
        if value.get(key) is not None:
            need(value, file, **{key: wanted})
    if kind == TASK:
        need(value, file, layers=dict, info=dict, tensors_sha256=str)
        check_layers(value["layers"], file)
        return replace(Step(TASK, value["name"]), purged=bool(value.get("purged", False)))
    need(value, file, subject=int)
    return Step(kind, value["name"], value["subject"])
