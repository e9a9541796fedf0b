"""Hyper-parameters by validation pictures alone: the same number of trials for every method on the first tasks.

A trial is one run of the first k tasks on which held-out training pictures take the place of the test pictures; no test
picture and no probe is looked at. The criterion is `CRITERION`, fixed: the mean of the k × k matrix of validation
accuracies (rows 1 to k), so that learning, keeping and transfer weigh in. On a tie the smaller learning rate wins.

Each trial is a process of its own with a run directory, OUTPUT/METHOD/trial-NN; optuna's database holds what was
proposed and told. After a kill the same call goes on: trials that have ended are read back, the others are resumed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.experiment.progress import duration
from keeplora.experiment.run_directory import FolderLock, RunDirectory
from keeplora.files import atomic_write_text
from keeplora.study.execute import POLL, drop_ledger, end_gently, last_lines, terminate_as_interrupt
from keeplora.study.resources import Slots, cores, slots
from keeplora.study.search import LEARNING_RATE, Axis, Searcher, Trial
from keeplora.study.store import is_being_written
from keeplora.study.tune_plan import CRITERION, TunePlan, join, refuse_strangers
from keeplora.yaml_text import dump_yaml

DATABASE = "optuna.db"
_STOPPED = {signal.SIGINT, signal.SIGTERM}


@dataclass
class Outcome:
    """A search: its trials by method, and what they belong to (tune.json)."""

    folder: Path
    record: dict[str, Any]
    spaces: dict[str, list[Axis]]
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    def best(self, method: str) -> Trial | None:
        """The finished trial with the largest criterion; on a tie the smaller learning rate; None if all failed."""
        done = [(t, t.criterion) for t in self.trials[method] if t.criterion is not None]
        first = self.spaces[method][0].key
        return max(done, key=lambda e: (e[1], -float(_rate(e[0], first)), -e[0].number))[0] if done else None


def _rate(trial: Trial, first: str) -> float:
    value = trial.settings.get(LEARNING_RATE, trial.settings[first])
    return value if isinstance(value, int | float) else 0.0


def require_optuna() -> None:
    """One sentence with the command where optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise KeepLoraError(
            "keeplora tune needs optuna, not installed here; run `pip install 'keeplora[tune]'`"
        ) from None


