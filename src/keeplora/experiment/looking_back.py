"""Scores on tasks that a run is given later, of the states that it had before them: its ledger brings each of them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keeplora.evaluation.metrics import summary
from keeplora.experiment.measuring import Measuring
from keeplora.experiment.progress import Progress
from keeplora.experiment.results import Scores, settled_records
from keeplora.experiment.rows import Columns
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import Setup
from keeplora.tuner import Ledger, ranks


def late_tasks(setup: Setup, results: Mapping[str, Any] | None) -> list[Any]:
    """The tasks that have no column in a run's results yet."""
    return [task for task in setup.tasks if task.name not in results["tasks"]] if results else []


class LookingBack(Measuring):
    """The rows so far get a column for each late task, as if it had been there from the start.

    The model, which must be untouched, is untouched again afterwards. Nothing is written before all is measured, so that an
    interruption loses the measurements and nothing else.
    """

    def __init__(self, setup: Setup, directory: RunDirectory, results: Mapping[str, Any], quiet: bool | None) -> None:
        self.setup, self.config, self.directory = setup, setup.config, directory
        self.learner = setup.method.learner.from_pretrained(directory.path, setup.family.model)
        self.results = results
        self._settled = settled_records(self.learner, results["tasks"])  # before the learner goes back
        self.columns = Columns.of(setup.tasks, setup.probes)
        self.warnings = list(results["warnings"])
        self.progress = Progress(quiet) if ranks.is_first() else Progress.silent()
        self._late = late_tasks(setup, results)

    def go(self) -> None:
        setup, results = self.setup, self.results
        before, probes = Columns.from_results(results), setup.probes
        # Among every task's classes a new task has the older ones named among more of them.
        everything = self.config.candidates == "all"
        again = [*setup.tasks, *probes] if everything else self._late
        # The ledger decides what is learned; rows that it lacks are measured when it has them.
        entries = [0, *(record.entry for record in self._settled)]
        rows = list(zip(entries, results["accuracy"], results["probe_accuracy"], strict=False))
        setup.kind.begin(self.directory.path, results)
        scores = Scores()
        with self.progress, setup.kind.running(self.learner):
            steps = len(rows) * sum(setup.kind.steps(setup.sets[t.name].test) for t in again)
            self.progress.phase(f"scores on {', '.join(t.name for t in again)} before", steps)
            for i, (entry, tasks, of_probes) in enumerate(rows):
                known = dict(zip(before.tasks, tasks, strict=True)) | dict(zip(before.probes, of_probes, strict=True))
                known |= self._row(i, entry, again)
                scores.add([known[t.name] for t in setup.tasks], [known[p.name] for p in probes])
            self.learner.rollback(0)
        self._write(scores, again)

    def _row(self, i: int, entry: int, again: Sequence[Any]) -> dict[str, float | None]:
        """What the state after task ``i`` scores; None where it cannot be had any more."""
        chain = self.learner._chain
        if gone := [k for k in chain.states[entry].active if k in chain.state.purged]:
            names = ", ".join(task.name for task in again)
            self._warning(
                f"what the model scored on {names} after {i} tasks stays empty: {', '.join(chain.names(gone))} was part of that "
                "state, and was purged"
            )
            return {task.name: None for task in again}
        self.learner.rollback(entry)
        keep = self.directory.path / "predictions" / f"after-{i}"
        with self.setup.kind.evaluation(self.learner):
            return {t.name: self._score(t, self.setup.sets[t.name].test, keep=keep / f"{t.name}.jsonl") for t in again}

    def _write(self, scores: Scores, again: Sequence[Any]) -> None:
        """Beside the tasks, into the events, and last into the results, which say that it is done."""
        results, names = self.results, [task.name for task in again]
        ranks.first("writing the ledger", lambda: self._write_beside_tasks(scores))
        events = [
            event
            for i, rows in enumerate(zip(scores.tasks, scores.probes, strict=True))
            for event in self.columns.events(i, *rows) if event["set"] in names
        ]  # fmt: skip
        self.directory.replace_evaluations(events)
        told = {
            "suite": self.config.suite, "name": self.config.label, "order": self.config.order_name,
            "comparison_key": self.key, "tasks": list(self.columns.tasks), "accuracy": scores.tasks,
            "probe_accuracy": scores.probes, "test_counts": dict(self.columns.counts),
            "metrics": summary(scores.tasks, scores.probes), "warnings": list(dict.fromkeys(self.warnings)),
        }  # fmt: skip
        self.directory.write_results({**results, **self.setup.kind.results(), **told})

    def _write_beside_tasks(self, scores: Scores) -> None:
        ledger = Ledger.open(self.directory.ledger_path)
        kept = ledger.entries()
        for record, tasks, probes in zip(self._settled, scores.tasks[1:], scores.probes[1:], strict=False):
            was = kept[record.entry - 1].metrics() or {}
            seconds = was.get("seconds") or record.info.get("seconds", {})
            ledger.write_metrics(record.entry, self.columns.kept(record.name, tasks, probes, seconds))
