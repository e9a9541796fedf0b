"""How full every target is, how many more tasks fit, and what becomes of a target that is full (`when_full`)."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeplora.errors import CapacityError, KeepLoraError
from keeplora.math import held_bytes
from keeplora.tuner.audit import TableText
from keeplora.tuner.basis import StoredStart
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.persistence import ledger_config
from keeplora.tuner.protect import GIVEN_UP, remaining_explained
from keeplora.tuner.targets import Target

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.ledger import Ledger, TaskRecord

RECENT = 5
"""How many of the last tasks the forecast looks at."""
STATES = ("free", "last", "tight", "full", "frozen")
REMEDY = "lower energy_features or energy_weights, lower r, or set when_full: shrink"


@dataclass(frozen=True)
class Forecast:
    """How many more tasks fit; None stands for no end in sight.

    Attributes:
        likely: if every task is like the last. low, high: if every task is like the greediest and like the most frugal of the
            recent ones. tasks: how many tasks that looks back on; with one the range is no range.
    """

    likely: int | None
    low: int | None
    high: int | None
    tasks: int

    def __str__(self) -> str:
        if not self.tasks:
            return "–"
        if self.low == self.high == self.likely:
            return _count(self.likely)
        return f"{_count(self.likely)} ({_count(self.low)}–{_count(self.high)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"likely": self.likely, "low": self.low, "high": self.high, "tasks": self.tasks}


def _count(value: int | None) -> str:
    return "∞" if value is None else str(value)


def tasks_that_fit(left: int, wanted: int, growth: int) -> int | None:
    """How many tasks in a row still find their whole rank free; None: no end in sight.

    What a task adds needs no room of its own: where it runs into the width, every dimension is protected.

    Args:
        left: dimensions that are not protected. wanted: the configured rank. growth: dimensions that each task adds.

    >>> tasks_that_fit(10, 2, 3), tasks_that_fit(10, 4, 3), tasks_that_fit(1, 2, 3), tasks_that_fit(10, 2, 0)
    (3, 3, 0, None)
    """
    if left < wanted:
        return 0
    return None if growth == 0 else (left - wanted) // growth + 1


@dataclass(frozen=True)
class LayerGauge:
    """One target.

    Attributes:
        width: dimensions of its input. wanted: the rank that a task asks for, min(r, in, out).
        used: protected dimensions at the start and after each task.
        growth: dimensions that each of the recent tasks added, the last one last. frozen: not adapted any more.
        explained: per task ε_t as it is now, None where the task protected nothing here.
    """

    layer: str
    tower: str
    depth: int | None
    width: int
    wanted: int
    used: tuple[int, ...]
    growth: tuple[int, ...]
    frozen: bool
    explained: tuple[float | None, ...]

    @property
    def left(self) -> int:
        """Dimensions that are not protected."""
        return self.width - self.used[-1]

    @property
    def fill(self) -> float:
        """Protected share of the dimensions, 0 to 1."""
        return self.used[-1] / self.width

    @property
    def least(self) -> float | None:
        """The smallest of the tasks' ε_t; None before the first."""
        return min((share for share in self.explained if share is not None), default=None)

    @property
    def forecast(self) -> Forecast:
        """How many more tasks like the recent ones fit."""
        if self.frozen:
            return Forecast(0, 0, 0, len(self.growth))
        if not self.growth:
            return Forecast(None, None, None, 0)
        likely, low, high = (
            tasks_that_fit(self.left, self.wanted, g) for g in (self.growth[-1], max(self.growth), min(self.growth))
        )
        return Forecast(likely, low, high, len(self.growth))

    @property
    def state(self) -> str:
        """ "free"; "last": one more task like the last fits; "tight": none does; "full": nothing is left; "frozen"."""
        if self.frozen:
            return "frozen"
        if self.left == 0:
            return "full"
        if self.left < self.wanted:
            return "tight"
        return "last" if self.forecast.likely == 1 else "free"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "layer": self.layer, "tower": self.tower, "depth": self.depth, "in": self.width, "rank": self.wanted,
            "used": list(self.used), "left": self.left, "state": self.state, "forecast": self.forecast.to_dict(),
            "explained": list(self.explained),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Capacity:
    """All targets; printing it shows them as a table.

    Attributes:
        tasks: names, in order. bytes: what the subspaces take, each by its smaller side. budget: `max_basis_bytes`.
        given_up: what the budget took: ``after`` (the task whose end it was), ``layer``, ``task``, ``before``, ``now`` (ε_t).
    """

    layers: tuple[LayerGauge, ...]
    tasks: tuple[str, ...]
    policy: str
    bytes: int
    budget: int | None
    given_up: tuple[dict[str, Any], ...]

    @property
    def used(self) -> int:
        """Protected dimensions, over all targets."""
        return sum(layer.used[-1] for layer in self.layers)

    @property
    def width(self) -> int:
        """Dimensions, over all targets."""
        return sum(layer.width for layer in self.layers)

    def until(self, share: float) -> Forecast:
        """How many more tasks fit until this share of the targets is full: 0 the first one, 0.5 half, 1 all."""
        place = min(len(self.layers) - 1, max(0, math.ceil(share * len(self.layers)) - 1))
        found = [layer.forecast for layer in self.layers]
        tasks = max((f.tasks for f in found), default=0)
        values = [[math.inf if v is None else v for v in vs] for vs in ((f.likely, f.low, f.high) for f in found)]
        picked = [sorted(column)[place] for column in zip(*values, strict=True)]
        likely, low, high = (None if v == math.inf else int(v) for v in picked)
        return Forecast(likely, low, high, tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what results.json holds under ``capacity``."""
        return {
            "tasks": list(self.tasks), "when_full": self.policy, "used": self.used, "left": self.width - self.used,
            "bytes": self.bytes, "max_basis_bytes": self.budget,
            "forecast": {name: self.until(share).to_dict() for name, share in MILESTONES.items()},
            "layers": [layer.to_dict() for layer in self.layers], "given_up": [dict(entry) for entry in self.given_up],
            "notes": self.notes(),
        }  # fmt: skip

    def notes(self) -> list[str]:
        """What the table does not say, a sentence each."""
        share = self.used / max(1, self.width)
        out = [
            f"In all {self.used} of {self.width} dimensions are protected ({100 * share:.0f} %), in {size(self.bytes)}"
        ]
        out[0] += f" of {size(self.budget)} (max_basis_bytes)." if self.budget is not None else "."
        first, half, every = (self.until(share) for share in MILESTONES.values())
        if first.tasks:
            looked = f"the last {first.tasks} tasks" if first.tasks > 1 else "one task, so without a range"
            out.append(
                f"Tasks that still fit, if they are like the last: {first} until the first target is full, {half} until half "
                f"are, {every} until all are (from {looked}; when_full: {self.policy})."
            )
        worst = sorted(self.given_up, key=lambda entry: entry["now"] - entry["before"])
        for entry in worst[:SHOWN]:
            out.append(
                f"Given up for the budget after {entry['after']!r}: {entry['layer']}, task {entry['task']!r}, "
                f"{100 * entry['before']:.2f} % → {100 * entry['now']:.2f} %."
            )
        if len(worst) > SHOWN:
            out.append(f"{len(worst) - SHOWN} smaller losses of protection are in the JSON alone.")
        return out

    def table(self) -> Table:
        """A row per target: a bar of what the weights (▒) and the tasks (█) protect, in colour where there is any.

        "least ε" is the smallest share of a task's energy that is protected now.
        """
        table = Table(box=box.SIMPLE_HEAD, title="Capacity: protected input dimensions", title_justify="left")
        for header in ("layer", "protected", "used", "left", "r", "state", "tasks that fit", "least ε"):
            left = header in ("layer", "protected", "state")
            table.add_column(
                header, justify="left" if left else "right", no_wrap=header == "protected", overflow="fold"
            )
        for layer in self.layers:
            style, name = STYLES[layer.state], layer.layer
            shown = name if len(name) <= NAME else f"…{name[-NAME + 1 :]}"
            table.add_row(
                Text(shown), _bar(layer, style), f"{layer.used[-1]}/{layer.width}", str(layer.left), str(layer.wanted),
                Text(layer.state, style=style), str(layer.forecast), _percent(layer.least),
            )  # fmt: skip
        return table

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=130, color_system=None).print(self.table())
        return TableText(stream.getvalue() + "".join(f"{note}\n" for note in self.notes()))


SHOWN = 8
MILESTONES = {"first": 0.0, "half": 0.5, "all": 1.0}
STYLES = {"free": "green", "last": "yellow", "tight": "dark_orange", "full": "red", "frozen": "blue"}
BAR = 20
NAME = 34
"""Characters of a layer's name that a table of 120 columns has room for."""


def _bar(layer: LayerGauge, style: str) -> Text:
    start, now = (round(BAR * used / layer.width) for used in (layer.used[0], layer.used[-1]))
    now = min(now, BAR - 1) if layer.left else now  # a full bar is a full layer
    start = min(start, now)
    bar = Text("▒" * start, style="dim")
    return bar.append("█" * (now - start), style=style).append("·" * (BAR - now), style="dim")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def size(n: int | None) -> str:
    """Bytes for a person.

    >>> size(700), size(3 * 2**20)
    ('700 bytes', '3.0 MiB')
    """
    if n is None:
        return "–"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} bytes"


