"""What must hold between the keys of an experiment's configuration: names are known and told apart, held-out data is there."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

from keeplora.errors import did_you_mean
from keeplora.experiment.config_fields import DEFAULT_KEY

if TYPE_CHECKING:
    from keeplora.experiment.config_schema import ExperimentConfig


def config_problems(config: ExperimentConfig) -> list[tuple[str, str]]:
    """All of them: the key, and a sentence that goes on from it."""
    return [*_names(config), *_mappings(config), *_validation(config)]


def _names(config: ExperimentConfig) -> list[tuple[str, str]]:
    if not config.tasks:
        return [("tasks", "is empty; give at least one task")]
    problems, seen = [], {}
    for place, specs in (("tasks", config.tasks), ("probes", config.probes)):
        for index, spec in enumerate(specs):
            plain = unicodedata.normalize("NFC", spec["name"]).casefold()
            if plain in seen:
                problems.append((f"{place}.{index}", f"has the name {spec['name']!r}, which {seen[plain]} has already"))
            seen.setdefault(plain, f"{place}.{index}")
    if config.first_tasks is not None and config.first_tasks > len(config.tasks):
        problems.append(("first_tasks", f"is {config.first_tasks}, but there are {len(config.tasks)} tasks"))
    if config.candidates != "own" and config.variant == "cls":
        told = "needs `candidates: own`: its heads are chosen by the task, so it must be told which task it is"
        problems.append(("method", f"{config.method!r} {told}"))
    if config.order is not None:
        for name in dict.fromkeys(config.order):
            if name not in config.task_names:
                problems.append(("order", f"names an unknown task {name!r}{did_you_mean(name, config.task_names)}"))
            elif config.order.count(name) > 1:
                problems.append(("order", f"names task {name!r} more than once"))
        missing = [name for name in config.task_names if name not in config.order]
        if missing and not problems:
            problems.append(("order", f"leaves out {', '.join(map(repr, missing))}; name every task once"))
    return problems


def _mappings(config: ExperimentConfig) -> list[tuple[str, str]]:
    problems = []
    per_task = {"training.epochs": config.training.epochs, "training.learning_rate": config.training.learning_rate}
    for key, value in {**per_task, "validation": config.validation}.items():
        if not isinstance(value, Mapping):
            continue
        for name in value:
            if name not in (*config.task_names, DEFAULT_KEY):
                choices = [*config.task_names, DEFAULT_KEY]
                problems.append((f"{key}.{name}", f"names an unknown task {name!r}{did_you_mean(name, choices)}"))
        missing = [name for name in config.task_names if name not in value]
        if missing and DEFAULT_KEY not in value and key in per_task:
            hint = f"gives no value for task {missing[0]!r}; add it, or `{DEFAULT_KEY}:` for all others"
            problems.append((key, hint))
    return problems


def _validation(config: ExperimentConfig) -> list[tuple[str, str]]:
    missing = [spec["name"] for spec in config.ordered_tasks if config.validation_for(spec["name"]) is None]
    if not missing:
        return []
    decides = (
        ("evaluate_on", config.evaluate_on == "validation", "what is measured"),
        ("early_stopping", config.early_stopping is not None, "when training stops"),
        ("best_epoch", config.best_epoch, "which epoch is kept"),
        ("accept", config.accept is not None, "whether a task is kept"),
    )
    return [
        (
            key,
            f"needs validation data, and task {missing[0]!r} has none: test data may not decide {what}; "
            "add for example `validation: 0.1`",
        )
        for key, wanted, what in decides
        if wanted
    ]
