"""Benchmarks as data: each suite is one YAML file, packaged beside this one or a person's own.

A suite is a mapping with ``name``, ``description``, ``model``, ``tasks``, ``probes``, and settings of an experiment. Tasks
and probes are task descriptions as `keeplora.data.load_task` takes them; their relative paths start at `data_folder()`. A
new packaged suite is one new file in this folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.files import expand
from keeplora.yaml_text import read_yaml

__all__ = ["data_folder", "load_suite", "suite_folder", "suite_names"]

_ENDINGS = (".yaml", ".yml")
_REQUIRED = ("name", "description", "tasks")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str, "description": str, "model": (dict, str), "tasks": list, "probes": list, "data": str, "orders": dict,
    "order": list, "preset": str, "candidates": str, "training": dict, "tuner": dict, "per_method": dict, "seed": int,
}  # fmt: skip
#: Settings whose values only the experiment can check.
_PASSED_ON = ("validation", "early_stopping", "best_epoch", "accept", "reference", "generation", "video", "judge")
_WORDS = {dict: "a mapping (`key: value` lines)", str: "text", list: "a list", int: "a whole number"}
_CANDIDATES = ("own", "seen", "all")
_ORDER_KEYS = {"order": list, "preset": str}


def suite_names() -> list[str]:
    """Every packaged suite, sorted.

    >>> suite_names()
    ['cl-vista', 'demo', 'demo-long', 'demo-small', 'mllm-dcl', 'mtil', 'ucit', 'video', 'vqa', 'x-tail']
    """
    return sorted(path.stem for path in suite_folder().glob("*.yaml"))


def suite_folder(suite: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a suite's file; that of the packaged suites where none, or one of them, is named."""
    return Path(__file__).parent if suite is None or not _is_path(suite) else _file(suite).parent


def data_folder(suite: str | os.PathLike[str], data: str | os.PathLike[str] | None = None) -> Path:
    """Where the relative paths of a suite's tasks start.

    For most suites that is the folder of its file. Suites that say ``data: external`` bring no pictures: theirs start at
    ``data``, else at the environment's ``KEEPLORA_DATA``, else at the folder ``data`` in the current one.

    >>> import os; before = os.environ.pop("KEEPLORA_DATA", None)
    >>> data_folder("mtil").name, data_folder("mtil", "/big/disk").as_posix(), data_folder("demo").name
    ('data', '/big/disk', 'suites')
    >>> if before: os.environ["KEEPLORA_DATA"] = before
    """
    return suite_folder(suite) if load_suite(suite).get("data") != "external" else external_folder(data)


def external_folder(data: str | os.PathLike[str] | None = None) -> Path:
    """Where data lies that comes with no suite: ``data``, else ``KEEPLORA_DATA``, else the folder ``data`` in the current one."""
    return expand(data or os.environ.get("KEEPLORA_DATA") or "data").absolute()


def load_suite(suite: str | os.PathLike[str]) -> dict[str, Any]:
    """The suite's settings, a new mapping with every call.

    Args:
        suite: a packaged suite's name, or the path of a YAML file (it ends in .yaml or .yml, or holds a separator).

    Returns:
        The file's keys; ``probes`` is always there; ``orders`` maps names as text to ``{"order": [...], "preset": ...}``;
        what the tasks say under ``fetch`` (where to get the data, in words) is in ``fetch``, by task name.

    Raises:
        ConfigError: there is no such suite, or its file is not one; the sentence names file and key.

    >>> [task["name"] for task in load_suite("demo")["tasks"]][:2]
    ['digits', 'scripts']
    >>> load_suite("mtil")["orders"]["2"]["order"][0]
    'StanfordCars'
    """
    file = _file(suite)
    found, _ = read_yaml(file)
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a suite is a mapping with {', '.join(_REQUIRED)}; write it as `key: value` lines")
    _check_keys(found, file)
    found.setdefault("probes", [])
    found["fetch"] = _take_fetch(_check_specs(found, file), file)
    if "orders" in found:
        found["orders"] = _orders(found, file)
    return found


def _is_path(suite: str | os.PathLike[str]) -> bool:
    text = os.fspath(suite)
    return text.endswith(_ENDINGS) or "/" in text or os.sep in text


def _file(suite: str | os.PathLike[str]) -> Path:
    name = os.fspath(suite)
    if not _is_path(name):
        if name not in suite_names():
            raise ConfigError(
                f"unknown suite {name!r}{did_you_mean(name, suite_names())}; a suite of your own is named by the path of its "
                "YAML file"
            )
        return suite_folder() / f"{name}.yaml"
    file = expand(name).absolute()
    if not file.is_file():
        kind = "is a folder; name the suite's YAML file in it" if file.is_dir() else "no such suite file"
        raise ConfigError(f"{file}: {kind} (packaged suites: {', '.join(suite_names())})")
    return file


