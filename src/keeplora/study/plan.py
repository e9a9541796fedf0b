"""What a study runs: methods × seeds × orders over one suite or experiment, from a YAML file and the command line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, did_you_mean
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.config_errors import Problem, raise_problems
from keeplora.files import expand, real_path
from keeplora.methods import method_names
from keeplora.yaml_text import KeyPath, read_yaml

KEYS = {
    "name": "text", "suite": "text", "experiment": "text", "data": "text", "methods": "a list of methods",
    "seeds": "a list of whole numbers, or a range such as 0-4", "orders": "a list of orders, or a mapping from labels",
    "set": "a mapping of experiment keys", "per_method": "a mapping from methods, or a YAML file that holds one",
    "variants": "a mapping from names to method: and the settings in which each differs",
    "against": "a method", "jobs": "a whole number of at least 1", "threads": "a whole number of at least 1",
    "output": "text", "keep_ledgers": "true or false",
}  # fmt: skip
_OWN = {
    "method": "methods",
    "seed": "seeds",
    "order": "orders",
    "output": "output",
    "threads": "threads",
    "data_dir": "data",
}
LISTED = "listed"
"""The label of the order in which the tasks are written, where it has no name."""


class CellKey(NamedTuple):
    """One run of a study: which method (or variant of one), under which order and seed."""

    method: str
    order: str
    seed: int

    @property
    def folder(self) -> str:
        """The cell's place below the study's folder."""
        return f"cells/{_safe(self.method)}/order-{_safe(self.order)}/seed-{self.seed}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


def together(problems: Sequence[str]) -> str:
    """One sentence, or a list of them."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the study:\n" + "\n".join(f"  - {problem}" for problem in problems)


@dataclass(frozen=True)
class StudyPlan:
    """A checked study. ``orders`` maps labels to what the experiment's ``order`` is set to (None: as listed).

    ``methods`` are names of the registry and of ``variants``: a variant is a method with some settings of its own, and stands in
    every table as a method does.
    """

    name: str
    kind: str  # "suite" or "experiment"
    base: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    orders: Mapping[str, Any]
    output: Path
    set: Mapping[str, Any] = field(default_factory=dict)
    per_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    against: str | None = None
    jobs: int | None = None
    threads: int | None = None
    keep_ledgers: bool = True

    def cells(self) -> Iterator[CellKey]:
        """Seeds outermost: whatever is finished when a study stops is whole pairs."""
        for seed in self.seeds:
            for order in self.orders:
                for method in self.methods:
                    yield CellKey(method, order, seed)

    def method_of(self, name: str) -> str:
        """The registry's name of the method that a variant is one of; a method's own name for itself."""
        return str(self.variants[name]["method"]) if name in self.variants else name

    def overrides(self, method: str, order: str) -> dict[str, Any]:
        """Dotted settings of a cell: the method's own, then the study's, then the variant's, then the order."""
        values = _dotted(self.per_method.get(self.method_of(method), {}))
        values |= self.set
        values |= _dotted({key: value for key, value in self.variants.get(method, {}).items() if key != "method"})
        if self.orders[order] is not None:
            values["order"] = self.orders[order]
        return values

    def config(self, method: str, order: str, seed: int = 0) -> ExperimentConfig:
        """The configuration that a cell will run with; `ConfigError` where it cannot."""
        name = self.method_of(method)
        values = {**self.overrides(method, order), "seed": seed, "method": name}
        source = self.base if self.kind == "experiment" else {"suite": self.base, "method": name}
        return load_config(source, values, known_methods=method_names())

    def command(self, cell: CellKey, threads: int) -> list[str]:
        """The words after ``python -m keeplora`` that run a cell from its start."""
        source = [self.base] if self.kind == "experiment" else ["--suite", self.base]
        words = ["run", *source, "--method", self.method_of(cell.method), "--seed", str(cell.seed), "--quiet"]
        words += ["--output", str(self.output / cell.folder)]
        for key, value in {**self.overrides(cell.method, cell.order), "threads": threads}.items():
            words += ["-o", f"{key}={json.dumps(value)}"]  # JSON is YAML
        return words

    def check(self) -> None:
        """Load the configuration of every method and order: what cannot run is told before anything runs."""
        problems: dict[str, None] = {}
        for order in self.orders:
            for method in self.methods:
                try:
                    self.config(method, order)
                except ConfigError as error:
                    problems.setdefault(f"variants.{method}: {error}" if method in self.variants else str(error))
        if problems:
            raise ConfigError(together(list(problems)))
        self.check_orders()

    def check_orders(self) -> None:
        """Two labels for one sequence of tasks would count every run twice: refuse them."""
        seen: dict[tuple[str, ...], str] = {}
        for order in self.orders:
            names = tuple(spec["name"] for spec in self.config(self.methods[0], order).ordered_tasks)
            if (other := seen.setdefault(names, order)) != order:
                raise ConfigError(
                    f"orders {other!r} and {order!r} are the same sequence ({', '.join(names)}); keep one"
                )


