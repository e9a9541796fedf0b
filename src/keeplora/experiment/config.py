"""Read an experiment's configuration: preset < suite < file < command line, checked, every problem told at once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.experiment.config_errors import (
    FILE_ONLY_KEYS,
    SECTIONS,
    Problem,
    has_path,
    key_text,
    problems_of,
    raise_problems,
    unknown_key,
)
from keeplora.experiment.config_fields import DEFAULT_KEY
from keeplora.experiment.config_schema import (
    AcceptConfig,
    EarlyStoppingConfig,
    ExperimentConfig,
    ModelConfig,
    Overridden,
    TrainingConfig,
    TunerConfig,
    variant_of,
)
from keeplora.experiment.config_source import Layer, expanded, plain, read
from keeplora.experiment.presets import WHOLE_KEYS, deep_merge, preset_names, preset_values
from keeplora.files import expand, real_path
from keeplora.yaml_text import KeyPath, parse_yaml

__all__ = [
    "AcceptConfig",
    "EarlyStoppingConfig",
    "ExperimentConfig",
    "ModelConfig",
    "Overridden",
    "TrainingConfig",
    "TunerConfig",
    "load_config",
    "parse_overrides",
]

#: What a suite may set beside its tasks; its own name, description and licences are not settings.
_SUITE_KEYS = (
    "model",
    "tasks",
    "probes",
    "order",
    "orders",
    "candidates",
    "reference",
    "preset",
    "tuner",
    "training",
    "per_method",
    "seed",
    "validation",
    "early_stopping",
    "generation",
    "video",
    "judge",
    "best_epoch",
    "accept",
)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`deep_merge`, with ``model: NAME`` short for ``model: {name: NAME}``; another name, or kind of judge, starts anew."""
    below, above = base.get("model"), top.get("model")
    merged = deep_merge(base, top, WHOLE_KEYS)
    if isinstance(above, str):
        above = {"name": above}
    if isinstance(below, str):
        below = {"name": below}
    if isinstance(above, Mapping):
        same = isinstance(below, Mapping) and above.get("name", below.get("name")) == below.get("name")
        merged["model"] = {**below, **above} if same and isinstance(below, Mapping) else dict(above)
    elif above is None and below is not None and "model" not in top:
        merged["model"] = below
    before, judge = base.get("judge"), top.get("judge")
    if (
        isinstance(before, Mapping)
        and isinstance(judge, Mapping)
        and judge.get("kind") not in (None, before.get("kind"))
    ):
        merged["judge"] = dict(judge)
    return merged


def parse_overrides(options: Sequence[str]) -> dict[str, Any]:
    """``["training.epochs=2", "order=[a, b]"]`` as ``{"training.epochs": 2, "order": ["a", "b"]}``; values are YAML.

    Raises
    ------
    ConfigError
        An option without "=", without a key, given twice, or whose value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"-o {option}: write it as KEY=VALUE, for example -o training.epochs=2")
        if key in overrides:
            raise ConfigError(f"-o {key} is given twice; keep one")
        overrides[key] = parse_yaml(text, f"-o {option}")[0]
    return overrides


def _key_path(key: str) -> KeyPath:
    """A dotted key; what follows a per-task or per-tower field is one name, dots and all ("training.epochs.a.b")."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if part in WHOLE_KEYS and depth == (0 if part == "validation" else 1) and len(parts) > depth + 1:
            return (*parts[: depth + 1], ".".join(parts[depth + 1 :]))
    return tuple(parts)


