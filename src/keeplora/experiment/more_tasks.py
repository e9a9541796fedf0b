"""Further tasks for a run that has learned all it had: which they are, and the run's configuration with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.config_source import own_tasks
from keeplora.experiment.resuming import CHANGEABLE
from keeplora.experiment.setup import data_folder
from keeplora.methods import Method, get_method

Tasks = str | os.PathLike[str] | Mapping[str, Any]
"""A YAML file with ``tasks:`` (an experiment, a suite, or nothing but them), or what it holds."""

_PER_TASK = ("training.epochs.", "training.learning_rate.", "validation.")


def with_tasks(config: ExperimentConfig, source: Tasks, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run with the tasks of ``source`` that it does not have after its own, for `load_config`.

    The run is no longer one of its suite, if it had one: its tasks stand in the configuration from then on.

    Args:
        overrides: by dotted key; beside what any resume may change, the new tasks' own entries, "training.epochs.TASK".

    Raises:
        ConfigError: there is no further task; one that is learned is described in another way; the method learns all its
            tasks at once; an override that a resume may not make.
    """
    method = get_method(config.method)
    if method.learner.schedule == "joint":
        raise ConfigError(
            f"method {method.name!r} learns all tasks of a run at once, so none can be added; start a new run with all of them"
        )
    given, folder, where = own_tasks(source)
    learned = {spec["name"]: spec for spec in config.ordered_tasks}
    for spec in given:
        _refuse_another(spec, learned.get(spec["name"], {}), where)
    new = [spec for spec in given if spec["name"] not in learned]
    if not new:
        raise ConfigError(
            f"{where}: every task of it is learned already ({', '.join(learned)}); list the further ones under `tasks:`"
        )
    _check_changes(overrides, [spec["name"] for spec in new])
    base = data_folder(config)
    own = {"base_dir": str(base)} if config.suite is not None else {}
    theirs = {"base_dir": str(folder)} if config.suite is not None or folder != base else {}
    added = {spec["name"] for spec in new}
    rest = [spec for spec in config.tasks if spec["name"] not in learned and spec["name"] not in added]
    tasks = [*({**own, **spec} for spec in (*learned.values(), *rest)), *({**theirs, **spec} for spec in new)]
    order = [*learned, *(spec["name"] for spec in new), *(spec["name"] for spec in rest)]
    reference = {**own, **config.reference} if config.reference is not None else None
    return config.resolved() | {
        "suite": None, "name": config.label, "tasks": tasks, "order": order, "order_name": None, "reference": reference,
        "probes": [{**own, **spec} for spec in config.probes], "first_tasks": len(order) - len(rest) if rest else None,
    }  # fmt: skip


def _refuse_another(spec: Mapping[str, Any], learned: Mapping[str, Any], where: str) -> None:
    """The same name for something else would be passed over without a word."""
    for key in spec.keys() & learned.keys() - {"base_dir"}:
        if spec[key] != learned[key]:
            raise ConfigError(
                f"{where}: task {spec['name']!r} has `{key}: {spec[key]!r}`, but was learned with {learned[key]!r}; a task "
                "that is learned stays as it is: give the new one another name, or leave it out"
            )


def _check_changes(overrides: Mapping[str, Any], new: Sequence[str]) -> None:
    allowed = {f"{field}{name}" for field in _PER_TASK for name in new}
    for key in overrides:
        if key not in allowed and not any(key == known or key.startswith(f"{known}.") for known in CHANGEABLE):
            raise ConfigError(
                f"-o {key}: a run keeps its settings for all its tasks; beside {', '.join(sorted(CHANGEABLE))}, only the new "
                f"tasks' own can be given, for example -o training.epochs.{new[0]}=5"
            )


def check_finished(status: Mapping[str, Any], path: Path) -> None:
    """Refuse a run that has tasks of its own left: a checkpoint belongs to the tasks that were to be learned."""
    if status.get("state") != "finished":
        raise KeepLoraError(
            f"{path} is not finished ({status.get('state')}, {status.get('tasks_done')} tasks done): `keeplora resume {path}` "
            "first, and add tasks then"
        )


def told(method: Method, before: int, now: int) -> list[str]:
    """What somebody who compares the run with one that had all its tasks from the start must know."""
    if "tasks" not in {f.name for f in fields(method.learner.Options)}:
        return []
    return [
        f"{method.title} lays a threshold out over all tasks of a run: it was laid out over {before} tasks when they were "
        f"learned, and is over {now} from here on"
    ]