def gauge(learner: ContinualLearner) -> Capacity:
    """The capacity of a learner's targets.

    Raises:
        KeepLoraError: the method protects nothing.
    """
    if not learner.protects:
        raise KeepLoraError(
            f"{type(learner).__name__} protects no subspace, so no capacity is used up; ask a method that does (keeplora++, "
            "keeplora, inflora)"
        )
    start = {name: p for name, (_, p) in learner.U.start_dims().items()}
    return _gauge(learner.targets, start, learner.history, learner.config)


def gauge_ledger(ledger: Ledger) -> Capacity:
    """The same from a ledger alone: no model is loaded.

    Raises:
        KeepLoraError: its method protects nothing.
    """
    start = {name: p for name, (_, p) in StoredStart(ledger.path / "base.safetensors").dims().items()}
    if not start:
        raise KeepLoraError(f"{ledger.path}: its method protects no subspace, so no capacity is used up")
    targets = [Target(**entry) for entry in ledger.head["targets"]]
    return _gauge(targets, start, ledger.history(), ledger_config(ledger))


def _gauge(
    targets: Sequence[Target], start: Mapping[str, int], history: Sequence[TaskRecord], config: KeepLoraConfig
) -> Capacity:
    frozen = set().union(*(record.info.get("frozen", ()) for record in history))
    layers = []
    for t in targets:
        used, growth = [start[t.name]], []
        for record in history:
            used.append(record.used.get(t.name, used[-1]))
            if t.name in record.explained:
                growth.append(max(0, used[-1] - used[-2]))
        layers.append(
            LayerGauge(
                t.name, t.tower, t.depth, t.n_in, wanted_rank(t), tuple(used), tuple(growth[-RECENT:]), t.name in frozen,
                tuple(remaining_explained(history, t.name)),
            )
        )  # fmt: skip
    given_up = [
        {"after": record.name, "layer": layer, "task": task, "before": was, "now": now}
        for record in history
        for layer, tasks in sorted(record.info.get(GIVEN_UP, {}).items())  # as JSON sorts them
        for task, (was, now) in sorted(tasks.items())
    ]
    held = sum(held_bytes(layer.width, layer.used[-1]) for layer in layers)
    names = tuple(record.name for record in history)
    return Capacity(tuple(layers), names, config.when_full, held, config.max_basis_bytes, tuple(given_up))


