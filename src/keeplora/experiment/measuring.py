"""What a run measures of the model at hand, and how it tells what it finds."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.loggers import Loggers
from keeplora.experiment.progress import Progress
from keeplora.experiment.results import Scores, comparison_key
from keeplora.experiment.rows import Columns
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import Setup
from keeplora.tuner import ContinualLearner


class Measuring:
    """The part of a run that scores; nothing here changes the model."""

    setup: Setup
    config: ExperimentConfig
    directory: RunDirectory
    learner: ContinualLearner
    progress: Progress
    loggers: Loggers
    columns: Columns
    scores: Scores
    warnings: list[str]
    evaluation_seconds: float
    _joint: bool

    @property
    def key(self) -> str:
        """The run's `comparison_key`."""
        setup = self.setup
        return comparison_key(setup.config, setup.tasks, setup.probes, setup.kind.comparison())

    def _event(self, event: Mapping[str, Any]) -> None:
        self.directory.append_event(event)
        self.loggers.event(event)

    def _warning(self, line: str) -> None:
        self.warnings.append(line)
        self.progress.line(f"warning: {line}")

    @contextlib.contextmanager
    def _noting_warnings(self) -> Iterator[None]:
        """Warnings become lines of the log and of the report."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for entry in caught:
            if issubclass(entry.category, UserWarning) and "keeplora" in entry.filename:
                self._warning(str(entry.message))

    def _score(self, task: Any, data: Any, **more: Any) -> float | None:
        """The model as it is now, on samples of ``task``."""
        with self._noting_warnings():
            value = self.setup.kind.score(task, data, self.learner, on_batch=self.progress.advance, **more)
        for line in self.setup.kind.warnings():
            if line not in self.warnings:
                self._warning(line)
        return value

    def _tell_row(self, after: int, tasks: Sequence[float | None], probes: Sequence[float | None]) -> None:
        for event in self.columns.events(after, tasks, probes):
            self._event(event)

    def _evaluate(self, after: int) -> None:
        """Row ``after`` of the accuracy matrix: every task and probe, whether learned yet or not."""
        started = time.perf_counter()
        sets, kind = self.setup.sets, self.setup.kind
        groups = (("task", self.setup.tasks), ("probe", self.setup.probes))
        self.progress.phase("evaluation", sum(kind.steps(sets[t.name].test) for _, group in groups for t in group))
        rows: dict[str, list[float | None]]
        if self._joint and 0 < after < len(self.setup.tasks):  # not trained yet: there is no such moment
            rows = {kind: [None] * len(group) for kind, group in groups}
        elif not self.setup.method.trains and after > 0 and self.config.candidates != "seen":
            # Nothing moved: the row is the row before.
            rows = {"task": list(self.scores.tasks[-1]), "probe": list(self.scores.probes[-1])}
            kind.repeat(after)
        else:
            keep = self.directory.path / "predictions" / f"after-{after}"
            with kind.evaluation(self.learner):
                rows = {
                    name: [self._score(t, sets[t.name].test, keep=keep / f"{t.name}.jsonl") for t in group]
                    for name, group in groups
                }
        self._tell_row(after, rows["task"], rows["probe"])
        known = [value for value in rows["task"] if value is not None]
        if known:
            word = "accuracy" if kind.name == "classification" else "score"
            self.progress.advance(0, **{word: sum(known) / len(known)})
        self.scores.add(rows["task"], rows["probe"])
        self.evaluation_seconds = time.perf_counter() - started

    def _guard_scores(self, upto: int) -> dict[str, float]:
        """What `accept` may look at: validation pictures of earlier tasks, the held-out halves of the probes."""
        out: dict[str, float | None] = {}
        kept = {record.name for record in self.learner.records if not record.info.get("undone")}
        for task in self.setup.tasks[:upto]:
            validation = self.setup.sets[task.name].validation
            if validation is not None and task.name in kept:
                out[task.name] = self._score(task, validation)
        for probe in self.setup.probes:
            out[probe.name] = self._score(probe, self.setup.guards[probe.name])
        return {name: value for name, value in out.items() if value is not None}
