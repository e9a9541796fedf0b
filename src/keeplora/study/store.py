"""study.json: the plan, the cells and how far each is; and which of two plans may share a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from keeplora.errors import KeepLoraError, reason
from keeplora.experiment.folder_lock import FolderLock
from keeplora.experiment.run_directory import RunDirectory
from keeplora.files import atomic_write_json, sweep
from keeplora.json_text import read_object
from keeplora.study.plan import CellKey, StudyPlan

FORMAT = "keeplora-study"
VERSION = 0
FILE = "study.json"


def _one_name(text: str) -> str:
    """The folder of a cell is made of these: none may lead out of the study's."""
    if text in ("", ".", "..") or any(c in text for c in "/\\\0"):
        raise ValueError(f"{text!r} is no name of one folder")
    return text


_Name = Annotated[str, AfterValidator(_one_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Plan(_Strict):
    name: str
    kind: Literal["suite", "experiment"]
    base: str
    set: dict[str, Any]
    methods: list[_Name]
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]]
    orders: dict[_Name, str | int | list[str] | None]
    per_method: dict[str, dict[str, Any]]
    variants: dict[_Name, dict[str, Any]] = {}  # studies of before these have none
    against: str | None
    keep_ledgers: bool


STATES = ("pending", "running", "interrupted", "failed", "finished")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class CellRecord:
    """A cell as study.json tells it.

    ``seconds``: time of its processes, start-up and resumes included; ``dropped_bytes``: size of the ledger's tensors that
    were deleted, None while they are kept.
    """

    method: str
    order: str
    seed: int
    state: str = "pending"
    attempts: int = 0
    seconds: float | None = None
    error: str | None = None
    dropped_bytes: int | None = None

    @property
    def key(self) -> CellKey:
        return CellKey(self.method, self.order, self.seed)


class _Cell(_Strict):
    method: _Name
    order: _Name
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    state: Literal["pending", "running", "interrupted", "failed", "finished"] = "pending"
    attempts: int = 0
    seconds: Annotated[float, Field(allow_inf_nan=False)] | None = None
    error: str | None = None
    dropped_bytes: int | None = None


class _Study(_Strict):
    plan: _Plan
    threads: int | None
    started: str
    cells: list[_Cell]


def is_study(path: Path) -> bool:
    return (path / FILE).is_file()


def is_being_written(folder: Path) -> bool:
    """Whether a living process holds a run directory open: a cell that outlived the study that started it."""
    if not (folder / ".lock").is_file():
        return False
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except KeepLoraError:
        return True
    lock.release()
    return False


