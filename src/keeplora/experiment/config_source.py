"""What a person wrote: an experiment's or a suite's file, or the mapping that such a file holds, and the tasks in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError
from keeplora.files import expand, real_path
from keeplora.yaml_text import KeyPath, read_yaml


class Layer(NamedTuple):
    source: str  # how errors name it
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]


def plain(value: Any) -> Any:
    """Copy into dicts, lists and scalars: tuples, paths and other mappings come from Python callers."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read(
    source: str | os.PathLike[str] | Mapping[str, Any], needs: str = "`suite:` (or `tasks:`) and `method:`"
) -> tuple[Layer, Path]:
    """(what the file holds, the folder it is in)."""
    if isinstance(source, Mapping):
        return Layer("configuration", plain(source), {}), Path.cwd()
    path = expand(source)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the configuration file itself")
    values, lines = read_yaml(path)
    if values is None:
        raise ConfigError(f"{path} is empty; it needs at least {needs}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not a mapping (`key: value` lines)")
    return Layer(str(path), values, lines), real_path(path).parent


def _split_classes(spec: Any) -> list[Any]:
    """A task that asks for `split_classes` as its parts, NAME-1 … NAME-T: class-incremental learning."""
    split = spec.get("split_classes") if isinstance(spec, Mapping) else None
    if split is None:
        return [spec]
    where = f"task {spec.get('name')!r}: split_classes"
    if not isinstance(split, Mapping) or not set(split) <= {"tasks", "seed"} or "tasks" not in split:
        raise ConfigError(f"{where} is {split!r}, but must be {{tasks: T}} or {{tasks: T, seed: S}}")
    for key, least in (("tasks", 2), ("seed", 0)):
        value = split.get(key, least)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{where}.{key} is {value!r}, but must be a whole number of at least {least}")
    if split["tasks"] > 10_000:
        raise ConfigError(f"{where}.tasks is {split['tasks']}, but must be at most 10,000")
    rest = {key: value for key, value in spec.items() if key != "split_classes"}
    part = {"of": split["tasks"], **({"seed": split["seed"]} if split.get("seed") is not None else {})}
    return [{**rest, "name": f"{spec.get('name')}-{i}", "part": {"index": i, **part}} for i in range(1, part["of"] + 1)]


def expanded(values: dict[str, Any]) -> dict[str, Any]:
    tasks = values.get("tasks")
    if isinstance(tasks, list):
        values = {**values, "tasks": [part for spec in tasks for part in _split_classes(spec)]}
    return values


@dataclass(frozen=True)
class OwnTasks:
    """The tasks of a file.

    Attributes:
        specs: as they stand there, but for what a suite says beside them (`fetch`); where classes are split, the parts.
        base: where their relative paths start; None: where those of data that is kept elsewhere do (`data: external`).
        where: how errors name the file. values: all that it holds.
    """

    specs: list[dict[str, Any]]
    base: Path | None
    where: str
    values: Mapping[str, Any]


def own_tasks(source: str | os.PathLike[str] | Mapping[str, Any]) -> OwnTasks:
    """The tasks of a YAML file, an experiment's, a suite's or one with nothing else, or of what such a file holds.

    Raises:
        ConfigError: there are none, or one is no mapping with a name.
    """
    layer, folder = read(source, needs="`tasks:`")
    specs = expanded(layer.values).get("tasks")
    if not isinstance(specs, list) or not specs:
        raise ConfigError(f"{layer.source}: it lists no `tasks:`; write them as in an experiment's file")
    for index, spec in enumerate(specs):
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ConfigError(f"{layer.source}: tasks.{index} is {spec!r}, but must be a mapping with a `name:` (text)")
    base = layer.values.get("base_dir")
    place = real_path(folder / expand(base)) if isinstance(base, str) else folder
    return OwnTasks(
        [{key: value for key, value in spec.items() if key != "fetch"} for spec in specs],
        None if layer.values.get("data") == "external" else place, layer.source, layer.values,
    )  # fmt: skip
