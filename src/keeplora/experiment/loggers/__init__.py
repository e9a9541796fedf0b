"""A run's curves in other people's dashboards: TensorBoard, Weights & Biases, MLflow, trackio.

A logger never decides anything: metrics.jsonl and results.json are the record, and a logger that fails while the run is
on is switched off with one line of warning. A logger that is asked for and not installed is refused before the run.

A backend is one module here with a class that fits `RunLogger`, and one line in `LOGGERS`. A run's x-axis counts epochs
through the whole sequence: task 2's first epoch follows task 1's last.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from keeplora.errors import ConfigError, did_you_mean
from keeplora.experiment.run_directory import RunDirectory

__all__ = ["LOGGERS", "Loggers", "RunLogger", "check_loggers"]


class RunLogger(Protocol):
    """Where the numbers of one run go."""

    def start(self, config: Mapping[str, Any], folder: Path, name: str, project: str, resumed_at: int | None) -> None:
        """Begin, or go on.

        ``config``: what `ExperimentConfig.resolved` returns. ``folder``: RUN/loggers/NAME, which exists. ``name``,
        ``project``: the run's, and what it belongs to. ``resumed_at``: None for a new run; else the step from which on
        everything is told again.
        """
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one moment, all finite. ``step``: epochs of all tasks so far, never less than at the call before."""
        ...

    def finish(self, status: str) -> None:
        """End. ``status``: "finished", "failed" or "interrupted"."""
        ...


class Backend(NamedTuple):
    """A logger's module in this package (its class is called ``Logger``) and what has to be installed for it.

    ``needs`` maps importable names to the package that brings each.
    """

    module: str
    needs: Mapping[str, str]


LOGGERS: dict[str, Backend] = {
    "tensorboard": Backend("tensorboard", {"tensorboard": "tensorboard"}),
    "wandb": Backend("wandb", {"wandb": "wandb"}),
    # mlflow-skinny lacks the last two, which mlflow's own database needs.
    "mlflow": Backend("mlflow", {"mlflow": "mlflow", "sqlalchemy": "sqlalchemy", "alembic": "alembic"}),
    "trackio": Backend("trackio", {"trackio": "trackio"}),
}


def _installed(module: str) -> bool:
    # A folder of that name in the current one (wandb leaves such) is found too, as a namespace without a file.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_loggers(names: Sequence[str]) -> None:
    """Refuse what cannot log, before a run begins.

    Raises
    ------
    ConfigError
        An unknown name, one given twice, or a logger that is not installed: the sentence has the pip command.

    Examples
    --------
    >>> check_loggers([])
    >>> check_loggers(["tensorbord"])
    Traceback (most recent call last):
    ...
    keeplora.errors.ConfigError: loggers: unknown name 'tensorbord'; did you mean 'tensorboard'? (one of: mlflow, ...)
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"loggers: unknown name {name!r}{did_you_mean(name, LOGGERS)}")
        if list(names).count(name) > 1:
            raise ConfigError(f"loggers: {name!r} is given twice; keep one")
        missing = [package for module, package in LOGGERS[name].needs.items() if not _installed(module)]
        if missing:
            packages = missing[:1] if missing[0] == name else missing  # the package of its own name brings the others
            raise ConfigError(
                f"loggers: {name} needs {' and '.join(packages)}, not installed here; run `pip install "
                f"{' '.join(packages)}`, or leave {name} out of `loggers:`"
            )


def _make(name: str) -> RunLogger:
    return importlib.import_module(f"{__name__}.{LOGGERS[name].module}").Logger()


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Timeline:
    """Events of metrics.jsonl as named numbers at steps. A row of accuracies becomes one moment."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._row: dict[str, float] = {}
        self._tasks: list[float] = []

    def moments(self, event: Mapping[str, Any]) -> list[tuple[dict[str, float], int]]:
        kind, found = event.get("event"), []
        if kind == "evaluation":
            probe = event["kind"] == "probe"
            if _finite(event["accuracy"]):
                self._row[f"{'probe' if probe else 'accuracy'}/{event['set']}"] = event["accuracy"]
                self._tasks += [] if probe else [event["accuracy"]]
            return []
        found += self.rest()
        if kind == "epoch":
            self.step += 1
            values = {f"{key}/{event['task']}": event.get(key) for key in _EPOCH_KEYS} | {"lr": event.get("lr")}
            found.append(({key: value for key, value in values.items() if _finite(value)}, self.step))
        elif kind == "task_finished":
            values = {f"seconds/{key}": value for key, value in event["seconds"].items() if _finite(value)}
            found.append((values, self.step))
        return found

    def rest(self) -> list[tuple[dict[str, float], int]]:
        """The row of accuracies that is not told yet, with its mean over all tasks."""
        row, tasks = self._row, self._tasks
        self._row, self._tasks = {}, []
        mean = {"metrics/last": sum(tasks) / len(tasks)} if tasks else {}
        return [({**row, **mean}, self.step)] if row else []


