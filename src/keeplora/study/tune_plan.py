"""What `keeplora tune` searches, and tune.json: which two calls may share a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.config import ExperimentConfig, load_config, parse_overrides
from keeplora.files import atomic_write_json
from keeplora.json_text import read_object
from keeplora.methods import get_method, method_names
from keeplora.study.search import DESIGN, Axis, make_space, parse_ranges

CRITERION = "average"
"""The entry of a run's `metrics` that is maximised."""
VALIDATION = 0.25
"""Share of the training pictures that is held out where the experiment holds out none by itself."""
FORMAT, VERSION, FILE = "keeplora-tune", 0, "tune.json"
_OWN = {
    "method": "--methods", "seed": "--seed", "order": "--order", "output": "--output", "first_tasks": "--tasks",
    "validation": "--validation", "evaluate_on": "no such key: a search always measures validation pictures",
}  # fmt: skip


@dataclass(frozen=True)
class TunePlan:
    """What is searched. ``source``: an experiment's YAML file, or {"suite": NAME}; ``tasks``: how many, from the first."""

    source: str | Mapping[str, Any]
    methods: tuple[str, ...]
    output: Path
    tasks: int = 2
    trials: int = 6
    seed: int = 100
    order: str | None = None
    validation: float | None = None
    settings: Sequence[str] = ()
    ranges: Sequence[str] = ()
    jobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "trials"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        for name in self.methods:
            if not get_method(name).trains:
                raise ConfigError(f"{name} learns nothing, so there is nothing to tune; leave it out of --methods")
        for key in self.overrides:
            if key.split(".")[0] in _OWN:
                raise ConfigError(f"-o {key} is the search's own; use {_OWN[key.split('.')[0]]}")

    @property
    def overrides(self) -> dict[str, Any]:
        return parse_overrides(list(self.settings))

    def config(self, method: str, settings: Mapping[str, Any], threads: int | None) -> ExperimentConfig:
        """The configuration of a trial of ``method`` with ``settings`` over everything else."""
        values = {**self.overrides, **settings, "method": method, "seed": self.seed, "first_tasks": self.tasks}
        if self.order is not None:
            values["order"] = self.order
        if threads is not None:
            values.setdefault("threads", threads)
        if self.validation is not None:
            values["validation"] = self.validation
        else:
            own = load_config(self.source, values, known_methods=method_names()).validation
            values["validation"] = VALIDATION if own is None else own
        return load_config(self.source, {**values, "evaluate_on": "validation"}, known_methods=method_names())

    def spaces(self) -> dict[str, list[Axis]]:
        """What each method varies; `ConfigError` where that cannot be."""
        search = {name: get_method(name).search for name in self.methods}
        ranges = parse_ranges(self.ranges, search)
        return {name: make_space(name, search[name], list(self.overrides), ranges[name]) for name in self.methods}


def read_record(folder: Path) -> dict[str, Any]:
    """tune.json of a search; empty where there is none."""
    file = folder / FILE
    value = read_object(file, "this file is written by keeplora alone")
    if value is None:
        return {}
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise KeepLoraError(f"{file} is not a search that this keeplora knows; choose another --output")
    return value


def refuse_strangers(folder: Path) -> None:
    """Refuse a folder with files in it that are not a search's; looked at before anything is written there."""
    if not folder.exists() or (folder / FILE).is_file():
        return
    if not folder.is_dir():
        raise KeepLoraError(f"{folder} is a file; choose another --output")
    if names := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise KeepLoraError(f"{folder} is not empty ({', '.join(names[:3])}) and no search; choose another --output")


def join(plan: TunePlan, spaces: Mapping[str, list[Axis]]) -> dict[str, Any]:
    """tune.json for this call: that of the folder, with more methods or trials; anything else must be the same."""
    old = read_record(plan.output)
    spread = old.get("design", min(plan.trials, DESIGN))
    threads = plan.overrides.get("threads", old.get("threads", 1))
    methods: dict[str, Any] = dict(old.get("methods", {}))
    for name in plan.methods:
        config = plan.config(name, {}, threads)
        if name not in methods:
            specs = [spec["name"] for spec in config.ordered_tasks]
            methods[name] = {"space": {}, "config": {}, "tasks": specs}
        mine = {"space": {a.key: a.entry() for a in spaces[name]}, "config": _identity(config, spaces[name])}
        if old and name in old["methods"]:
            _refuse_other(plan.output, name, old["methods"][name], json.loads(json.dumps(mine)))
        methods[name] |= mine
    if left := [name for name in methods if name not in plan.methods]:
        raise KeepLoraError(
            f"{plan.output} also holds {', '.join(left)}; name all its methods, so that each gets the same number of trials"
        )
    if plan.trials < old.get("trials", 0):
        raise KeepLoraError(
            f"{plan.output} holds {old['trials']} trials a method; give --trials {old['trials']} or more"
        )
    record = {
        "format": FORMAT, "version": VERSION, "criterion": CRITERION, "seed": plan.seed, "first_tasks": plan.tasks,
        "trials": plan.trials, "design": spread, "threads": threads, "methods": methods,
        "versions": {name: metadata.version(name) for name in ("keeplora", "optuna", "torch")},
    }  # fmt: skip
    for key in ("seed", "first_tasks", "threads"):
        if old and old[key] != record[key]:
            raise KeepLoraError(
                f"{plan.output} holds a search with {key} {old[key]}, not {record[key]}; choose another --output"
            )
    atomic_write_json(plan.output / FILE, record)
    return record


def _identity(config: ExperimentConfig, axes: Sequence[Axis]) -> dict[str, Any]:
    """What a trial's configuration is beside what is searched and where it is written."""
    values = {k: v for k, v in config.resolved().items() if k not in ("output", "method", "threads")}
    for axis in axes:
        section, _, rest = axis.key.partition(".")
        inner = dict(values[section])
        if rest.startswith("options."):
            inner["options"] = {k: v for k, v in inner["options"].items() if k != rest.removeprefix("options.")}
        else:
            inner.pop(rest, None)
        values[section] = inner
    return values


def _refuse_other(folder: Path, method: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for part in ("space", "config"):
        for key in sorted(old[part].keys() | new[part].keys()):
            was, now = old[part].get(key), new[part].get(key)
            if was != now:
                what = "range of " if part == "space" else ""
                raise KeepLoraError(
                    f"{folder} holds a search of {method} with another {what}{key} ({was}, not {now}); choose another "
                    "--output, or repeat the search's own settings"
                )