def wanted_rank(target: Target) -> int:
    """The rank that a task asks for at a target: the configured one, or less where its matrix has less."""
    return min(target.r, target.n_in, target.n_out)


def frozen_targets(learner: ContinualLearner, name: str) -> frozenset[str]:
    """The targets that task ``name`` may not adapt, by ``config.when_full``; asked before anything of it is looked at.

    Raises:
        CapacityError: "raise", and a target has not its rank left; or "freeze", and all targets are frozen.
    """
    policy = learner.config.when_full
    if not learner.protects or policy == "shrink":
        return frozenset()
    used = learner.U.dims()
    tight = [t for t in learner.targets if t.n_in - used[t.name] < wanted_rank(t)]
    if policy == "raise" and tight:
        told = ", ".join(f"{t.name} ({t.n_in - used[t.name]} left, rank {wanted_rank(t)})" for t in tight[:3])
        raise CapacityError(
            f"task {name!r} is not started (when_full: raise): {len(tight)} of {len(learner.targets)} targets have not the "
            f"room for their rank: {told}{', …' if len(tight) > 3 else ''}; {REMEDY} or freeze"
        )
    frozen = {t.name for t in tight} if policy == "freeze" else set()
    frozen |= {layer for record in learner.records for layer in record.info.get("frozen", ())}
    if len(frozen) == len(learner.targets):
        raise CapacityError(
            f"task {name!r} cannot be learned: all {len(frozen)} targets are full and frozen (when_full: freeze); {REMEDY}"
        )
    return frozenset(frozen)


def warn_before_full(learner: ContinualLearner) -> None:
    """After a task: name the targets that have room for one more task like it, or for none; once for each."""
    history = learner.history
    states = {layer.layer: layer for layer in gauge(learner).layers}
    start = {name: p for name, (_, p) in learner.U.start_dims().items()}
    before = {x.layer: x.state for x in _gauge(learner.targets, start, history[:-1], learner.config).layers}
    one = [x for x in states.values() if x.state == "last" and before[x.layer] == "free"]
    none = [x for x in states.values() if x.state in ("tight", "full") and before[x.layer] in ("free", "last")]
    if not one and not none:
        return
    then = {"shrink": "rank goes down", "freeze": "target is frozen", "raise": "next task is refused"}
    parts = [
        f"{len(found)} of {len(learner.targets)} targets have {room}: {_names(found)}"
        for found, room in ((none, "no room for another task like it"), (one, "room for one more task like it"))
        if found
    ]
    warnings.warn(
        f"after task {history[-1].name!r} {'; '.join(parts)}. When full, the {then[learner.config.when_full]} (when_full: "
        f"{learner.config.when_full}); `capacity()` shows all",
        stacklevel=2,
    )


def _names(found: Sequence[LayerGauge]) -> str:
    told = ", ".join(f"{x.layer} ({x.left} of {x.width} dimensions left)" for x in found[:3])
    return f"{told}{', …' if len(found) > 3 else ''}"