class StudyStore:
    """A study's folder, locked against other writers between `lock` and `close`; reading needs no lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan: dict[str, Any] = {}
        self.threads: int | None = None
        self.started = _now()
        self.cells: dict[CellKey, CellRecord] = {}
        self._lock: FolderLock | None = None

    @property
    def file(self) -> Path:
        return self.path / FILE

    def lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        try:
            lock.acquire()
        except KeepLoraError as error:
            raise KeepLoraError(f"{str(error).split(';')[0]}; a study is run by one process at a time") from None
        except OSError as error:
            raise KeepLoraError(f"{self.path} cannot be written to: {reason(error)}") from None
        self._lock = lock
        sweep(self.path)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def load(self) -> StudyStore:
        """Read study.json; a folder without one stays an empty study."""
        value = read_object(self.file, "this file is written by keeplora alone")
        if value is None:
            return self
        if value.get("format") != FORMAT:
            raise KeepLoraError(f"{self.file} is not a study of keeplora: its format is not {FORMAT!r}")
        if value.get("version") != VERSION:
            raise KeepLoraError(
                f"{self.file}: version {value.get('version')!r}, this keeplora knows {VERSION}; update it"
            )
        try:
            found = _Study.model_validate(value)
            self.plan, self.threads, self.started = found.plan.model_dump(), found.threads, found.started
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise KeepLoraError(
                f"{self.file}: {'.'.join(map(str, first['loc']))} cannot be used ({first['msg'][:1].lower()}{first['msg'][1:]}): "
                "the file was changed or damaged; restore it from a copy"
            ) from None
        records = [CellRecord(**cell.model_dump()) for cell in found.cells]
        self.cells = {record.key: record for record in records}
        return self

    def save(self) -> None:
        """Write study.json, whole or not at all."""
        value = {
            "format": FORMAT, "version": VERSION, "plan": self.plan, "threads": self.threads, "started": self.started,
            "updated": _now(),
            "cells": [{**asdict(record), "folder": record.key.folder} for record in self.cells.values()],
        }  # fmt: skip
        atomic_write_json(self.file, value)

    def folder(self, key: CellKey) -> Path:
        return self.path / key.folder

    def join(self, plan: StudyPlan) -> None:
        """Lay a plan over what the folder holds: it may add methods, seeds and orders, and must not contradict.

        Raises
        ------
        KeepLoraError
            The folder's study is of another suite, or other settings: its runs could not stand beside the new ones.
        """
        if not self.plan and self.path.is_dir():
            strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if strangers:
                raise KeepLoraError(
                    f"{self.path} is not empty ({', '.join(strangers[:3])}) and no study; choose a new folder with --output"
                )
        told = self._contradictions(plan)
        if told:
            raise KeepLoraError(
                f"{self.path} holds a study with {'; and with '.join(told)}; its runs cannot stand beside such ones: "
                "choose another --output, or repeat the study's own settings"
            )
        old = self.plan
        self.plan = {
            "name": plan.name, "kind": plan.kind, "base": plan.base, "set": dict(plan.set),
            "methods": _union(old.get("methods", []), plan.methods),
            "seeds": sorted(_union(old.get("seeds", []), plan.seeds)),
            "orders": {**old.get("orders", {}), **plan.orders},
            "per_method": {**old.get("per_method", {}), **plan.per_method},
            "variants": {**old.get("variants", {}), **plan.variants},
            "against": plan.against or old.get("against"), "keep_ledgers": plan.keep_ledgers,
        }  # fmt: skip
        for key in plan.cells():
            self.cells.setdefault(key, CellRecord(*key))
        self._sort()

    def _contradictions(self, plan: StudyPlan) -> list[str]:
        old = self.plan
        if not old:
            return []
        told = []
        if (old["kind"], old["base"]) != (plan.kind, plan.base):
            told.append(f"{old['kind']} {old['base']} (asked for now: {plan.kind} {plan.base})")
        for key in sorted(old["set"].keys() | plan.set.keys()):
            was, now = old["set"].get(key), plan.set.get(key)
            if was != now or (key in old["set"]) != (key in plan.set):
                told.append(f"{_setting(old['set'], key)} (asked for now: {_setting(plan.set, key)})")
        for label in old["orders"].keys() & plan.orders.keys():
            if old["orders"][label] != plan.orders[label]:
                told.append(f"order {label} = {old['orders'][label]} (asked for now: {plan.orders[label]})")
        based = {old["variants"].get(name, {}).get("method", name) for name in old["methods"]}
        for method in dict.fromkeys(plan.method_of(name) for name in plan.methods):
            was, now = old["per_method"].get(method, {}), dict(plan.per_method.get(method, {}))
            if method in based and was != now:
                told.append(f"{method}'s own settings {was or 'none'} (asked for now: {now or 'none'})")
        for method in plan.methods:
            was, now = old["variants"].get(method, {}), dict(plan.variants.get(method, {}))
            if method in old["methods"] and was != now:
                told.append(f"variant {method} = {was or 'none'} (asked for now: {now or 'none'})")
        if plan.threads is not None and self.threads is not None and plan.threads != self.threads:
            told.append(f"threads = {self.threads} (asked for now: {plan.threads})")
        return told

    def _sort(self) -> None:
        """Cells in the order in which they run: seeds, then orders, then methods."""
        rank = {name: i for i, name in enumerate(self.plan["methods"])}
        place = {label: i for i, label in enumerate(self.plan["orders"])}
        keys = sorted(self.cells, key=lambda key: (key.seed, place.get(key.order, 0), rank.get(key.method, 0)))
        self.cells = {key: self.cells[key] for key in keys}

    def as_plan(self) -> StudyPlan:
        """The plan that the folder holds, to go on with."""
        if not self.plan:
            raise KeepLoraError(f"{self.path} holds no {FILE}; is it the --output of a `keeplora compare`?")
        old = self.plan
        return StudyPlan(
            name=old["name"], kind=old["kind"], base=old["base"], methods=tuple(old["methods"]),
            seeds=tuple(old["seeds"]), orders=old["orders"], output=self.path, set=old["set"],
            per_method=old["per_method"], variants=old["variants"], against=old["against"], keep_ledgers=old["keep_ledgers"],
        )  # fmt: skip

    def plan_values(self) -> dict[str, Any]:
        """The folder's plan as the keys of a STUDY.yaml, for options to be laid over."""
        plan = self.as_plan()
        settings = dict(plan.set)
        values = {
            plan.kind: plan.base, "name": plan.name, "methods": list(plan.methods), "seeds": list(plan.seeds),
            "orders": dict(plan.orders), "per_method": {m: dict(v) for m, v in plan.per_method.items()},
            "variants": {name: dict(v) for name, v in plan.variants.items()},
            "data": settings.pop("data_dir", None), "set": settings, "against": plan.against,
            "keep_ledgers": plan.keep_ledgers, "output": str(self.path),
        }  # fmt: skip
        return {key: value for key, value in values.items() if value not in (None, {})}

    def refresh(self, keys: Iterable[CellKey] | None = None) -> None:
        """Take the cells' states from their folders, which know better after a crash."""
        for key in self.cells if keys is None else keys:
            record, folder = self.cells[key], self.folder(key)
            status = RunDirectory(folder).read_status() if folder.is_dir() else {}
            state = status.get("state")
            if state == "finished":
                record.state, record.error = "finished", None
                if record.seconds is None:
                    record.seconds = status.get("seconds")
            elif folder.is_dir() and is_being_written(folder):
                record.state = "running"
            elif record.state not in ("failed", "interrupted") or state == "interrupted":
                # "running" without a process that holds the folder was killed.
                begun = (folder / "config.yaml").is_file()
                record.state = "failed" if state == "failed" else "interrupted" if begun else "pending"
                record.error = status.get("error") if state == "failed" else None


def _union(old: Iterable[Any], new: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys([*old, *new]))


def _setting(values: Mapping[str, Any], key: str) -> str:
    return f"{key} = {values[key]}" if key in values else f"{key} not set"
