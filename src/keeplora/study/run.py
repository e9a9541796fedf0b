"""A study from its plan to its tables: what `keeplora compare` does, for Python callers too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.resuming import changed_settings
from keeplora.experiment.run_directory import RunDirectory
from keeplora.report.study import render_study
from keeplora.report.study_data import Study
from keeplora.study.collect import read_runs, study_cells, study_of
from keeplora.study.execute import Executor
from keeplora.study.plan import CellKey, StudyPlan
from keeplora.study.progress import StudyProgress
from keeplora.study.resources import slots
from keeplora.study.store import CellRecord, StudyStore, is_study


class Outcome(NamedTuple):
    """A study's numbers, its page, and the cells that failed in this call."""

    study: Study
    report: Path
    failed: list[CellRecord]


def open_study(plan: StudyPlan) -> tuple[StudyStore, list[CellKey]]:
    """The folder's study with the plan laid over it, nothing written; and the plan's cells in the order of running.

    Raises
    ------
    KeepLoraError
        The folder holds another study, or runs from before the study's file or suite changed.
    """
    store = StudyStore(plan.output).load()
    store.join(plan)
    store.as_plan().check_orders()
    store.refresh()
    _refuse_changed(store)
    wanted = set(plan.cells())
    return store, [key for key in store.cells if key in wanted]


def run_study(plan: StudyPlan, *, keys: Sequence[CellKey] | None = None, quiet: bool | None = None) -> Outcome:
    """Run what is not finished, then write the tables of everything that is.

    ``keys`` are the cells to run; None: all of the plan's. A cell that fails is told in the outcome and costs no other.

    Raises
    ------
    ConfigError
        A method or order whose configuration cannot be run; nothing was started.
    KeepLoraError
        The folder holds another study, or another process runs it.
    StudyInterrupted
        Ctrl-C; the tables are written of what there is.
    """
    plan.check()
    store, found = open_study(plan)
    found = [key for key in found if keys is None or key in set(keys)]
    store.lock()
    try:
        # Read again under the lock: another process may have just ended.
        store.load()
        store.join(plan)
        store.refresh()
        todo = sum(store.cells[key].state != "finished" for key in found)
        peaks = [p for cell in study_cells(store) if cell.run and (p := cell.run.cost.get("peak_memory_bytes"))]
        free = slots(
            max(todo, 1), jobs=plan.jobs, threads=plan.threads or store.threads, settings=plan.set, peaks=peaks
        )
        store.threads = free.threads
        store.save()
        progress = StudyProgress(store, found, free.jobs, quiet)
        try:
            failed = Executor(plan, store, found, free, progress).run()
        finally:
            study, report = write_tables(store, plan.against)
        return Outcome(study, report, failed)
    finally:
        store.close()


def _refuse_changed(store: StudyStore) -> None:
    """Refuse runs that were made before their experiment's file or suite changed: they cannot stand beside new ones.

    Raises
    ------
    KeepLoraError
        Names the run, and the settings with their old and new values.
    """
    plan, now = store.as_plan(), dict[tuple[str, str], dict[str, Any]]()
    for key in store.cells:
        directory = RunDirectory(store.folder(key))
        if not directory.config_path.is_file():
            continue
        if (key.method, key.order) not in now:
            try:
                now[key.method, key.order] = plan.config(key.method, key.order).resolved()
            except ConfigError as error:
                raise ConfigError(f"{directory.path}, a run of this study, could not be run today: {error}") from None
        was = directory.read_config()
        if was.get("suite") != now[key.method, key.order]["suite"]:
            continue  # it was given further tasks, and stands in no table of the study's
        if told := changed_settings(was, now[key.method, key.order]):
            raise KeepLoraError(
                f"{directory.path} was run with {', '.join(told[:3])}: what the study's runs go by has changed since; restore "
                "it, take that run's folder away, or choose another --output (--only-tables reads what there is)"
            )


def write_tables(store: StudyStore, against: str | None = None) -> tuple[Study, Path]:
    """Render whatever a study's folder holds."""
    plan = store.as_plan()
    cells = study_cells(store)
    tasks = next((cell.run.tasks for cell in cells if cell.run is not None and cell.run.tasks), [])
    model = next((cell.run.results.get("model") for cell in cells if cell.run is not None and cell.run.results), None)
    facts = [
        ("experiment" if plan.kind == "experiment" else "suite", Path(plan.base).stem),
        ("model", Path(str(model)).name if model else ""), ("tasks", str(len(tasks)) if tasks else ""),
        ("seeds", ", ".join(map(str, plan.seeds))), ("orders", ", ".join(plan.orders)),
        ("overrides", ", ".join(f"{key}={value}" for key, value in plan.set.items())),
        ("settings of each method’s own", ", ".join(plan.per_method)),
    ]  # fmt: skip
    study = study_of(
        cells, name=plan.name, against=against or plan.against, methods=plan.methods, orders=list(plan.orders),
        facts=[fact for fact in facts if fact[1]],
    )  # fmt: skip
    return study, render_study(study, store.path)


def read_study(paths: Sequence[Path], *, output: Path | None, name: str | None, against: str | None) -> Outcome:
    """The tables of runs that exist, wherever they lie; a single study's folder is rendered where it is.

    Raises
    ------
    KeepLoraError
        Nothing to read, or runs that cannot stand in one table: the sentence names what differs.
    """
    if len(paths) == 1 and is_study(paths[0]) and output is None:
        store = StudyStore(paths[0]).load()
        store.refresh()
        study, report = write_tables(store, against)
        return Outcome(study, report, [])
    collected = read_runs(paths)
    folder = output or Path("runs") / f"compare-{name or 'runs'}"
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "table.csv").is_file():
        raise KeepLoraError(f"{folder} is not empty and holds no comparison; choose another --output")
    first = next((cell.run for cell in collected.cells if cell.run is not None), None)
    facts = (
        [("suite", str(first.results.get("suite") or "")), ("model", Path(str(first.results.get("model"))).name)]
        if first
        else []
    )
    study = study_of(
        collected.cells, name=name or folder.name, against=against, facts=[f for f in facts if f[1]], notes=collected.notes
    )  # fmt: skip
    return Outcome(study, render_study(study, folder), [])
