"""Presets: the reference's hyper-parameters per benchmark, and our own default, as packaged YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.yaml_text import parse_yaml

_FOLDER = resources.files("keeplora.experiment") / "presets"


def preset_names() -> list[str]:
    """Every packaged preset, sorted.

    >>> "mtil" in preset_names()
    True
    """
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def deep_merge(base: Mapping[str, Any], top: Mapping[str, Any], whole: Iterable[str] = ()) -> dict[str, Any]:
    """``base`` with ``top`` laid over it, section by section; keys in ``whole`` are replaced, never mixed.

    Merging is idempotent: laying the same ``top`` on the result changes nothing.
    """
    whole = frozenset(whole)
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if key not in whole and isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = deep_merge(below, value, whole)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


#: One number for all, or one per tower or task. A later layer replaces such a value as a whole: half of a preset's
#: mapping mixed with half of the user's would give numbers that nobody wrote.
WHOLE_KEYS = (
    "epochs",
    "learning_rate",
    "r",
    "energy_weights",
    "energy_features",
    "gamma",
    "schedule",
    "validation",
)


def load_preset(name: str) -> dict[str, Any]:
    """The preset's file over what it extends: description, seed, tuner, training and perhaps variants."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}{did_you_mean(name, preset_names())}")
    text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    value, _ = parse_yaml(text, f"preset {name}")
    below = value.pop("extends", None)
    return deep_merge(load_preset(below), value, WHOLE_KEYS) if below else value


def _plain_name(name: str) -> str:
    return "".join(ch for ch in name.casefold() if ch.isalnum())


def _for_tasks(value: Any, tasks: Iterable[str]) -> Any:
    """A per-task value with the preset's task names replaced by the user's ("sun397" is the preset's SUN397)."""
    if not isinstance(value, Mapping):
        return value
    known = {_plain_name(str(key)): number for key, number in value.items() if key != "default"}
    special = {task: known[_plain_name(task)] for task in tasks if _plain_name(task) in known}
    return {"default": value["default"], **special} if special else value["default"]


def preset_values(name: str, tasks: Iterable[str] = (), variant: str | None = None) -> dict[str, Any]:
    """What the preset sets in an experiment on ``tasks``: a mapping of seed, tuner and training.

    Parameters
    ----------
    name : one of `preset_names`.
    tasks : names of the experiment's tasks; per-task epochs and learning rates of other tasks are left out.
    variant : "cls" for the classifier variant, whose epochs differ in the reference.

    >>> preset_values("mtil", ["pets", "sun397"])["training"]["epochs"]
    {'default': 10, 'sun397': 5}
    """
    values = load_preset(name)
    values.pop("description", None)
    variants = values.pop("variants", {})
    if variant in variants:
        values = deep_merge(values, variants[variant], WHOLE_KEYS)
    tasks = list(tasks)
    for key in ("epochs", "learning_rate"):
        values["training"][key] = _for_tasks(values["training"][key], tasks)
    return values
