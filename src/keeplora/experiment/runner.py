"""Tasks × one method → a run directory, one finished task at a time; a crash loses what came after the last checkpoint."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keeplora.errors import CapacityError
from keeplora.experiment.checkpoint import CheckpointError, Identity, Keeper, Snapshot
from keeplora.experiment.config import TrainingConfig
from keeplora.experiment.loggers import Loggers
from keeplora.experiment.measuring import Measuring
from keeplora.experiment.pictures import Batches, MixedBatches, ReferenceBatches
from keeplora.experiment.progress import Progress
from keeplora.experiment.results import (
    Scores,
    build_results,
    peak_memory,
    settled_count,
    settled_records,
)
from keeplora.experiment.resuming import identity_of
from keeplora.experiment.rows import Columns, add_kept_rows, add_missing_events
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import Setup
from keeplora.experiment.several import checkpoints
from keeplora.experiment.training import Selection, train_task
from keeplora.report import render_report
from keeplora.tuner import ContinualLearner, TaskRecord, ranks
from keeplora.tuner.capacity import warn_before_full
from keeplora.tuner.sharding import is_sharded
from keeplora.tuner.task import TaskState

STOP_AFTER = "KEEPLORA_STOP_AFTER"
"""Environment variable for tests: raise after this many tasks, as if the process had been interrupted there."""


def _parts_of(saved: Snapshot | None) -> tuple[TaskState | None, dict[str, Any]]:
    """What the learner and the runner put into a checkpoint."""
    if saved is None:
        return None, {}
    tensors, values = saved
    own = {key.removeprefix("learner/"): t for key, t in tensors.items() if key.startswith("learner/")}
    if not isinstance(values.get("learner"), dict) or "warnings" not in values.get("run", {}):
        raise CheckpointError("it is not complete")
    return TaskState(own, values["learner"]), values["run"]


class Run(Measuring):
    """One pass over the tasks that are not learned yet."""

    def __init__(
        self, setup: Setup, directory: RunDirectory, learner: ContinualLearner, quiet: bool | None,
        *, resumed: bool = False,
    ) -> None:  # fmt: skip
        self.setup = setup
        self.config = setup.config
        self.directory = directory
        self.learner = learner
        learner.shards_B = False  # `add_up` adds gradients up, sharded or not
        self.checkpoints = checkpoints(directory.path)
        self.progress = Progress(quiet) if ranks.is_first() else Progress.silent()
        if directory.warning:
            self.progress.line(f"warning: {directory.warning}")
        self.columns = Columns.of(setup.tasks, setup.probes)
        self.warnings: list[str] = [f"{t.name}: {w}" for t in [*setup.tasks, *setup.probes] for w in t.warnings]
        earlier = directory.read_results(whole=True)
        setup.kind.begin(directory.path, earlier)
        self.scores = Scores.from_results(earlier)
        if earlier:
            self.warnings += earlier["warnings"]
            # A record is written before its evaluation: what that took is known to results.json alone.
            told = {info.get("name"): info.get("seconds") or {} for info in earlier["tasks_info"]}
            for record in (*learner.records, *learner.removed):
                record.info["seconds"] = {**record.info.get("seconds", {}), **told.get(record.name, {})}
        self.evaluation_seconds = 0.0
        self._resumed = resumed
        self._joint = learner.schedule == "joint"
        self.loggers = Loggers({}, 0, self._warning)

    def go(self) -> dict[str, Any]:
        order = [task.name for task in self.setup.tasks]
        settled = settled_records(self.learner, order)
        done = settled_count((record.name for record in settled), order, self.directory.path)
        self.checkpoints.drop_finished(done)
        with self.directory.learning(), self._closing_loggers():
            if done and not self.scores.tasks:
                self._recover_first_row()
            # The ledger decides what is finished; scores of a task that it lacks are dropped, missing ones are made again.
            self.scores = Scores(self.scores.tasks[: done + 1], self.scores.probes[: done + 1])
            if self.scores.tasks and self.learner._ledger is not None:
                entries = [record.entry for record in settled]
                # The last row can still be measured, unless its task was taken out before anybody did.
                upto = done - 1 if settled and any(settled[-1] is r for r in self.learner.records) else done
                add_kept_rows(self.scores, self.learner._ledger, entries, self.columns, upto=upto)
            self.scores = ranks.agreed("the scores so far", self.scores)  # rank 0 alone has the ledger
            rows = len(self.scores.tasks)
            self.directory.set_status(state="running", tasks_done=done, error=None)
            with self.progress, self.setup.kind.running(self.learner):
                told = [(record.name, record.info) for record in settled]
                add_missing_events(self.directory, self.scores, told, self.columns)
                self.directory.cut_events(max(0, rows - 1))
                wanted = self.config.loggers if ranks.is_first() else []
                self.loggers = Loggers.open(
                    wanted, self.config.resolved(), self.directory.path, rows > 0, warn=self._warning
                )
                if rows == 1:  # row 0 was cut with the unfinished first task: no `task_finished` stands between them
                    self._tell_row(0, self.scores.tasks[0], self.scores.probes[0])
                if rows == 0:
                    self._evaluate(0)
                    self._write()
                elif done == rows:  # killed between the ledger's record and its scores
                    self._log_epochs(done)
                    if self.learner.protects:
                        with self._noting_warnings():  # told when the task ended, and lost with the process
                            warn_before_full(self.learner)
                    self._score_last(done)
                elif settled and any(settled[-1] is r for r in self.learner.records):
                    self._keep_row(done, again=False)  # killed, perhaps, before the ledger had it
                for i in range(done + 1, len(self.setup.tasks) + 1):
                    task = self.setup.tasks[i - 1]
                    self.progress.task(task.name, i, len(self.setup.tasks))
                    self._learn(task, i)
                    self._score_last(i)
                    if os.environ.get(STOP_AFTER) == str(i):
                        raise KeyboardInterrupt
        self.loggers.close("finished")
        self.directory.set_status(state="finished", tasks_done=len(order))
        results = self._write() if is_sharded(self.learner.model) else ranks.first("writing the results", self._write)
        self._report()
        return results

    def _recover_first_row(self) -> None:
        """Tasks are learned but results.json is gone: the untouched model's row is in metrics.jsonl, or lost. The model at hand
        has learned since and must not be taken for it; the other rows are kept beside their tasks."""
        row = self.columns.first_of(self.directory.read_events())
        if None in (*row[0], *row[1]):
            self._warning(
                "results.json is missing, and what the untouched model scored is not (or not wholly) in metrics.jsonl: those "
                "scores stay empty, and so do the metrics that are taken from them"
            )
        else:
            self._warning("results.json was missing; it was made again from the ledger and metrics.jsonl")
        self.scores.add(*row)

    @contextlib.contextmanager
    def _closing_loggers(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.loggers.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    def _report(self) -> None:
        """report.html, which anyone can make again from what the folder holds: its failure costs the run nothing."""
        if not ranks.is_first():
            return
        try:
            render_report(self.directory.path)
        except Exception as error:
            self.progress.line(
                f"warning: report.html could not be made ({type(error).__name__}: {error}); the results are kept"
            )

    def _record(self, i: int) -> TaskRecord:
        """Of task ``i``, from 1."""
        return next(r for r in self.learner.records if r.name == self.setup.tasks[i - 1].name)

    def _log_epochs(self, i: int) -> None:
        """The epochs of task ``i`` from its record: those in metrics.jsonl were cut with everything unfinished."""
        record = self._record(i)
        for entry in record.info.get("epochs", []):
            self._event({"event": "epoch", "task": record.name, **entry})

    def _score_last(self, i: int) -> None:
        record = self._record(i)
        self._evaluate(i)
        record.info["seconds"]["evaluation"] = round(self.evaluation_seconds, 3)
        self._event({"event": "task_finished", "task": record.name, "seconds": record.info["seconds"]})
        self._write()
        self._keep_row(i)
        self.directory.set_status(tasks_done=i)
        self._report()

    def _keep_row(self, i: int, *, again: bool = True) -> None:
        """Row ``i`` beside the record of its task; not ``again``: only where none is kept yet."""
        record, ledger = self._record(i), self.learner._ledger
        if ledger is not None and (again or ledger.entries()[record.entry - 1].metrics() is None):
            row = self.columns.kept(record.name, self.scores.tasks[i], self.scores.probes[i], record.info["seconds"])
            ledger.write_metrics(record.entry, row)

    def _write(self) -> dict[str, Any]:
        if not ranks.is_first() and not is_sharded(
            self.learner.model
        ):  # which the audit puts together from all processes
            return {}
        seconds = float(self.directory.read_status().get("seconds") or 0.0)
        results = build_results(
            self.config, self.setup.method, self.learner, self.setup.tasks, self.setup.probes, self.scores,
            self.warnings, peak_memory(), seconds, self.key, self.setup.kind,
        )  # fmt: skip
        self.directory.write_results(results)
        return results

    def _selection(self, task: Any, objective: Any) -> Selection | None:
        validation = self.setup.sets[task.name].validation
        stopping = self.config.early_stopping
        if validation is None or not (self.config.best_epoch or stopping is not None):
            return None

        def validate() -> float | None:
            return self._score(task, validation, head=objective.head.detach() if objective.head is not None else None)

        return Selection(validate, self.config.best_epoch, stopping.patience if stopping else None)

    def _learn(self, task: Any, index: int) -> None:
        """Teach the task, from its checkpoint where there is one that fits, and delete that when the ledger holds the task."""
        setup = self.setup
        identity = ranks.first(
            "looking at the ledger",
            lambda: identity_of(
                self.config, self.directory.ledger_path, setup.tasks, setup.probes, index, setup.family.device.type
            ),
        )
        warned = list(self.warnings)
        try:
            saved = ranks.first("reading the checkpoint", lambda: self.checkpoints.read(identity))
            if saved is not None:
                self._learn_from(task, index, identity, saved)
        except CheckpointError as error:
            self.progress.line(f"the checkpoint of task {task.name!r} is not used: {error}; the task starts again")
            self.checkpoints.clear()
            self.warnings, saved = warned, None
            self._resumed = False  # said already
        if saved is None:
            if self._resumed and setup.method.trains:
                self.progress.line(
                    f"no checkpoint of task {task.name!r} yet: it starts from its beginning (training.checkpoint_minutes and "
                    "checkpoint_steps say how often one is written)"
                )
            self._learn_from(task, index, identity, None)
        self._resumed = False  # the tasks after it begin as in any run
        self.checkpoints.clear()

    def _learn_from(self, task: Any, index: int, identity: Identity, saved: Snapshot | None) -> None:
        setup, training = self.setup, self.config.training.for_task(task.name)
        seed = self.config.seed * 100_003 + index
        torch.manual_seed(seed)
        data = setup.sets[task.name].train
        info: dict[str, Any] = {
            **setup.kind.info(task), "data": task.fingerprint, "seed": seed, "model": self.config.model.name,
            "training": training.model_dump(), "seconds": {},
        }  # fmt: skip
        deferred = self._joint and index < len(setup.tasks)
        if not setup.method.trains or deferred:
            info |= {"trained_parameters": 0} | ({"deferred": True} if deferred else {})
            self.learner.sit_out(task.name, info)
            return
        objective = setup.kind.objective(task)
        before, earlier = _parts_of(saved)
        started = time.perf_counter() - earlier.get("elapsed", 0.0)
        with self._noting_warnings():
            if saved is None:
                setup.kind.prepare_head(objective, data, training)
            elif "parameter/head" in saved[0]:
                objective.head = nn.Parameter(saved[0]["parameter/head"].to(setup.family.device))
            self.learner.config = setup.tuner_config(task)
            self.progress.phase("statistics" if saved is None else "opening the checkpoint")
            accept = self.config.accept
            reference = None
            if setup.reference is not None:
                reference = ReferenceBatches(setup.family, *setup.reference, training.batch_size, seed)
            try:
                model = self.learner.start_task(
                    task.name, **setup.kind.statistics(objective, data, training, self.learner.config, seed),
                    accept=accept.model_dump() if accept else None,
                    evaluate=(lambda: self._guard_scores(index - 1)) if accept else None, reference=reference,
                    saved=before,
                )  # fmt: skip
            except CapacityError as error:
                self._sit_out(task, info, str(error))
                return
            except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
                if saved is None:
                    raise
                raise CheckpointError(f"it is not complete ({error})") from None
        if saved is not None:
            self.warnings = list(earlier["warnings"])  # what opening the task warned of is among them

        def more() -> Snapshot:
            state = self.learner.task_state()
            run = {"elapsed": time.perf_counter() - started, "warnings": self.warnings}
            return {f"learner/{k}": v for k, v in state.tensors.items()}, {"learner": state.values, "run": run}

        keeper = Keeper(
            self.checkpoints, identity, minutes=training.checkpoint_minutes, steps=training.checkpoint_steps,
            more=more, tell=self.progress.line, saved=saved,
        )  # fmt: skip
        try:
            log = self._train(model, objective, training, seed, task, keeper)
            info["seconds"] = {"training": round(log.seconds, 3)}
            info |= {"epochs": log.epochs, "best_epoch": log.best_epoch, "data_wait": log.data_wait}
            tensors = {}
            if objective.head is not None:
                tensors["head"] = objective.head.detach().float()
        except BaseException:
            self.learner.abort_task()
            raise
        self.progress.phase("protecting")
        info["seconds"]["statistics"] = round(time.perf_counter() - started - log.seconds, 3)
        with self._noting_warnings():
            record = self.learner.finish_task(tensors=tensors, info=info)
        if record is None:
            info["undone"] = True
            self._sit_out(task, info, f"task {task.name!r} was undone by `accept`")
            return
        record.info["seconds"]["statistics"] = round(time.perf_counter() - started - log.seconds, 3)

    def _train(
        self, model: nn.Module, objective: Any, training: TrainingConfig, seed: int, task: Any, keeper: Keeper
    ) -> Any:
        kind, sets = self.setup.kind, self.setup.sets
        batches: Batches = kind.batches(objective, sets[task.name].train, training, seed)
        if self._joint:
            parts = [kind.batches(kind.objective(t), sets[t.name].train, training, seed) for t in self.setup.tasks]
            batches = MixedBatches(parts, seed=seed)
        with objective.training():
            return train_task(
                model, objective, batches, training, hooks=self.learner, progress=self.progress,
                on_epoch=lambda entry: self._event({"event": "epoch", "task": task.name, **entry}),
                selection=None if self._joint else self._selection(task, objective), keeper=keeper, warn=self._warning,
            )  # fmt: skip

    def _sit_out(self, task: Any, info: dict[str, Any], why: str) -> None:
        self._warning(why)
        self.learner.sit_out(task.name, {**info, "not_learned": why})