def _check_keys(suite: dict[Any, Any], file: Path) -> None:
    known = (*_TYPES, *_PASSED_ON)
    for key, value in suite.items():
        if key not in known:
            raise ConfigError(f"{file}: unknown key {key!r}{did_you_mean(str(key), known, 'docs/suites.md')}")
        kinds = _TYPES.get(key)
        if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            kind = kinds if isinstance(kinds, type) else kinds[0]
            raise ConfigError(f"{file}: `{key}` is {value!r}, but must be {_WORDS[kind]}")
    for key in _REQUIRED:
        if not suite.get(key):
            raise ConfigError(f"{file}: `{key}` is {'empty' if key in suite else 'missing'}; add it")
    if suite["name"] != file.stem:
        raise ConfigError(f"{file}: `name` is {suite['name']!r}; it must be the file's own name, {file.stem!r}")
    if suite.get("data", "external") != "external":
        raise ConfigError(
            f"{file}: `data` is {suite['data']!r}; write `data: external` where the pictures are kept apart from the suite "
            "(see `--data`), or leave it out where paths start at the suite's own folder"
        )
    if suite.get("candidates", "own") not in _CANDIDATES:
        raise ConfigError(
            f"{file}: `candidates` is {suite['candidates']!r}{did_you_mean(suite['candidates'], _CANDIDATES)}"
        )


def _check_specs(suite: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    specs: list[dict[str, Any]] = []
    for key in ("tasks", "probes"):
        for index, spec in enumerate(suite[key]):
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str) or not spec["name"]:
                raise ConfigError(f"{file}: `{key}.{index}`, {spec!r}, has no `name`; add it as text")
            specs.append(spec)
    names = [spec["name"] for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}: two tasks or probes are called {twice[0]!r}; rename one")
    return specs


def _take_fetch(specs: list[dict[str, Any]], file: Path) -> dict[str, str]:
    fetch: dict[str, str] = {}
    for spec in specs:
        words = spec.pop("fetch", None)
        if words is None:
            continue
        if not isinstance(words, str) or not words.strip():
            raise ConfigError(f"{file}: `fetch` of {spec['name']!r} is {words!r}; say in words where to get the data")
        fetch[spec["name"]] = " ".join(words.split())
    return fetch


def _learned_names(specs: list[dict[str, Any]]) -> list[str]:
    """The tasks as they are learned: one with ``split_classes`` counts as its parts, NAME-1, NAME-2, ..."""
    names: list[str] = []
    for spec in specs:
        split = spec.get("split_classes")
        parts = split.get("tasks") if isinstance(split, Mapping) else None
        if (
            isinstance(parts, int) and not isinstance(parts, bool) and parts <= 10_000
        ):  # more are refused with the settings
            names += [f"{spec['name']}-{part}" for part in range(1, parts + 1)]
        else:
            names.append(spec["name"])
    return names


def _orders(suite: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    tasks = _learned_names(suite["tasks"])
    orders: dict[str, dict[str, Any]] = {}
    for key, value in suite["orders"].items():
        where = f"{file}: `orders.{key}`"
        if isinstance(key, bool) or not isinstance(key, str | int) or str(key) in orders:
            raise ConfigError(f"{where}: an order's name is a word or a whole number of its own; rename it")
        values = {"order": value} if isinstance(value, list) else value
        if not isinstance(values, dict):
            raise ConfigError(
                f"{where} is {value!r}; give the list of all task names, or `order:` with it and `preset:`"
            )
        for inner, entry in values.items():
            if inner not in _ORDER_KEYS:
                raise ConfigError(f"{where}: unknown key {inner!r}{did_you_mean(str(inner), _ORDER_KEYS)}")
            if not isinstance(entry, _ORDER_KEYS[inner]):
                raise ConfigError(f"{where}: `{inner}` is {entry!r}, but must be {_WORDS[_ORDER_KEYS[inner]]}")
        names = [str(name) for name in values.get("order") or []]
        for name in names:
            if name not in tasks:
                raise ConfigError(f"{where} names an unknown task {name!r}{did_you_mean(name, tasks)}")
            if names.count(name) > 1:
                raise ConfigError(f"{where} names {name!r} twice; name every task once")
        if missing := [name for name in tasks if name not in names]:
            raise ConfigError(f"{where} leaves out {', '.join(map(repr, missing))}; name every task once")
        orders[str(key)] = {**values, "order": names}
    return orders