_EPOCH_KEYS = ("loss", "penalty", "train_accuracy", "validation_accuracy", "data_wait")


def _names(config: Mapping[str, Any], run_dir: Path) -> tuple[str, str]:
    """(project, name): a suite's runs belong together; a run is called as its folder is, with its method."""
    suite = config.get("suite")
    project = config.get("name") or (Path(suite).stem if suite else "experiment")
    folder, method = run_dir.resolve().name, str(config.get("method"))
    return str(project), folder if method in folder else f"{method}-{folder}"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class Loggers:
    """All loggers of a run. None of them can fail it.

    Examples
    --------
    >>> loggers = Loggers.open([], {"method": "lora"}, ".", resumed=False)
    >>> loggers.event({"event": "epoch", "task": "pets", "epoch": 1, "loss": 0.5})
    >>> loggers.close("finished")
    """

    def __init__(self, active: dict[str, RunLogger], step: int, warn: Callable[[str], None]) -> None:
        self._active = active
        self._timeline = _Timeline(step)
        self._warn = warn

    @classmethod
    def open(
        cls, names: Sequence[str], config: Mapping[str, Any], run_dir: str | Path, resumed: bool,
        *, warn: Callable[[str], None] = _warn,
    ) -> Loggers:  # fmt: skip
        """Start every logger in ``names``.

        ``resumed``: the run goes on; metrics.jsonl must have been cut to what is kept, for it tells how many epochs there
        were. ``warn`` gets one line for each logger that fails, now or later.
        """
        check_loggers(names)
        run_dir = Path(run_dir)
        events = RunDirectory(run_dir).read_events() if names and resumed else []
        step = sum(event.get("event") == "epoch" for event in events)
        loggers = cls({}, step, warn)
        project, name = _names(config, run_dir)
        for kind in names:
            folder = run_dir / "loggers" / kind

            def start(kind: str = kind, folder: Path = folder) -> None:
                folder.mkdir(parents=True, exist_ok=True)
                logger = _make(kind)
                logger.start(config, folder, name, project, step if resumed else None)
                loggers._active[kind] = logger

            loggers._guarded(kind, start)
        return loggers

    def _guarded(self, kind: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # whatever it is (a network, a full disk, their bug), the run goes on
            self._active.pop(kind, None)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._warn(f"the {kind} logger failed and is switched off, the run goes on without it: {reason}")

    def _log(self, values: dict[str, float], step: int) -> None:
        for kind, logger in list(self._active.items()):
            if values:
                self._guarded(kind, lambda logger=logger: logger.log(values, step))

    def event(self, event: Mapping[str, Any]) -> None:
        """One event as it goes into metrics.jsonl (docs/formats.md)."""
        for values, step in self._timeline.moments(event):
            self._log(values, step)

    def close(self, status: str) -> None:
        """The run has ended: "finished", "failed" or "interrupted". A second call does nothing."""
        for values, step in self._timeline.rest():
            self._log(values, step)
        for kind, logger in list(self._active.items()):
            self._guarded(kind, lambda logger=logger: logger.finish(status))
        self._active.clear()