def _nested(overrides: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted overrides as a nested mapping to lay over ``below``.

    One entry of what is a single number so far (``tuner.gamma.text=1`` over ``gamma: 0.2``) keeps that as default.
    """
    nested: dict[str, Any] = {}
    for key, value in plain(overrides).items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"override {key!r}: a key is a dotted word such as 'training.epochs'")
        *parents, last = map(str, _key_path(key))
        here, under = nested, below
        for depth, part in enumerate(parents):
            inner = under.get(part) if isinstance(under, Mapping) else None
            if part in WHOLE_KEYS and part not in here and inner is not None:
                here[part] = dict(inner) if isinstance(inner, Mapping) else {DEFAULT_KEY: inner}
            if isinstance(inner, list):
                raise ConfigError(
                    f"override {key}: {key_text(tuple(parents[: depth + 1]))} is a list; give the whole list"
                )
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ConfigError(
                    f"override {key}: another override sets {key_text(tuple(parents[: depth + 1]))} as a whole"
                )
            under = inner
        if last in here and isinstance(here[last], dict) and isinstance(value, dict):
            value = deep_merge(here[last], value, WHOLE_KEYS)
        here[last] = value
    return nested


def _suite_layer(name: Any, where: str) -> dict[str, Any]:
    from keeplora.suites import load_suite  # the suites are read only where one is asked for

    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: suite is {name!r}, but must be the name of a suite")
    try:
        suite = plain(load_suite(name))
    except KeepLoraError as error:
        raise ConfigError(f"{where}: {error}") from None
    return expanded({key: suite[key] for key in _SUITE_KEYS if key in suite})


def _suite_path(name: Any, folder: Path) -> Any:
    """A suite that is a file of the user's, by its absolute path; packaged names stay as they are."""
    if isinstance(name, str) and (name.endswith((".yaml", ".yml")) or os.sep in name):
        return str(real_path(folder / expand(name)))
    return name


def _order(value: Any, suite: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[dict[str, Any], Any]:
    """(`order` and `order_name` to set, preset of that order or None) of an order that is given by name."""
    orders = {str(name): entry for name, entry in (suite.get("orders") or {}).items()}
    if value is None and "1" in orders:
        value = "1"
    if isinstance(value, bool) or not isinstance(value, int | str):
        return {}, None
    name = str(value)
    if name in orders:
        return {"order": list(orders[name]["order"]), "order_name": name}, orders[name].get("preset")
    kind, _, seed = name.partition("-")
    if kind == "shuffle" and seed.isascii() and seed.isdigit() and len(seed) <= 20:
        shuffled = list(names)
        random.Random(int(seed)).shuffle(shuffled)
        return {"order": shuffled, "order_name": name}, None
    choices = [*orders, "shuffle-SEED"]
    raise ConfigError(
        f"{where}: unknown order {name!r}{did_you_mean(name, choices)}; a list of task names will do as well"
    )


def _per_method(layer: Mapping[str, Any], method: Any) -> dict[str, Any]:
    own = layer.get("per_method")
    own = own.get(method) if isinstance(own, Mapping) else None
    return dict(own) if isinstance(own, Mapping) else {}


def _per_method_problems(values: Any, merged: Mapping[str, Any], known: Sequence[str] | None) -> list[Problem]:
    """Check every method's entry, used or not: a typing error must not wait until its method runs."""
    if values is None:
        return []
    if not isinstance(values, Mapping):
        return [Problem(("per_method",), f"per_method is {values!r}, but must be a mapping from method names")]
    problems = []
    for method, own in values.items():
        path: KeyPath = ("per_method", str(method))
        if known is not None and method not in known:
            problems.append(
                Problem(path, f"per_method names an unknown method {method!r}{did_you_mean(str(method), known)}")
            )
        if not isinstance(own, Mapping):
            problems.append(
                Problem(path, f"{key_text(path)} is {own!r}, but must be a mapping with training: or tuner:")
            )
            continue
        for section, section_values in own.items():
            if section not in ("training", "tuner"):
                hint = did_you_mean(str(section), ["training", "tuner"])
                problems.append(Problem((*path, section), f"unknown key {section!r} in {key_text(path)}{hint}"))
                continue
            below = merged.get(section)
            if isinstance(section_values, Mapping) and isinstance(below, Mapping):
                section_values = deep_merge(below, section_values, WHOLE_KEYS)
            try:
                SECTIONS[section].model_validate(section_values)
            except ValidationError as error:
                mine = [p for p in problems_of(error, (section,)) if has_path(own, p.path) or p.path == (section,)]
                problems += [Problem((*path, *p.path), f"{key_text(path)}: {p.sentence}") for p in mine]
    return problems


def _variant_of(method: Any) -> str | None:
    return variant_of(method) if isinstance(method, str) else None


def _names_of(tasks: Any) -> list[str]:
    specs = tasks if isinstance(tasks, list) else []
    return [spec["name"] for spec in specs if isinstance(spec, Mapping) and isinstance(spec.get("name"), str)]


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    known_methods: Iterable[str] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> ExperimentConfig:
    """Read, complete and check a configuration.

    Layers, each over the one before: the preset, the suite (then its ``per_method`` entry for this method), the file
    (then its ``per_method`` entry), ``overrides``. A value that may be a mapping over towers or tasks is replaced whole.

    Parameters
    ----------
    source : a YAML file, or the mapping that such a file would hold.
    overrides : values by dotted key (``{"training.epochs": 2}``), as `parse_overrides` makes them from ``-o`` options.
    known_methods : names that ``method`` and ``per_method`` may hold; None: not checked.
    base_dir : where relative paths of data start; None: the file's ``base_dir``, else its folder.

    Raises
    ------
    ConfigError
        Names file, line, key and value, and lists every problem found.

    Examples
    --------
    >>> config = load_config({"tasks": [{"name": "pets", "source": "folder"}], "model": "embedded", "method": "lora"})
    >>> config.training.for_task("pets").epochs, [str(o) for o in config.overridden]
    (3, [])
    """
    file, folder = read(source)
    file = file._replace(values=expanded(file.values))
    known = None if known_methods is None else sorted(known_methods)
    layers = [Layer("command line", _nested(overrides or {}, file.values), {}), file]

    def where(path: KeyPath) -> str:
        for layer in layers:
            if path and has_path(layer.values, path):
                line = layer.lines.get(path)
                return f"{layer.source}, line {line}" if line else layer.source
        return where(path[:-1]) if path else file.source

    # Which suite, preset and method apply is decided first: the layers below the file depend on them.
    user = _merge(file.values, layers[0].values)
    suite_name, method = _suite_path(user.get("suite"), folder), user.get("method")
    suite: dict[str, Any] = {}
    if suite_name is not None:
        if user.get("tasks") is not None:
            raise ConfigError(
                f"{where(('tasks',))}: both `suite:` and `tasks:` are given; keep one (a suite has tasks)"
            )
        suite = _suite_layer(suite_name, where(("suite",)))
        layers.append(Layer(f"suite {suite_name}", suite, {}))
    tasks = suite.get("tasks", user.get("tasks"))
    given_order = user.get("order", suite.get("order"))
    ordering, order_preset = _order(given_order, suite, _names_of(tasks), where(("order",)))
    preset_name = user.get("preset", order_preset or suite.get("preset", "default"))
    if preset_name not in preset_names():
        hint = did_you_mean(str(preset_name), preset_names())
        raise ConfigError(f"{where(('preset',))}: unknown preset {preset_name!r}{hint}")
    preset = preset_values(preset_name, _names_of(tasks), _variant_of(method))

    merged: dict[str, Any] = {"base_dir": str(folder)}
    for layer in (preset, suite, _per_method(suite, method), file.values, _per_method(user, method)):
        merged = _merge(merged, layer)
    before = merged
    layers[0] = Layer("command line", _nested(overrides or {}, merged), {})
    merged = _merge(merged, layers[0].values)
    merged["preset"] = preset_name
    merged |= ordering
    if suite_name is not None:
        merged["suite"] = suite_name
    if isinstance(merged.get("data_dir"), str):
        merged["data_dir"] = str(real_path(folder / expand(merged["data_dir"])))
    if isinstance(merged["base_dir"], str):
        merged["base_dir"] = str(real_path(folder / (base_dir or merged["base_dir"])))

    fields = ExperimentConfig.model_fields
    problems = [unknown_key((key,)) for key in user if key not in fields and key not in FILE_ONLY_KEYS]
    if not problems and merged.get("tasks") is None:
        raise ConfigError(f"{file.source}: neither `suite:` nor `tasks:` is given")
    own_problems = _per_method_problems(user.get("per_method"), before, known)
    problems += own_problems
    if known is not None and isinstance(method, str) and method not in known:
        problems.append(Problem(("method",), f"unknown method {method!r}{did_you_mean(method, known)}"))
    config = None
    try:
        config = ExperimentConfig.model_validate({key: value for key, value in merged.items() if key in fields})
    except ValidationError as error:
        # What is wrong in per_method's entry shows again in the merged section: tell it once, where it was written.
        told = {path[2:] for path, _ in own_problems if path[1:2] == (method,)}
        told |= {("tasks",)} if problems and "tasks" not in merged else set()
        problems += [problem for problem in problems_of(error) if problem.path not in told]
    raise_problems(problems, where)
    assert config is not None  # an invalid configuration always has a problem
    return config
