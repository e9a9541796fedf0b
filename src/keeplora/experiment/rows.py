"""Rows of the accuracy matrix as they are kept beside each task in the ledger, so that going back and forth loses none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keeplora.experiment.results import Scores
from keeplora.experiment.run_directory import RunDirectory
from keeplora.tuner import ContinualLearner, Ledger, TaskRecord

Row = Sequence[float | None]


def kept_row(name: str, tasks: Row, probes: Row, of_tasks: Sequence[Any], of_probes: Sequence[Any]) -> dict[str, Any]:
    """What `Ledger.write_metrics` keeps beside task ``name``: its own score, and every set's, in percent.

    Args:
        tasks, probes: values. of_tasks, of_probes: the sets, by their ``name``.
    """
    row = {t.name: value for t, value in zip(of_tasks, tasks, strict=True)}
    return {"score": row.get(name), "tasks": row, "probes": {p.name: v for p, v in zip(of_probes, probes, strict=True)}}


def read_row(metrics: Mapping[str, Any] | None, tasks: Sequence[str], probes: Sequence[str]) -> tuple[Row, Row] | None:
    """The values of a kept row for these sets; None where nothing (or something else) was kept."""
    if metrics is None or not all(isinstance(metrics.get(key), dict) for key in ("tasks", "probes")):
        return None
    return tuple(
        [v if isinstance(v := metrics[key].get(name), int | float) else None for name in names]
        for key, names in (("tasks", tasks), ("probes", probes))
    )  # type: ignore[return-value]


def add_kept_rows(
    scores: Scores, learner: ContinualLearner, settled: Sequence[TaskRecord], tasks: Sequence[Any], probes: Sequence[Any]
) -> None:  # fmt: skip
    """Rows that results.json lacks and the ledger keeps; the last may still be missing, and is measured then.

    A row in the middle that nobody kept was never measured, or is lost: it is filled with None.
    """
    ledger = learner._ledger
    for i in range(len(scores.tasks), len(settled) + 1):
        found = None
        if ledger is not None:
            metrics = ledger.entries()[settled[i - 1].entry - 1].metrics()
            found = read_row(metrics, [t.name for t in tasks], [p.name for p in probes])
        if found is None:
            if i == len(settled) and settled[-1] in learner.records:
                return
            found = [None] * len(tasks), [None] * len(probes)
        scores.add(list(found[0]), list(found[1]))


def row_events(
    after: int, tasks: Row, probes: Row, of_tasks: Sequence[Any], of_probes: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """The events of one row."""
    for kind, group, row in (("task", of_tasks, tasks), ("probe", of_probes, probes)):
        for task, value in zip(group, row, strict=True):
            event = {"event": "evaluation", "after": after, "set": task.name, "kind": kind}
            yield {**event, "accuracy": value, "n": len(task.test)}


def add_missing_events(
    directory: RunDirectory, scores: Scores, settled: Sequence[TaskRecord], tasks: Sequence[Any], probes: Sequence[Any]
) -> None:  # fmt: skip
    """Events of tasks that were cut when the ledger went back, and are in force again."""
    known = sum(event.get("event") == "task_finished" for event in directory.read_events())
    for i in range(known + 1, len(scores.tasks)):
        record = settled[i - 1]
        directory.cut_events(i - 1)
        if i == 1:  # the untouched model's row stands before the first task's end, and was cut with it
            for event in row_events(0, scores.tasks[0], scores.probes[0], tasks, probes):
                directory.append_event(event)
        for entry in record.info.get("epochs", []):
            directory.append_event({"event": "epoch", "task": record.name, **entry})
        for event in row_events(i, scores.tasks[i], scores.probes[i], tasks, probes):
            directory.append_event(event)
        directory.append_event(
            {"event": "task_finished", "task": record.name, "seconds": record.info.get("seconds", {})}
        )


def keep_rows(ledger: Ledger, results: Mapping[str, Any]) -> None:
    """Before the ledger goes back: rows that only results.json has are put beside their tasks."""
    entries, chain = ledger.entries(), ledger.chain()
    tasks, probes = results["tasks"], results["probes"]
    rows = list(zip(results["accuracy"], results["probe_accuracy"], strict=False))
    in_force = (*chain.state.removed, *chain.state.active)
    at = {chain.steps[i - 1].name: i for i in in_force}
    for name, (of_tasks, of_probes) in zip(tasks, rows[1:], strict=False):
        if name in at and entries[at[name] - 1].metrics() is None:
            row = {
                "tasks": dict(zip(tasks, of_tasks, strict=True)),
                "probes": dict(zip(probes, of_probes, strict=True)),
            }
            ledger.write_metrics(at[name], {"score": row["tasks"].get(name), **row})
