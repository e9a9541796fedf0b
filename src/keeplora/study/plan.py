"""What a study runs: methods × seeds × orders over one suite or experiment, from a YAML file and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, did_you_mean
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.config_errors import Problem, raise_problems
from keeplora.files import expand, real_path
from keeplora.methods import method_names
from keeplora.study.plan_values import (
    KEYS,
    OWN,
    dotted,
    parse_methods,
    parse_orders,
    parse_seeds,
    parse_words,
    read_per_method,
    read_variants,
    safe,
    together,
)
from keeplora.yaml_text import KeyPath, read_yaml

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
        return f"cells/{safe(self.method)}/order-{safe(self.order)}/seed-{self.seed}"


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
        values = dotted(self.per_method.get(self.method_of(method), {}))
        values |= self.set
        values |= dotted({key: value for key, value in self.variants.get(method, {}).items() if key != "method"})
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
                    told = str(error)
                    if method in self.variants:
                        told = f"variants.{method}: {told.removeprefix('command line: ')}"
                    problems.setdefault(told)
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
    problems = [
        Problem((k,), f"unknown key {k!r}{did_you_mean(str(k), KEYS, 'docs/comparing.md')}")
        for k in values
        if k not in KEYS
    ]
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

    problems += [
        f"unknown key {key!r}{did_you_mean(key, KEYS, 'docs/comparing.md')}" for key in values if key not in KEYS
    ]
    suite, experiment, name, data = (kind(key, str) for key in ("suite", "experiment", "name", "data"))
    if (suite is None) == (experiment is None):
        problems.append(
            "give either a suite (suite: demo-small) or an experiment's file (experiment: FILE), and not both"
        )
    variants = take("variants", read_variants, {})
    methods = take("methods", lambda v: parse_methods(parse_words(v, "methods"), variants), list(variants))
    if values.get("methods") is None and not values.get("variants"):
        problems.append(f"methods is missing; give some of {', '.join(method_names())}, or all")
    seeds = take("seeds", parse_seeds, [0])
    orders = take("orders", parse_orders, {})
    settings = kind("set", Mapping) or {}
    settings = dotted(settings)
    for key in settings:
        if key in OWN or key.split(".")[0] == "order":
            problems.append(f"set: {key} is the study's own; use {OWN.get(key, 'orders')}: in place of it")
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
        output=expand(output or f"runs/compare-{safe(name)}"), set=settings,
        per_method={m: own for m, own in per_method.items() if m in {variants.get(n, {}).get("method", n) for n in methods}},
        variants={n: variants[n] for n in methods if n in variants}, against=against, jobs=jobs, threads=threads,
        keep_ledgers=keep is not False,
    )  # fmt: skip
    if not orders and (known := plan.config(plan.methods[0], LISTED).order_name):
        # The suite's first order has a name: so it stays the same order when a second one joins.
        plan = StudyPlan(**{**vars(plan), "orders": {known: known}})
    return plan
