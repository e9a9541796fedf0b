"""The folder of one run: who may write to it, and files that a crash leaves whole.

Layout: config.yaml, environment.json, data.json, status.json, metrics.jsonl, results.json, ledger/, report.html.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from keeplora.errors import ConfigError, KeepLoraError, reason
from keeplora.experiment.config_source import own_tasks
from keeplora.experiment.event_log import EventLog, finite
from keeplora.experiment.folder_lock import FolderLock
from keeplora.files import (
    atomic_write_json,
    atomic_write_text,
    expand,
    sweep,
)
from keeplora.json_text import read_object
from keeplora.report.run_files import check_shape, remedy
from keeplora.retired import without_retired
from keeplora.transfer import refuse_address
from keeplora.yaml_text import dump_yaml, read_yaml

FORMAT = "keeplora-run"
VERSION = 0
STATES = ("running", "finished", "failed", "interrupted")

_ANOTHER = "choose another --output (`output:` in the file)"
_OF_A_RESUME = ("accuracy", "probe_accuracy", "tasks_info", "warnings")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_json(path: Path) -> Any:
    value = read_object(path, remedy(path))
    if value is not None:
        check_shape(value, path.name, path)
    return value


def holds_out(config: Mapping[str, Any]) -> bool:
    """Whether a share of some data is held out, by a configuration as a mapping."""
    given = config.get("validation")
    shares = [given, *(given.values() if isinstance(given, dict) else ())]
    shares += [spec.get("validation") for spec in config.get("tasks") or () if isinstance(spec, dict)]
    return config.get("accept") is not None or any(isinstance(share, float) for share in shares)


class RunDirectory:
    """The folder of one run, locked against other writers until `close`; use it in a ``with`` block.

    Open one with `create` (a new run) or `open_existing` (resume); reading needs no lock: ``RunDirectory(path)``.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with RunDirectory.create(folder) as run:
    ...     run.write_config({"method": "lora"})
    ...     run.append_event({"event": "task_finished", "task": "pets"})
    ...     run.set_status(state="finished", tasks_done=1)
    >>> RunDirectory(folder).read_status()["state"], len(RunDirectory(folder).read_events())
    ('finished', 1)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = expand(path)
        self._lock: FolderLock | None = None
        self.warning: str | None = None  # what the one who writes must know of the folder
        self._opened = time.monotonic()
        self._earlier_seconds = 0.0

    config_path = property(lambda self: self.path / "config.yaml")
    environment_path = property(lambda self: self.path / "environment.json")
    data_path = property(lambda self: self.path / "data.json")
    status_path = property(lambda self: self.path / "status.json")
    metrics_path = property(lambda self: self.path / "metrics.jsonl")
    results_path = property(lambda self: self.path / "results.json")
    report_path = property(lambda self: self.path / "report.html")
    ledger_path = property(lambda self: self.path / "ledger")

    @classmethod
    def check_new(cls, path: str | os.PathLike[str]) -> None:
        """Refuse what `create` would, as far as can be told without making or locking anything."""
        refuse_address(path, "a run directory")
        run = cls(path)
        try:
            if run.path.is_dir():
                run._refuse_contents()
            elif run.path.exists():
                raise KeepLoraError(f"{run.path} is a file; {_ANOTHER}")
        except OSError as error:
            raise KeepLoraError(f"{run.path} cannot be made: {reason(error)}; {_ANOTHER}") from None

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Make the folder (or take an empty one), lock it, and write its first status.

        Raises
        ------
        KeepLoraError
            The folder holds a run or other files, is a file, cannot be made, or another process writes to it.
        """
        cls.check_new(path)  # before locking, so that no lock file appears in a folder of someone else's
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KeepLoraError(f"{run.path} cannot be made: {reason(error)}; {_ANOTHER}") from None
        run._acquire()
        try:
            run._refuse_contents()  # again, now that nobody else can fill it
            sweep(run.path)
            atomic_write_json(
                run.status_path,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "state": "running",
                    "tasks_done": 0,
                    "error": None,
                    "started": _now(),
                    "updated": _now(),
                    "seconds": 0.0,
                },
            )
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open_existing(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Lock the folder of an earlier run, to go on with it.

        Raises
        ------
        KeepLoraError
            No such folder, no run in it, a run that stopped before it began, a later format, or another writer.
        """
        refuse_address(path, "a run directory")
        run = cls(path)
        if not run.path.is_dir():
            raise KeepLoraError(f"no such run directory: {run.path}")
        status = run.read_status()
        if not run.config_path.is_file():
            if status:
                hint = "the run stopped before it began; start it again with `keeplora run`"
            else:
                hint = "is it the folder that `keeplora run` printed?"
            raise KeepLoraError(f"{run.path} holds no config.yaml: {hint}")
        run._acquire()
        try:
            sweep(run.path)
        except BaseException:
            run.close()
            raise
        run._earlier_seconds = float(status.get("seconds") or 0.0)
        return run

    def _acquire(self) -> None:
        lock = FolderLock(self.path)
        try:
            lock.acquire()
        except OSError as error:
            raise KeepLoraError(f"{self.path} cannot be written to: {reason(error)}") from None
        self._lock = lock
        self.warning = lock.warning

    def _refuse_contents(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if self.config_path.is_file() and self.status_path.is_file():
            status = self.read_status()
            n = status["tasks_done"]
            name = shlex.quote(str(self.path))
            to_do = (
                f"see it by `keeplora report {name}`, use it by `keeplora predict {name}`, teach it further tasks by `keeplora "
                f"resume {name} --add-tasks FILE`"
                if status["state"] == "finished"
                else f"go on with it by `keeplora resume {name}`"
            )
            raise KeepLoraError(
                f"{self.path} already holds a run ({status['state']}, {n} {'task' if n == 1 else 'tasks'} done); {to_do}, or "
                f"{_ANOTHER}"
            )
        if names == ["status.json"] and self.read_status():
            return  # a run that was killed before it wrote its configuration: nothing is lost
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise KeepLoraError(
                f"{self.path} is not empty ({shown}) and not a run of keeplora; choose a new or empty folder as "
                "--output (`output:`)"
            )

    def close(self) -> None:
        """Let other processes write; calling it twice does no harm."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writable(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is open for reading; use RunDirectory.create or open_existing to write")

    # --- configuration, environment, data ---

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml: ``ExperimentConfig.resolved()``."""
        self._writable()
        atomic_write_text(self.config_path, dump_yaml(dict(config)))

    def read_config(self) -> dict[str, Any]:
        """config.yaml as the mapping that was written."""
        value, _ = read_yaml(self.config_path)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.config_path} is damaged: it holds no mapping")
        if isinstance(tuner := value.get("tuner"), dict):
            value["tuner"] = without_retired(tuner)
        if holds_out(value):  # by the run's own seed, before there was one for it
            value.setdefault("validation_seed", value.get("seed", 0))
        return self._without_later(value)

    def _without_later(self, config: dict[str, Any]) -> dict[str, Any]:
        """For a run of a person's own suite, whose file may have got further tasks since: those are not this run's."""
        suite = config.get("suite")
        if not isinstance(suite, str) or not suite.endswith((".yaml", ".yml")):
            return config
        try:
            names = [str(spec["name"]) for spec in own_tasks(suite).specs]
        except KeepLoraError:  # whoever needs the tasks will be told
            return config
        learned = [entry["name"] for entry in self.read_data() if entry.get("kind") == "task"]
        given = config["order"] if isinstance(config.get("order"), list) else names
        if not learned or not set(learned) <= set(names):
            return config
        if set(names) <= set(given) and given[: config.get("first_tasks")] == learned:
            return config  # as it was
        return {**config, "order": [*learned, *(n for n in names if n not in learned)], "first_tasks": len(learned)}

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json: what `collect_environment` returns."""
        self._writable()
        atomic_write_json(self.environment_path, dict(environment))

    def write_data(self, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Write data.json: one entry per task and probe (name, kind, classes, sizes, fingerprint, licence, warnings)."""
        self._writable()
        atomic_write_json(self.data_path, {"tasks": [dict(task) for task in tasks]})

    def read_data(self) -> list[dict[str, Any]]:
        """The entries of data.json; empty where it is not written yet."""
        return (_read_json(self.data_path) or {}).get("tasks") or []

    # --- status and results ---

    def read_status(self) -> dict[str, Any]:
        """status.json; empty where there is none.

        Raises
        ------
        KeepLoraError
            It is damaged, not keeplora's, or of a later version.
        """
        status = _read_json(self.status_path)
        if status is None:
            return {}
        if status.get("format") != FORMAT:
            raise KeepLoraError(f"{self.status_path} is not a run's status: its format is not {FORMAT!r}")
        if status.get("version") != VERSION:
            raise KeepLoraError(
                f"{self.path} was written in version {status.get('version')} of the run format, this keeplora knows "
                f"{VERSION}; use the keeplora that made it (see environment.json)"
            )
        return status

    def set_status(self, **changes: Any) -> None:
        """Change fields of status.json (state, tasks_done, error); updated and seconds are kept by themselves.

        ``seconds`` counts the time that the run was open, over all its resumes.
        """
        self._writable()
        if "state" in changes and changes["state"] not in STATES:
            raise ValueError(f"state is {changes['state']!r}, but must be one of {', '.join(STATES)}")
        seconds = round(self._earlier_seconds + time.monotonic() - self._opened, 3)
        started = {"format": FORMAT, "version": VERSION, "started": _now(), "tasks_done": 0, "error": None}
        status = {**started, **self.read_status(), **changes, "updated": _now(), "seconds": seconds}
        atomic_write_json(self.status_path, finite(status))

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """A block of work on the run: if it does not end well, status.json says by what, and an interruption how to go on."""
        try:
            yield
        except KeyboardInterrupt as stopped:
            stopped.add_note(f"go on with `keeplora resume {shlex.quote(str(self.path))}`")
            self._leave("interrupted", "interrupted; go on with `keeplora resume`")
            raise
        except BaseException as error:
            self._leave("failed", f"{type(error).__name__}: {error}")
            raise

    def _leave(self, state: str, error: str) -> None:
        with contextlib.suppress(OSError):  # on a full disk, what stopped the run matters more than that this fails too
            self.set_status(state=state, error=error)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json; a value that is not finite becomes null."""
        self._writable()
        atomic_write_json(self.results_path, finite(results))

    def read_results(self, *, whole: bool = False) -> dict[str, Any] | None:
        """results.json, or None where it is not written yet; ``whole``: refused where what a resume goes on from is missing."""
        found = _read_json(self.results_path)
        if whole and found is not None and (missing := [k for k in _OF_A_RESUME if not isinstance(found.get(k), list)]):
            raise KeepLoraError(
                f"{self.results_path} has no {missing[0]!r}: the file was changed; restore it from a copy"
            )
        return found

    # --- events ---

    @property
    def _log(self) -> EventLog:
        return EventLog(self.metrics_path)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """`EventLog.append` to metrics.jsonl."""
        self._writable()
        self._log.append(event)

    def read_events(self) -> list[dict[str, Any]]:
        """`EventLog.read` of metrics.jsonl."""
        return self._log.read()

    def cut_events(self, tasks_done: int) -> None:
        """`EventLog.cut` of metrics.jsonl, for a resume that repeats what followed the last finished task."""
        self._writable()
        self._log.cut(tasks_done)

    def replace_evaluations(self, events: Sequence[Mapping[str, Any]]) -> None:
        """`EventLog.replace_evaluations` in metrics.jsonl."""
        self._writable()
        self._log.replace_evaluations(events)
