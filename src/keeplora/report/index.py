"""What lies below a folder: every run and every study, also the unfinished and the damaged ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError, reason
from keeplora.json_text import read_object
from keeplora.report.kinds import KINDS, Metric
from keeplora.report.runs import load_run
from keeplora.yaml_text import parse_yaml

STUDY = "study.json"
RUN_FILES = ("status.json", "results.json")

UNREADABLE = "damaged"
"""The state of a folder whose files do not say what they should."""


@dataclass(frozen=True)
class Row:
    """One folder of the index. What is not known is None, and the page leaves its cell empty.

    ``kind`` is "run", "study", or "folder" for one that cannot be listed; ``done`` and ``total`` count tasks of a run, cells
    of a study; ``does`` is "classification" or "generation", and ``metrics`` are those of that kind; ``size`` is in bytes, of
    all files below the folder; ``seconds`` as the run tells it.
    """

    path: Path
    kind: str
    name: str
    state: str
    note: str = ""
    suite: str | None = None
    method: str | None = None
    model: str | None = None
    order: str | None = None
    seed: int | None = None
    done: int | None = None
    total: int | None = None
    does: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    size: int | None = None
    started: str | None = None


def metric_columns(rows: list[Row]) -> list[Metric]:
    """Every metric that some row has a value of, as the kinds of the rows call it, classification's first."""
    present = [kind for name, kind in KINDS.items() if any(row.does == name for row in rows)]
    found: dict[str, Metric] = {}
    for metric in (metric for kind in present for metric in kind.metrics):
        found.setdefault(metric.key, metric)
    return [metric for key, metric in found.items() if any(row.metrics.get(key) is not None for row in rows)]


def _is_run(folder: Path, files: set[str]) -> bool:
    # config.yaml alone is a name that many programs use; beside a ledger or data.json it is a run that has just begun.
    return bool(files & set(RUN_FILES)) or (
        "config.yaml" in files and ("data.json" in files or (folder / "ledger").is_dir())
    )


def find_folders(root: Path, closed: list[OSError]) -> Iterator[tuple[Path, str]]:
    """Every run and study at or below ``root`` with "run" or "study", in order of their paths.

    Nothing is looked for inside a run, and links are not followed. What the system said of folders that cannot be listed is
    added to ``closed``.
    """
    for folder, folders, files in os.walk(root, onerror=closed.append):
        here, names = Path(folder), set(files)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if STUDY in names:
            yield here, "study"
        elif "analysis.json" in names and "status.json" not in names:
            folders.clear()  # of `keeplora analyze`: it has a page of its own, and a results.json that is no run's
        elif _is_run(here, names):
            folders.clear()
            yield here, "run"


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``, links not followed; what vanishes meanwhile does not count."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total


def _word(value: Any) -> str | None:
    """A setting as one word; a model is written as a name or as a mapping with one."""
    value = value.get("name") if isinstance(value, dict) else value
    return str(value) if isinstance(value, str | int) else None


def read_run(path: Path) -> Row:
    """One run as a row, with what its config.yaml says where there are no results yet."""
    run = load_run(path)
    results, status = run.results, run.status
    config = {} if results or not run.config else parse_yaml(run.config, str(path / "config.yaml"))[0]
    told = config if isinstance(config, dict) else {}
    seconds = run.cost.get("seconds")
    return Row(
        path=path, kind="run", name=str(results.get("name") or told.get("name") or path.name),
        state=str(status.get("state") or ("finished" if run.finished else "unknown")), note=str(status.get("error") or ""),
        suite=results.get("suite") or _word(told.get("suite")), method=run.label if results else _word(told.get("method")),
        model=results.get("model") or _word(told.get("model")), order=results.get("order") or _word(told.get("order_name")),
        seed=results.get("seed", told.get("seed")), done=run.done, total=len(run.tasks) or None,
        does=run.kind.name, metrics={metric.key: run.metrics.get(metric.key) for metric in run.kind.metrics},
        seconds=status.get("seconds") if seconds is None else seconds, started=status.get("started"),
    )  # fmt: skip


def read_study(path: Path) -> Row:
    """A study as a row: how many of its cells are finished. Its runs have rows of their own."""
    file = path / STUDY
    value = read_object(file, "this file is written by keeplora alone") or {}
    cells, plan = value.get("cells"), value.get("plan")
    if not isinstance(cells, list) or not isinstance(plan, dict) or not all(isinstance(cell, dict) for cell in cells):
        raise KeepLoraError(f"{file} is no study's plan: it lacks 'plan' or 'cells'")
    states = [cell.get("state") for cell in cells]
    failed, done = states.count("failed"), states.count("finished")
    state = "finished" if done == len(cells) else "failed" if failed else "partial"
    seconds = [cell.get("seconds") for cell in cells if isinstance(cell.get("seconds"), int | float)]
    methods = plan.get("methods")
    return Row(
        path=path, kind="study", name=str(plan.get("name") or path.name), state=state,
        note=f"{failed} of its cells failed" if failed else "",
        suite=str(plan.get("base")) if plan.get("kind") == "suite" else None,
        method=f"{len(methods)} methods" if isinstance(methods, list) and len(methods) != 1 else None,
        done=done, total=len(cells), seconds=sum(seconds) if seconds else None,
        started=value.get("started") if isinstance(value.get("started"), str) else None,
    )  # fmt: skip


def collect(root: Path) -> list[Row]:
    """A row for every run and study at or below ``root``; one that cannot be read is a row that says why.

    Raises:
        KeepLoraError: ``root`` is no folder, or there is neither a run nor a study in it.
    """
    if not root.is_dir():
        raise KeepLoraError(f"{root} is no folder; give one that holds runs, such as `keeplora report --index runs`")
    rows: list[Row] = []
    closed: list[OSError] = []
    for path, kind in find_folders(root, closed):
        try:
            row = read_study(path) if kind == "study" else read_run(path)
        except KeepLoraError as error:
            row = Row(path=path, kind=kind, name=path.name, state=UNREADABLE, note=str(error))
        rows.append(Row(**{**row.__dict__, "size": folder_size(path)}))
    for error in closed:
        if not isinstance(error, FileNotFoundError):  # one that vanished meanwhile is gone
            path = Path(error.filename)
            rows.append(Row(path, "folder", path.name, UNREADABLE, f"{path} cannot be listed: {reason(error)}"))
    if not rows:
        raise KeepLoraError(
            f"{root} holds no run and no study: nothing in it has a results.json, a status.json or a study.json; "
            "a run makes them (`keeplora run`), a study `keeplora compare`"
        )
    return rows
