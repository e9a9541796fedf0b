"""Further tasks for a run that has learned all it had: which they are, and the run's configuration with them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.config_source import own_tasks
from keeplora.experiment.resuming import CHANGEABLE, is_changeable
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import data_folder
from keeplora.files import expand
from keeplora.methods import Method, get_method, method_names
from keeplora.suites import external_folder

Tasks = str | os.PathLike[str] | Mapping[str, Any]
"""A YAML file with ``tasks:`` (an experiment, a suite, or nothing but them), or what it holds."""

_PER_TASK = ("training.epochs.", "training.learning_rate.", "validation.")


def with_tasks(config: ExperimentConfig, source: Tasks, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration of a run with the tasks of ``source`` that it does not have after its own.

    The run is no longer one of its suite, if it had one: its tasks stand in the configuration from then on. Of the file the
    new tasks' own entries under `training.epochs`, `training.learning_rate` and `validation` are read, and nothing else.

    Args:
        overrides: by dotted key, over the file; beside what any resume may change, such entries: "training.epochs.TASK".

    Raises:
        ConfigError: there is no further task; one that is learned is described in another way; the method learns all its
            tasks at once; an override that a resume may not make.
    """
    method = get_method(config.method)
    if method.learner.schedule == "joint":
        raise ConfigError(
            f"method {method.name!r} learns all tasks of a run at once, so none can be added; start a new run with all of them"
        )
    given, base = own_tasks(source), data_folder(config)
    folder = given.base or external_folder(config.data_dir)
    learned = {spec["name"]: spec for spec in config.ordered_tasks}
    for spec in given.specs:
        if spec["name"] in learned:
            _refuse_another(_placed(spec, folder), _placed(learned[spec["name"]], base), given.where)
    new = [spec for spec in given.specs if spec["name"] not in learned]
    names = [spec["name"] for spec in new]
    if not new:
        raise ConfigError(
            f"{given.where}: every task of it is learned already ({', '.join(learned)}); list the further ones under `tasks:`"
        )
    _check_changes(overrides, names)
    rest = [spec for spec in config.tasks if spec["name"] not in learned and spec["name"] not in names]
    moved = config.suite is not None

    def own(spec: dict[str, Any]) -> dict[str, Any]:
        return _placed(spec, base) if moved else spec

    order = [*learned, *names, *(spec["name"] for spec in rest)]
    values = config.resolved() | {
        "suite": None, "name": config.label, "order": order, "order_name": None,
        "tasks": [
            *map(own, (*learned.values(), *rest)), *(_placed(s, folder) if moved or folder != base else s for s in new)
        ],
        "probes": [own(spec) for spec in config.probes], "first_tasks": len(order) - len(rest) if rest else None,
        "reference": own(config.reference) if config.reference is not None else None,
    }  # fmt: skip
    try:
        return load_config(values, {**_of_file(given.values, names), **overrides}, known_methods=method_names())
    except ConfigError as error:
        if not any(repr(name) in str(error) for name in names):
            raise
        raise ConfigError(
            f"{given.where}: {error} (a task that is added has settings of its own: -o training.epochs.{names[0]}=3, or "
            "`validation: 0.1` in its entry)"
        ) from None


def _placed(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task with its relative paths starting at ``folder``, whatever the configuration's do."""
    own = spec.get("base_dir")
    return {**spec, "base_dir": str(folder / expand(own) if isinstance(own, str) else folder)}


def _of_file(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings that a file gives the new tasks by their names, by dotted key."""
    training = values.get("training")
    training = training if isinstance(training, Mapping) else {}
    given = {
        "training.epochs": training.get("epochs"), "training.learning_rate": training.get("learning_rate"),
        "validation": values.get("validation"),
    }  # fmt: skip
    return {
        f"{key}.{name}": of_tasks[name]
        for key, of_tasks in given.items() if isinstance(of_tasks, Mapping)
        for name in names if name in of_tasks
    }  # fmt: skip


def _refuse_another(spec: Mapping[str, Any], learned: Mapping[str, Any], where: str) -> None:
    """The same name for something else would be passed over without a word; keys that the file leaves out are not compared."""
    for key in spec:
        if key not in learned or spec[key] != learned[key]:
            what = f"paths that start at {spec[key]}" if key == "base_dir" else f"`{key}: {spec[key]!r}`"
            was = "without it"
            if key in learned:
                was = f"with {learned[key] if key == 'base_dir' else repr(learned[key])}"
            raise ConfigError(
                f"{where}: task {spec['name']!r} has {what}, but was learned {was}; a task that is learned stays as it "
                "is: give the new one another name, or leave it out"
            )


def _check_changes(overrides: Mapping[str, Any], new: Sequence[str]) -> None:
    allowed = {f"{field}{name}" for field in _PER_TASK for name in new}
    for key in overrides:
        if key not in (*allowed, "output") and not is_changeable(key):
            raise ConfigError(
                f"-o {key}: a run keeps its settings for all its tasks; beside {', '.join(sorted(CHANGEABLE))}, only the new "
                f"tasks' own can be given, for example -o training.epochs.{new[0]}=5"
            )


def check_ready(directory: RunDirectory) -> None:
    """Refuse a run that has tasks of its own left, or whose files would stop it half-way: what it has learned is told there.

    Raises:
        KeepLoraError: it is not finished; results.json or metrics.jsonl is damaged or missing.
    """
    status, name = directory.read_status(), shlex.quote(str(directory.path))
    if status.get("state") != "finished":
        raise KeepLoraError(
            f"{directory.path} is not finished ({status.get('state')}, {status.get('tasks_done')} tasks done): "
            f"`keeplora resume {name}` first, and add tasks then"
        )
    if directory.read_results(whole=True) is None:
        raise KeepLoraError(
            f"{directory.results_path} is missing: `keeplora resume {name}` makes it again; add tasks then"
        )
    directory.read_events()


def told(config: ExperimentConfig, method: Method, before: int, now: int) -> list[str]:
    """What somebody who compares the run with one that had all its tasks from the start must know."""
    if "tasks" not in {f.name for f in fields(method.learner.Options)} or "tasks" in config.tuner.options:
        return []
    return [
        f"{method.title} lays a threshold out over all tasks of a run: it was laid out over {before} tasks when they were "
        f"learned, and is over {now} from here on"
    ]