def tune(plan: TunePlan, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run the trials that are missing; returns all of them. ``say`` gets one line for each trial that ends.

    Raises
    ------
    KeepLoraError
        optuna is missing, the folder holds another search, or a method's first trial could not even begin.
    KeyboardInterrupt
        After the trials under way were interrupted; the same call goes on with them.

    Examples
    --------
    >>> outcome = tune(TunePlan({"suite": "demo-small"}, ("lora",), Path("runs/tune-demo")))   # doctest: +SKIP
    >>> outcome.best("lora").settings                                                          # doctest: +SKIP
    {'training.learning_rate': 0.00316}
    """
    require_optuna()
    spaces = plan.spaces()
    for method in plan.methods:  # what cannot run is told before anything is written
        for share in (0.0, 0.999):
            plan.config(method, {axis.key: axis.at(share) for axis in spaces[method]}, None)
    refuse_strangers(plan.output)
    with _locked(plan.output):
        record = join(plan, spaces)
        outcome = Outcome(plan.output, record, spaces)
        _Search(plan, outcome, _room(plan, record["threads"]), say).run()
    return outcome


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _room(plan: TunePlan, threads: int) -> Slots:
    """How many trials at once: what is asked for, else one per GPU, else as many as cores and memory allow."""
    cells = plan.trials * len(plan.methods)
    room = slots(cells, jobs=plan.jobs, threads=threads, settings=plan.overrides)
    if plan.jobs is None and not room.gpus:
        room = room._replace(jobs=max(1, min(room.jobs, cores() // threads)))
    return room


@dataclass
class _Job:
    trial: Trial
    process: subprocess.Popen[bytes] | None  # None: a run that outlived the search which started it
    gpu: str | None
    started: float


class _Search:
    """The trials of one call, trials outermost: what is there when a search stops is the same number of each method."""

    def __init__(self, plan: TunePlan, outcome: Outcome, room: Slots, say: Callable[[str], None]) -> None:
        self.plan, self.outcome, self.room, self.say = plan, outcome, room, say
        record = outcome.record
        self.searchers = {
            name: Searcher(plan.output / DATABASE, name, outcome.spaces[name], record["design"], plan.seed)
            for name in plan.methods
        }
        self.running: list[_Job] = []

    def run(self) -> None:
        with terminate_as_interrupt():
            try:
                for searcher in self.searchers.values():
                    for trial in searcher.trials():
                        if trial.state == "running":  # begun by a call that was stopped
                            self._start_when_free(trial)
                while (trial := self._next()) is not None or self.running:
                    if trial is not None:
                        self._start_when_free(trial)
                    else:
                        self._wait()
            except BaseException:
                self._interrupt()
                raise
            finally:
                self.outcome.trials = {name: searcher.trials() for name, searcher in self.searchers.items()}

    def _next(self) -> Trial | None:
        """A trial of the method that has fewest; None where all are begun, or wait for others."""
        fewest = sorted(self.searchers.values(), key=lambda s: len(s.trials()))
        for searcher in fewest:
            if len(searcher.trials()) < self.plan.trials and (trial := searcher.ask()) is not None:
                return trial
        return None

    def _start_when_free(self, trial: Trial) -> None:
        while len(self.running) >= self.room.jobs:
            self._wait()
        folder = self.plan.output / trial.folder
        gpu = None
        if folder.is_dir() and is_being_written(folder):
            self.running.append(_Job(trial, None, None, time.monotonic()))
            return
        state = RunDirectory(folder).read_status().get("state") if folder.is_dir() else None
        if state in ("finished", "failed"):  # it ended, and the search was killed before it took note
            self._ended(_Job(trial, None, None, time.monotonic()))
            return
        if (folder / "config.yaml").is_file():
            words = ["resume", str(folder), "--quiet"]
        else:
            config = self.plan.config(trial.method, trial.settings, self.outcome.record["threads"])
            file = folder.with_suffix(".yaml")
            atomic_write_text(file, dump_yaml({**config.resolved(), "output": None}))
            words = ["run", str(file), "--output", str(folder), "--quiet"]
        if self.room.gpus:
            gpu = min(self.room.gpus, key=[job.gpu for job in self.running].count)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.outcome.record["threads"])}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        # A file and no pipe: a run that outlives this process must be able to go on writing.
        with open(folder.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "keeplora", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.running.append(_Job(trial, process, gpu, time.monotonic()))

    def _wait(self) -> None:
        """Until at least one trial has ended."""
        while True:
            for job in list(self.running):
                folder = self.plan.output / job.trial.folder
                if (job.process is None and not is_being_written(folder)) or (
                    job.process is not None and job.process.poll() is not None
                ):
                    self.running.remove(job)
                    self._ended(job)
                    return
            time.sleep(POLL)

    def _ended(self, job: _Job) -> None:
        folder = self.plan.output / job.trial.folder
        status = RunDirectory(folder).read_status() if folder.is_dir() else {}
        state, code = status.get("state"), job.process.returncode if job.process is not None else None
        if state == "finished":
            self._tell(job.trial, *read_criterion(folder, self.plan.tasks), status.get("seconds"))
            drop_ledger(folder)  # nobody needs a trial's weights
            return
        if state == "failed" and (code is None or code > 0):
            self._tell(job.trial, None, str(status.get("error")), status.get("seconds"))
            return
        if job.process is None:  # an earlier search's run that stopped half-way: it is ours to go on with
            self._start_when_free(job.trial)
            return
        reason = last_lines(folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace"), 1)
        if code is not None and (code in (130, 143) or -code in _STOPPED):
            raise KeepLoraError(f"{folder} was stopped from outside; repeat the same command to go on")
        if code is not None and code < 0:
            reason = f"ended by {signal.Signals(-code).name} (often: out of memory; give fewer --jobs)"
        elif not any(t.state == "finished" for t in self.searchers[job.trial.method].trials()) and not status:
            # The model, the data or a key is missing: every other trial would end the same way.
            raise KeepLoraError(f"{job.trial.method} could not begin: {reason.removeprefix('Error: ')}")
        self._tell(job.trial, None, reason, status.get("seconds"))

    def _tell(self, trial: Trial, criterion: float | None, error: str, seconds: float | None) -> None:
        searcher = self.searchers[trial.method]
        searcher.tell(trial.number, criterion, seconds, error)
        told = f"{criterion:.1f}" if criterion is not None else f"failed ({error})"
        place = f"{trial.method} {trial.number + 1}/{self.plan.trials}"
        values = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in trial.settings.items())
        self.say(f"{place}: {values}: {told}, {duration(seconds or 0.0)}")

    def _interrupt(self) -> None:
        """Let the trials under way write their state; a second Ctrl-C ends them at once."""
        end_gently([job.process for job in self.running if job.process is not None])


def read_criterion(folder: Path, tasks: int) -> tuple[float | None, str]:
    """(criterion of a finished trial, "") or (None, why there is none)."""
    results = RunDirectory(folder).read_results() or {}
    if results.get("evaluate_on") != "validation" or len(results.get("accuracy", [])) != tasks + 1:
        return None, "its results are not those of a trial on validation pictures"
    value = results["metrics"][CRITERION]
    return (value, "") if value is not None else (None, "an accuracy is missing")
