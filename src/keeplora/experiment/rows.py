"""Rows of the accuracy matrix as they are kept beside each task in the ledger, so that going back and forth loses none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeplora.experiment.results import Scores
from keeplora.experiment.run_directory import RunDirectory
from keeplora.tuner import Ledger

Row = Sequence[float | None]


@dataclass(frozen=True)
class Columns:
    """What a row's values belong to: names of the tasks and of the probes, and the test samples of each set."""

    tasks: Sequence[str]
    probes: Sequence[str]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, tasks: Sequence[Any], probes: Sequence[Any]) -> Columns:
        """Those of loaded data sets."""
        counts = {t.name: len(t.test) for t in (*tasks, *probes)}
        return cls([t.name for t in tasks], [p.name for p in probes], counts)

    @classmethod
    def from_results(cls, results: Mapping[str, Any]) -> Columns:
        """Those of a results.json."""
        return cls(results["tasks"], results["probes"], results["test_counts"])

    def kept(self, name: str, tasks: Row, probes: Row, seconds: Mapping[str, float]) -> dict[str, Any]:
        """What `Ledger.write_metrics` keeps beside task ``name``: its own score, every set's, in percent, and what it took."""
        row = dict(zip(self.tasks, tasks, strict=True))
        of_probes = dict(zip(self.probes, probes, strict=True))
        return {"score": row.get(name), "tasks": row, "probes": of_probes, "seconds": dict(seconds)}

    def read(self, metrics: Mapping[str, Any] | None) -> tuple[list[float | None], list[float | None]] | None:
        """The values of a kept row; None where nothing (or something else) was kept."""
        if metrics is None or not all(isinstance(metrics.get(key), dict) for key in ("tasks", "probes")):
            return None

        def values(key: str, names: Sequence[str]) -> list[float | None]:
            found = [metrics[key].get(name) for name in names]
            return [v if isinstance(v, int | float) else None for v in found]

        return values("tasks", self.tasks), values("probes", self.probes)

    def first_of(self, events: Iterable[Mapping[str, Any]]) -> tuple[list[float | None], list[float | None]]:
        """The untouched model's values out of the events of a run; None for what they do not tell."""
        told = [e for e in events if e.get("event") == "evaluation" and e.get("after") == 0]
        values = {(e.get("kind"), e.get("set")): e.get("accuracy") for e in told}
        found: dict[str, list[float | None]] = {
            kind: [v if isinstance(v := values.get((kind, name)), int | float) else None for name in names]
            for kind, names in (("task", self.tasks), ("probe", self.probes))
        }
        return found["task"], found["probe"]

    def events(self, after: int, tasks: Row, probes: Row) -> Iterator[dict[str, Any]]:
        """The events of one row."""
        for kind, names, row in (("task", self.tasks, tasks), ("probe", self.probes, probes)):
            for name, value in zip(names, row, strict=True):
                event = {"event": "evaluation", "after": after, "set": name, "kind": kind}
                yield {**event, "accuracy": value, "n": self.counts.get(name)}


def add_kept_rows(scores: Scores, ledger: Ledger, tasks: Sequence[int], columns: Columns, *, upto: int) -> None:
    """Rows that results.json lacks and the ledger keeps.

    Args:
        tasks: entries of the run's tasks in order. upto: the last task whose row must be there in the end; one that nobody
            kept was never measured, or is lost, and is filled with None.
    """
    entries = ledger.entries()
    for i in range(len(scores.tasks), len(tasks) + 1):
        found = columns.read(entries[tasks[i - 1] - 1].metrics())
        if found is None:
            if i > upto:
                return
            tasks_row: list[float | None] = [None] * len(columns.tasks)
            probes_row: list[float | None] = [None] * len(columns.probes)
            found = tasks_row, probes_row
        scores.add(*found)


def add_missing_events(
    directory: RunDirectory, scores: Scores, tasks: Sequence[tuple[str, Mapping[str, Any]]], columns: Columns
) -> None:
    """Events of tasks that were cut when the ledger went back, and are in force again.

    Args:
        tasks: name and record's info of the run's tasks in order.
    """
    known = sum(event.get("event") == "task_finished" for event in directory.read_events())
    for i in range(known + 1, len(scores.tasks)):
        name, info = tasks[i - 1]
        directory.cut_events(i - 1)
        if i == 1:  # the untouched model's row stands before the first task's end, and was cut with it
            for event in columns.events(0, scores.tasks[0], scores.probes[0]):
                directory.append_event(event)
        for entry in info.get("epochs", []):
            directory.append_event({"event": "epoch", "task": name, **entry})
        for event in columns.events(i, scores.tasks[i], scores.probes[i]):
            directory.append_event(event)
        directory.append_event({"event": "task_finished", "task": name, "seconds": info.get("seconds", {})})
