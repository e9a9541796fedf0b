"""What a study's tables and charts are made from: its cells, and the numbers that were worked out of them.

A cell is one run: a method under one task order and one seed. An ``order`` of None stands for all orders taken together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keeplora.evaluation.stats import Interval, Ranking
from keeplora.report.kinds import CLASSIFICATION, IN_POINTS, Kind
from keeplora.report.runs import Run

FINISHED = "finished"
FEWEST = 3
"""Seeds from which on a mean may be called the best."""


@dataclass(frozen=True)
class StudyCell:
    """One run of a study. ``state`` is "pending", "running", "interrupted", "failed" or "finished"; ``error`` says why."""

    method: str
    order: str
    seed: int
    state: str
    path: Path
    run: Run | None = None
    error: str = ""
    dropped_bytes: int | None = None

    @property
    def finished(self) -> bool:
        return self.state == FINISHED and self.run is not None

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The metrics of a finished cell; empty for any other."""
        return self.run.metrics if self.finished and self.run else {}

    @property
    def place(self) -> str:
        """The cell in words.

        >>> StudyCell("lora", "2", 1, "failed", Path("x")).place
        'lora, order 2, seed 1'
        """
        return f"{self.method}, order {self.order}, seed {self.seed}"

    @property
    def progress(self) -> str:
        """Its state, with the tasks that are done where there are some."""
        if self.run is None or self.finished or not self.run.done:
            return self.state
        return f"{self.state}, {self.run.done} of {len(self.run.tasks)} tasks"


@dataclass(frozen=True)
class MethodRow:
    """A method: its name in configurations, its title in tables, the index of its colour and marker, and of what a variant is
    one: whether it learns, and whether it is an upper bound (`BOUNDS`).
    """

    name: str
    title: str
    index: int
    learns: bool = True
    bound: bool = False


@dataclass(frozen=True)
class OrderRow:
    """A task order: its label and the names of its tasks (empty while no cell of it has begun)."""

    label: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A method less the reference method on the same cells, in points; the p values are adjusted over the methods."""

    interval: Interval
    t_p: float | None = None
    t_p_holm: float | None = None
    wilcoxon_p: float | None = None
    wilcoxon_n: int = 0
    wilcoxon_smallest: float | None = None
    wilcoxon_p_holm: float | None = None

    @property
    def pairs(self) -> int:
        """Seeds that both methods have."""
        return self.interval["n"]


@dataclass(frozen=True)
class MetricRanking:
    """Friedman and Nemenyi for one metric; ``left_out`` names the methods that share too few cells."""

    metric: str
    name: str
    methods: tuple[str, ...]
    ranking: Ranking
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeanMatrix:
    """Rows of accuracies or scores averaged over the seeds of one method and order; None where no seed has a value."""

    tasks: tuple[str, ...]
    probes: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    probe_rows: tuple[tuple[float | None, ...], ...]
    n: int


Key = tuple[str, str | None, str]
"""(method, order or None for all orders, metric)."""


@dataclass(frozen=True)
class Study:
    """Everything that the tables, the charts and the page show.

    ``order_means`` are over the seeds that have every order, so that orders differ in nothing but the order.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    cells: tuple[StudyCell, ...]
    methods: tuple[MethodRow, ...]
    orders: tuple[OrderRow, ...]
    seeds: tuple[int, ...]
    against: str | None
    estimates: Mapping[Key, Interval]
    order_means: Mapping[Key, float]
    counts: Mapping[tuple[str, str | None], int]
    differences: Mapping[Key, Difference]
    untouched: Mapping[tuple[str | None, str], float]
    rankings: tuple[MetricRanking, ...]
    matrices: Mapping[tuple[str, str], MeanMatrix]
    costs: Mapping[str, Mapping[str, float]]
    settings: Sequence[tuple[str, Mapping[str, str]]] = ()
    notes: tuple[str, ...] = ()
    kind: Kind = CLASSIFICATION

    @property
    def scopes(self) -> list[str | None]:
        """What gets a table: all orders together, then each by itself; just the one where there is one."""
        return [None] if len(self.orders) == 1 else [None, *(order.label for order in self.orders)]

    @property
    def missing(self) -> list[StudyCell]:
        return [cell for cell in self.cells if not cell.finished]

    @property
    def failed(self) -> list[StudyCell]:
        return [cell for cell in self.cells if cell.state == "failed"]

    def title(self, method: str) -> str:
        return next((row.title for row in self.methods if row.name == method), method)

    def scope_title(self, scope: str | None) -> str:
        """A scope in words: its order, or how many orders it averages over."""
        if scope is not None:
            return f"order {scope}"
        return f"order {self.orders[0].label}" if len(self.orders) == 1 else f"all {len(self.orders)} orders"

    def n_text(self, method: str, scope: str | None) -> str:
        """What is behind a row: "3" seeds of one order, "3 × 2" seeds times orders, "0 (+1)" for a cell of no whole seed."""
        seeds = self.counts.get((method, scope), 0)
        if scope is not None or len(self.orders) == 1:
            return str(seeds)
        cells = sum(1 for cell in self.cells if cell.method == method and cell.finished)
        spare = cells - seeds * len(self.orders)
        text = f"{seeds} × {len(self.orders)}" if seeds else "0"
        return text if not spare else f"{text} (+{spare})"

    def best(self, scope: str | None, metric: str, higher: bool) -> set[str]:
        """The methods at the `top`, where none of these means is of fewer than `FEWEST` seeds."""
        top = self.top(scope, metric, higher)
        return top if all(self.estimates[name, scope, metric]["n"] >= FEWEST for name in top) else set()

    def top(self, scope: str | None, metric: str, higher: bool) -> set[str]:
        """The methods whose shown mean is highest (lowest), none where all are equal.

        Bounds never, and what never learns not in forgetting and BWT.
        """
        shown = {
            row.name: round(found["mean"], 1)
            for row in self.methods
            if (found := self.estimates.get((row.name, scope, metric))) is not None
            and not row.bound
            and (row.learns or metric not in IN_POINTS)
        }
        if len(set(shown.values())) < 2:
            return set()
        top = max(shown.values()) if higher else min(shown.values())
        return {name for name, value in shown.items() if value == top}
