"""Benchmarks as data: each suite is one YAML file beside this one, its pictures lie in the folder that it names.

A suite is a mapping with ``name``, ``description``, ``model``, ``tasks``, ``probes``, ``training`` and ``tuner``. Tasks and
probes are task descriptions as `keeplora.data.load_task` takes them; their relative paths start at `suite_folder()`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, did_you_mean

__all__ = ["load_suite", "suite_folder", "suite_names"]

_REQUIRED = {"name": str, "description": str, "model": dict, "tasks": list, "probes": list}
_OPTIONAL = {"training": dict, "tuner": dict, "per_method": dict, "preset": str, "order": list, "seed": int}


def suite_folder() -> Path:
    """Where the suites are, and where relative paths in them start."""
    return Path(__file__).parent


def suite_names() -> list[str]:
    """Every packaged suite, sorted.

    >>> suite_names()
    ['demo', 'demo-small']
    """
    return sorted(path.stem for path in suite_folder().glob("*.yaml"))


def load_suite(name: str) -> dict[str, Any]:
    """The suite's settings, a new mapping with every call.

    Raises:
        ConfigError: there is no such suite, or its file is not one.

    >>> [task["name"] for task in load_suite("demo")["tasks"]][:2]
    ['digits', 'scripts']
    """
    if name not in suite_names():
        raise ConfigError(f"unknown suite {name!r}{did_you_mean(str(name), suite_names())}")
    import yaml  # read only where a suite is asked for

    file = suite_folder() / f"{name}.yaml"
    try:
        suite = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML ({str(error).splitlines()[0]}); reinstall keeplora") from error
    _check(suite, name, file)
    return suite


def _check(suite: Any, name: str, file: Path) -> None:
    if not isinstance(suite, dict):
        raise ConfigError(f"{file}: a suite is a mapping with {', '.join(_REQUIRED)}; mend or reinstall it")
    kinds = {**_REQUIRED, **_OPTIONAL}
    for key, value in suite.items():
        if key not in kinds:
            raise ConfigError(f"{file}: unknown key {key!r}{did_you_mean(str(key), kinds)}")
        if not isinstance(value, kinds[key]):
            raise ConfigError(f"{file}: `{key}` must be a {kinds[key].__name__}, not {type(value).__name__}")
    if missing := [key for key in _REQUIRED if key not in suite]:
        raise ConfigError(f"{file}: `{missing[0]}` is missing; add it")
    if suite["name"] != name:
        raise ConfigError(f"{file}: `name` is {suite['name']!r}; it must be the file's own name, {name!r}")
    for spec in (*suite["tasks"], *suite["probes"]):
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise ConfigError(f"{file}: the task or probe {spec!r} has no `name`; add it")
    names = [spec["name"] for spec in (*suite["tasks"], *suite["probes"])]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"{file}: two tasks or probes are called {twice[0]!r}; rename one")
