"""Methods by name. A new one is one file in this folder that ends in a `register` call."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.tuner import ContinualLearner, KeepLoraConfig

ONE_SCALE = {"gamma": 1.0, "schedule": "constant"}
"""`KeepLoraConfig` fields of a method whose layers all move at one scale."""

#: Where tables show which method: in this order; files that are not named here come after.
METHOD_MODULES = (
    "zero_shot", "full_finetuning", "lora", "regularised", "distillation", "wise_ft", "gpm", "inflora", "o_lora", "reg_lora",
    "sd_lora", "moe_lora", "nusa", "rail", "replay", "keeplora", "joint", "oracle",
)  # fmt: skip

ALL_KINDS = ("classification", "generation")
"""What a model may do: name pictures (a dual encoder), or answer in words."""
CLASSIFICATION = ("classification",)
"""``kinds`` of a method that needs class prompts, class scores or image features."""

ENTRY_POINTS = "keeplora.methods"
"""Entry-point group of other packages: each value is a module that calls `register` when it is imported."""

Space = tuple[str, float, float] | tuple[str, list[Any]]
"""One axis of a search: ("log", low, high), ("uniform", low, high) or ("choice", values)."""
LEARNING_RATE: dict[str, Space] = {"training.learning_rate": ("log", 1e-4, 1e-2)}
"""For low-rank factors."""
FULL_LEARNING_RATE: dict[str, Space] = {"training.learning_rate": ("log", 1e-5, 1e-3)}
"""For whole weights, which diverge at rates that suit factors."""


@dataclass(frozen=True)
class Method:
    """A way to learn tasks in sequence.

    Attributes:
        name: as in configs and on the command line. title: as in tables.
        learner: the class that does it; its interface is `ContinualLearner`'s.
        config: fields of `KeepLoraConfig` that define the method and win over what the user set.
        classifier: the "cls" variant, a trained class-weight head beside the class texts.
        trains: False for a method that learns nothing.
        summary: one line. paper: where it comes from.
        trained, state, extra_data, inference: what a task trains, what is kept from task to task, what data it needs beside
            the task's own, and what it costs at inference, in a few words for `keeplora methods`.
        task_identity: whether it must be told at test time which task a picture belongs to.
        kinds: the kinds of models that it can teach.
        learns_from_batches: whether the ``batches`` of `start_task` are what it learns from or keeps, so that videos come with
            all their frames there; else statistics are taken over them, of fewer frames.
        search: what `keeplora tune` varies, by dotted key.
    """

    name: str
    title: str
    learner: type[ContinualLearner]
    summary: str
    config: Mapping[str, Any] = field(default_factory=dict)
    classifier: bool = False
    trains: bool = True
    paper: str = ""
    trained: str = "A and B of every target"
    state: str = "nothing"
    extra_data: str = "none"
    inference: str = "none: merged"
    task_identity: bool = False
    kinds: tuple[str, ...] = ALL_KINDS
    learns_from_batches: bool = False
    search: Mapping[str, Space] = field(default_factory=lambda: dict(LEARNING_RATE))

    @property
    def unmergeable(self) -> str:
        """Why neither one adapter nor one checkpoint holds what it learned, in words that follow its name; empty where they
        do. The learner's class says it."""
        return self.learner.unmergeable

    def make_config(self, values: Mapping[str, Any]) -> KeepLoraConfig:
        """The learner's config: the user's values, then what defines the method."""
        return KeepLoraConfig(**{**values, **self.config})


_METHODS: dict[str, Method] = {}
_MODULE_OF: dict[str, str] = {}


def register(method: Method) -> Method:
    """Add a method to the registry."""
    _METHODS[method.name] = method
    _MODULE_OF[method.name] = sys._getframe(1).f_globals.get("__name__", "")
    return method


def _modules() -> list[str]:
    """Those of `METHOD_MODULES`, then any other file beside this one, then what other packages offer."""
    package = "keeplora.methods"
    folder = importlib.import_module(package).__path__
    found = [m.name for m in pkgutil.iter_modules(folder) if m.name not in (*METHOD_MODULES, "registry")]
    offered = sorted(point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS))
    return [*(f"{package}.{name}" for name in (*METHOD_MODULES, *sorted(found))), *offered]


def _load() -> dict[str, Method]:
    modules = _modules()
    for module in modules:
        importlib.import_module(module)
    place = {module: i for i, module in enumerate(modules)}  # not the order in which they happened to be imported
    return dict(sorted(_METHODS.items(), key=lambda item: place.get(_MODULE_OF[item[0]], len(modules))))


def method_names() -> list[str]:
    """All names, in the order in which tables show them."""
    return list(_load())


def get_method(name: str) -> Method:
    """A method by name; `ConfigError` with a suggestion if there is none."""
    methods = _load()
    if name not in methods:
        raise ConfigError(f"method: unknown name {name!r}{did_you_mean(name, methods)}")
    return methods[name]