def parse_seeds(text: Any) -> list[int]:
    """Seeds as people write them.

    >>> parse_seeds("0-2,7"), parse_seeds(3), parse_seeds([1, "4-5"])
    ([0, 1, 2, 7], [3], [1, 4, 5])
    """
    if isinstance(text, bool) or not isinstance(text, int | str | list):
        raise ConfigError(f"seeds is {text!r}, but must be {KEYS['seeds']}")
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"seeds holds {text}, but a seed is a whole number of at least 0")
        return [text]
    parts = text if isinstance(text, list) else [part for part in text.split(",") if part.strip()]
    found: list[int] = []
    for part in parts:
        if isinstance(part, int) and not isinstance(part, bool):
            found += parse_seeds(part)
            continue
        match = re.fullmatch(r"\s*(\d+)\s*(?:(?:-|\.\.)\s*(\d+)\s*)?", str(part))
        if match is None or isinstance(part, bool):
            raise ConfigError(f"seeds holds {part!r}, but must be {KEYS['seeds']}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 10_000:
            raise ConfigError(
                f"seeds holds the range {part!r}; write it from the smaller to the larger, at most 10000 long"
            )
        found += range(first, last + 1)
    if not found:
        raise ConfigError("seeds is empty; give at least one, for example 0-2")
    return list(dict.fromkeys(found))


def parse_words(value: Any, key: str) -> list[str]:
    """A list, or words with commas between them; `ConfigError` where it is neither or empty.

    >>> parse_words("lora, keeplora++", "methods")
    ['lora', 'keeplora++']
    """
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{key} is {value!r}, but must be {KEYS[key]}")
    found = [part.strip() for word in words for part in word.split(",") if part.strip()]
    if not found:
        raise ConfigError(f"{key} is empty; give at least one")
    return list(dict.fromkeys(found))


def parse_orders(value: Any) -> dict[str, Any]:
    """Labels and what ``order`` is set to, from ``1,2``, ``[1, "shuffle-7"]`` or ``{mine: [b, a]}``.

    >>> parse_orders("1,shuffle-7"), parse_orders({"back": ["b", "a"]})
    ({'1': '1', 'shuffle-7': 'shuffle-7'}, {'back': ['b', 'a']})
    """
    if isinstance(value, Mapping):
        found = {str(label): entry for label, entry in value.items()}
    else:
        words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        flat = [part for word in words for part in (word.split(",") if isinstance(word, str) else [word])]
        if any(isinstance(word, list | Mapping) for word in flat):
            raise ConfigError("orders holds a list of tasks without a label; write orders: {LABEL: [first, second]}")
        found = {str(word).strip(): word.strip() if isinstance(word, str) else word for word in flat if word != ""}
    for label, entry in found.items():
        names = isinstance(entry, list) and entry and all(isinstance(name, str) for name in entry)
        if isinstance(entry, bool) or not (entry is None or isinstance(entry, int | str) or names):
            raise ConfigError(f"orders.{label} is {entry!r}, but must be an order's name or a list of task names")
    if not found or "" in found:
        raise ConfigError(f"orders is {value!r}, but must be {KEYS['orders']}")
    # An order by its number or its word is the same order.
    found = {label: str(entry) if isinstance(entry, int) else entry for label, entry in found.items()}
    folders: dict[str, str] = {}
    for label in found:
        if (other := folders.setdefault(_safe(label), label)) != label:
            raise ConfigError(f"orders {other!r} and {label!r} would share the folder order-{_safe(label)}; rename one")
    return found


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """``set:`` as written: dotted keys, or sections as mappings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("training", "tuner") and isinstance(value, Mapping):
            found |= {f"{key}.{inner}": entry for inner, entry in value.items()}
        else:
            found[str(key)] = value
    return found


def read_per_method(value: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """``per_method`` itself, or that of a YAML file such as `keeplora tune` writes."""
    source = "per_method"
    if isinstance(value, str | os.PathLike):
        path = folder / expand(value)
        source = str(path)
        content, _ = read_yaml(path)
        if not isinstance(content, dict) or "per_method" not in content:
            raise ConfigError(f"{path}: no `per_method:` in it; it is a mapping from methods to training: and tuner:")
        value = content["per_method"]
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{source}: per_method is {value!r}, but must be a mapping from methods to training: and tuner:"
        )
    known = method_names()
    for method, sections in value.items():
        if method not in known:
            raise ConfigError(f"{source}: unknown method {method!r}{did_you_mean(str(method), known)}")
        if not isinstance(sections, Mapping):
            raise ConfigError(f"{source}: {method} is {sections!r}, but must be a mapping with training: or tuner:")
        for section in sections:
            if section not in ("training", "tuner"):
                hint = did_you_mean(str(section), ["training", "tuner"])
                raise ConfigError(f"{source}: unknown key {section!r} in {method}{hint}")
    return {str(method): dict(sections) for method, sections in value.items()}


def read_variants(value: Any) -> dict[str, dict[str, Any]]:
    """``variants`` as checked: a name for each, the method it is one of, and the experiment keys in which it differs.

    >>> read_variants({"narrow": {"method": "keeplora++", "tuner": {"rank": 4}}})
    {'narrow': {'method': 'keeplora++', 'tuner.rank': 4}}
    """
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"variants is {value!r}, but must be {KEYS['variants']}")
    known = method_names()
    found: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}
    for name, settings in value.items():
        where = f"variants.{name}"
        if not isinstance(name, str) or name in ("", ".", "..") or name != name.strip() or set(name) & set("/\\\0,"):
            raise ConfigError(f"variants holds the name {name!r}; a name is text without commas and slashes")
        if name in known:
            raise ConfigError(f"{where}: {name!r} is a method's own name; give the variant another")
        if (other := folders.setdefault(_safe(name), name)) != name:
            raise ConfigError(f"variants {other!r} and {name!r} would share the folder {_safe(name)}; rename one")
        if not isinstance(settings, Mapping) or "method" not in settings:
            raise ConfigError(f"{where} is {settings!r}, but must hold method: and the settings in which it differs")
        if settings["method"] not in known:
            raise ConfigError(
                f"{where}: unknown method {settings['method']!r}{did_you_mean(str(settings['method']), known)}"
            )
        found[name] = _dotted(settings)
        for key in found[name]:
            if key != "method" and (key in _OWN or key.split(".")[0] == "order"):
                raise ConfigError(f"{where}: {key} is the study's own; use {_OWN.get(key, 'orders')}: in place of it")
    return found


def read_study(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The keys of a STUDY.yaml with their lines; relative paths in it start at its folder.

    Raises `ConfigError` for a file that is not one: the sentence names the unknown key.
    """
    values, lines = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a study is a mapping with suite:, methods: and seeds:")
    if "method" in values or "tasks" in values:
        told = "write a study with `experiment: FILE`, or give --experiment FILE"
        raise ConfigError(f"{path} is an experiment, not a study; {told}")
    problems = [Problem((k,), f"unknown key {k!r}{did_you_mean(str(k), KEYS)}") for k in values if k not in KEYS]
    raise_problems(problems, lambda where: f"{path}, line {lines[where]}" if where in lines else str(path))
    folder = real_path(path).parent
    for key in ("experiment", "data", "output"):
        if isinstance(values.get(key), str):
            values[key] = str(folder / expand(values[key]))
    if isinstance(values.get("suite"), str) and _is_path(values["suite"]):
        values["suite"] = str(folder / expand(values["suite"]))
    if isinstance(values.get("per_method"), str):
        values["per_method"] = str(folder / expand(values["per_method"]))
    return values, lines


def _is_path(suite: str) -> bool:
    return suite.endswith((".yaml", ".yml")) or os.sep in suite


def make_plan(values: Mapping[str, Any]) -> StudyPlan:
    """Check the keys of a study and complete them.

    Raises
    ------
    ConfigError
        Names the key and the value, one sentence for each problem.
    """
    problems: list[str] = []

    def take(key: str, make: Any, default: Any = None) -> Any:
        if values.get(key) is None:
            return default
        try:
            return make(values[key])
        except ConfigError as error:
            problems.append(str(error))
            return default

    def kind(key: str, accept: type, least: int | None = None) -> Any:
        def check(value: Any) -> Any:
            wrong = not isinstance(value, accept) or (accept is int and isinstance(value, bool))
            if wrong or (least is not None and value < least) or value == "":
                raise ConfigError(f"{key} is {value!r}, but must be {KEYS[key]}")
            return value

        return take(key, check)

    problems += [f"unknown key {key!r}{did_you_mean(key, KEYS)}" for key in values if key not in KEYS]
    suite, experiment, name, data = (kind(key, str) for key in ("suite", "experiment", "name", "data"))
    if (suite is None) == (experiment is None):
        problems.append(
            "give either a suite (suite: demo-small) or an experiment's file (experiment: FILE), and not both"
        )
    variants = take("variants", read_variants, {})
    methods = take("methods", lambda v: _methods(parse_words(v, "methods"), variants), list(variants))
    if values.get("methods") is None and not values.get("variants"):
        problems.append(f"methods is missing; give some of {', '.join(method_names())}, or all")
    seeds = take("seeds", parse_seeds, [0])
    orders = take("orders", parse_orders, {})
    settings = kind("set", Mapping) or {}
    settings = _dotted(settings)
    for key in settings:
        if key in _OWN or key.split(".")[0] == "order":
            problems.append(f"set: {key} is the study's own; use {_OWN.get(key, 'orders')}: in place of it")
    if data is not None:
        settings["data_dir"] = str(expand(data).absolute())
    per_method = take("per_method", lambda v: read_per_method(v, Path.cwd()), {})
    against = kind("against", str)
    if against is not None and methods and against not in methods:
        problems.append(f"against: {against!r} is not among the methods{did_you_mean(against, methods)}")
    jobs, threads, keep = kind("jobs", int, 1), kind("threads", int, 1), kind("keep_ledgers", bool)
    output = kind("output", str)
    if problems:
        raise ConfigError(together(problems))
    base = experiment if experiment is not None else suite
    if experiment is not None or _is_path(base):
        base = str(expand(base).absolute())
    name = name or Path(base).stem
    plan = StudyPlan(
        name=name, kind="suite" if experiment is None else "experiment", base=base, methods=tuple(methods),
        seeds=tuple(seeds), orders=orders or {LISTED: None},
        output=expand(output or f"runs/compare-{_safe(name)}"), set=settings,
        per_method={m: own for m, own in per_method.items() if m in {variants.get(n, {}).get("method", n) for n in methods}},
        variants={n: variants[n] for n in methods if n in variants}, against=against, jobs=jobs, threads=threads,
        keep_ledgers=keep is not False,
    )  # fmt: skip
    if not orders and (known := plan.config(plan.methods[0], LISTED).order_name):
        # The suite's first order has a name: so it stays the same order when a second one joins.
        plan = StudyPlan(**{**vars(plan), "orders": {known: known}})
    return plan


def _methods(words: Sequence[str], variants: Mapping[str, Any]) -> list[str]:
    known = [*method_names(), *variants]
    if list(words) == ["all"]:
        return known
    for word in words:
        if word not in known:
            raise ConfigError(f"methods holds {word!r}, which is no method{did_you_mean(word, known)}, or all")
    return list(words)
