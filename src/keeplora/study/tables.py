"""From cells to numbers: means with intervals, paired differences, rankings, mean matrices, cost.

The unit of every interval is the seed. Where a study has several task orders, a seed's value is first averaged over the
orders, and the t interval is taken over seeds: runs of one seed share their random starts, so its orders are not so
many independent runs. A seed without all orders is left out of the pooled tables and is in those of its orders.
Such an interval speaks of other seeds on these orders and pictures, not of other orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.evaluation.stats import (
    Interval,
    friedman_nemenyi,
    holm,
    mean_interval,
    paired_difference,
    paired_t_test,
    wilcoxon_signed_rank,
)
from keeplora.report.compare import untouched
from keeplora.report.kinds import CLASSIFICATION, Kind
from keeplora.report.runs import BOUNDS, learning_settings
from keeplora.report.study_data import (
    Difference,
    Key,
    MeanMatrix,
    MethodRow,
    MetricRanking,
    OrderRow,
    Study,
    StudyCell,
)

COSTS = (
    "seconds", "statistics_seconds", "training_seconds", "evaluation_seconds", "peak_memory_bytes", "state_bytes",
    "trained_parameters",
)  # fmt: skip


class _Values:
    """A metric's value by method, order and seed, from finished cells alone."""

    def __init__(self, cells: Iterable[StudyCell], orders: Sequence[str]) -> None:
        self.orders = list(orders)
        self._of: dict[tuple[str, str, int], Mapping[str, float | None]] = {
            (cell.method, cell.order, cell.seed): cell.metrics for cell in cells if cell.finished
        }

    def get(self, method: str, order: str, seed: int, metric: str) -> float | None:
        return self._of.get((method, order, seed), {}).get(metric)

    def seeds(self, method: str) -> list[int]:
        return sorted({seed for name, _, seed in self._of if name == method})

    def by_seed(self, method: str, scope: str | None, metric: str) -> dict[int, float]:
        """One value per seed: of one order, or the mean over all orders for the seeds that have every one."""
        orders = self.orders if scope is None else [scope]
        found: dict[int, float] = {}
        for seed in self.seeds(method):
            values = [self.get(method, order, seed, metric) for order in orders]
            known = [value for value in values if value is not None]
            if known and len(known) == len(values):
                found[seed] = fmean(known)
        return found

    def order_means(self, method: str, metric: str) -> dict[str, float]:
        """Each order's mean over the seeds that have every order: the orders are compared on the same seeds."""
        seeds = list(self.by_seed(method, None, metric))
        of = {order: self.by_seed(method, order, metric) for order in self.orders} if seeds else {}
        return {order: fmean(values[seed] for seed in seeds) for order, values in of.items()}

    def whole_seeds(self, method: str, scope: str | None) -> int:
        orders = self.orders if scope is None else [scope]
        return sum(all((method, order, seed) in self._of for order in orders) for seed in self.seeds(method))

    def by_cell(self, method: str, scope: str | None, metric: str) -> dict[tuple[str, int], float]:
        orders = self.orders if scope is None else [scope]
        return {
            (order, seed): value
            for order in orders
            for seed in self.seeds(method)
            if (value := self.get(method, order, seed, metric)) is not None
        }


def choose_reference(methods: Sequence[str], wanted: str | None) -> str | None:
    """The method that the others are held against: the one asked for, else lora, else the first that is not zero-shot.

    >>> choose_reference(["zero-shot", "ewc", "keeplora"], None)
    'ewc'
    """
    if wanted is not None:
        if wanted not in methods:
            raise ConfigError(f"against: {wanted!r} is not a method of this study{did_you_mean(wanted, methods)}")
        return wanted
    if len(methods) < 2:
        return None
    return "lora" if "lora" in methods else next((name for name in methods if name != "zero-shot"), methods[0])


def _difference(values: _Values, method: str, against: str, scope: str | None, metric: str) -> Difference | None:
    """Interval and tests over seeds: the cells of one share their random starts, and are no values of their own."""
    mine, theirs = (values.by_seed(name, scope, metric) for name in (method, against))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    a, b = [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    t_p = paired_t_test(a, b)
    ranks = wilcoxon_signed_rank(a, b) if t_p is not None else None
    return Difference(
        interval=paired_difference(a, b),
        t_p=t_p,
        wilcoxon_p=ranks.p if ranks else None,
        wilcoxon_n=ranks.n if ranks else 0,
        wilcoxon_smallest=ranks.smallest if ranks else None,
    )


def _differences(
    values: _Values, methods: Sequence[str], against: str, scopes: Iterable[str | None], kind: Kind
) -> dict[Key, Difference]:
    found: dict[Key, Difference] = {}
    for scope in scopes:
        for metric, *_ in kind.metrics:
            family = {
                name: one
                for name in methods
                if name != against and (one := _difference(values, name, against, scope, metric)) is not None
            }
            t = holm([one.t_p for one in family.values()])
            w = holm([one.wilcoxon_p for one in family.values()])
            for (name, one), t_p, w_p in zip(family.items(), t, w, strict=True):
                found[name, scope, metric] = Difference(
                    **{**vars(one), "t_p_holm": t_p, "wilcoxon_p_holm": w_p},
                )
    return found


def _ranking(values: _Values, methods: Sequence[str], metric: str, name: str) -> MetricRanking | None:
    """Blocks are the (order, seed) cells that every ranked method has; who has the fewest cells goes first."""
    have = {m: values.by_cell(m, None, metric) for m in methods}
    have = {m: cells for m, cells in have.items() if cells}
    while len(have) >= 3:
        shared = sorted(set.intersection(*(set(cells) for cells in have.values())))
        most = max(len(cells) for cells in have.values())
        poorest = min(reversed(have), key=lambda m: len(have[m]))
        # A method with less than half of the cells would cost the others more blocks than it brings.
        if len(shared) >= 2 and 2 * len(have[poorest]) >= most:
            ranking = friedman_nemenyi([[have[m][block] for m in have] for block in shared])
            return MetricRanking(metric, name, tuple(have), ranking, tuple(m for m in methods if m not in have))
        del have[poorest]
    return None


def _mean_rows(matrices: Sequence[Sequence[Sequence[float | None]]]) -> tuple[tuple[float | None, ...], ...]:
    """Cell by cell over the matrices that have a value there; they may have different numbers of rows."""
    height, width = max(map(len, matrices), default=0), max((len(row) for m in matrices for row in m), default=0)

    def mean(i: int, j: int) -> float | None:
        known = [m[i][j] for m in matrices if i < len(m) and j < len(m[i]) and m[i][j] is not None]
        return fmean(v for v in known if v is not None) if known else None

    return tuple(tuple(mean(i, j) for j in range(width)) for i in range(height))


def _matrices(cells: Sequence[StudyCell]) -> dict[tuple[str, str], MeanMatrix]:
    groups: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in cells:
        if cell.finished:
            groups.setdefault((cell.method, cell.order), []).append(cell)
    found = {}
    for key, group in groups.items():
        runs = [cell.run for cell in group if cell.run is not None]
        found[key] = MeanMatrix(
            tuple(runs[0].tasks), tuple(runs[0].probes), _mean_rows([r.accuracy for r in runs]),
            _mean_rows([r.probe_accuracy for r in runs]), len(runs),
        )  # fmt: skip
    return found


def _costs(cells: Sequence[StudyCell], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means over the finished cells that tell a cost; a cost that none tells is absent."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        runs = [cell.run for cell in cells if cell.method == method and cell.finished and cell.run is not None]
        told = {key: [v for run in runs if isinstance(v := run.cost.get(key), int | float)] for key in COSTS}
        found[method] = {key: fmean(values) for key, values in told.items() if values}
    return found


def _untouched(cells: Sequence[StudyCell], orders: Sequence[str], kind: Kind) -> dict[tuple[str | None, str], float]:
    """Metrics of the model that is never trained, from row 0; over all orders only where every order has begun."""
    found: dict[tuple[str | None, str], float] = {}
    for order in orders:
        run = next((c.run for c in cells if c.order == order and c.run is not None and c.run.accuracy), None)
        if run is not None:
            found |= {(order, key): value for key, value in untouched(run).items() if value is not None}
    for metric in kind.percents:
        values = [found[order, metric] for order in orders if (order, metric) in found]
        if values and len(values) == len(orders):
            found[None, metric] = fmean(values)
    return found


class Settings(NamedTuple):
    """What configurations say: rows of settings that differ between methods, and notes on those that should not differ."""

    rows: list[tuple[str, dict[str, str]]]
    notes: list[str]


def settings_of(configs: Sequence[tuple[StudyCell, Mapping[str, Any]]], methods: Sequence[str]) -> Settings:
    """Hold the cells' configurations against each other: within a method they must agree, between methods they may differ."""
    by_method: dict[str, dict[str, dict[str, int]]] = {}
    for cell, config in configs:
        mine = by_method.setdefault(cell.method, {})
        for key, text in learning_settings(config).items():
            counts = mine.setdefault(key, {})
            counts[text] = counts.get(text, 0) + 1
    notes = []
    for method, keys in by_method.items():
        runs = sum(1 for cell, _ in configs if cell.method == method)
        for key, counts in keys.items():
            if len(counts) > 1 or sum(counts.values()) < runs:
                seen = {**counts, **({"not set": runs - sum(counts.values())} if sum(counts.values()) < runs else {})}
                told = ", ".join(f"{text} in {n}" for text, n in sorted(seen.items(), key=lambda item: -item[1]))
                notes.append(
                    f"{method}: its runs differ in {key} ({told}), so their mean is one over different settings."
                )
    shown = {m: {key: " / ".join(counts) for key, counts in keys.items()} for m, keys in by_method.items()}
    rows = []
    for key in dict.fromkeys(key for keys in shown.values() for key in keys):
        values = {m: shown[m].get(key, "–") for m in methods if m in shown}
        if len(set(values.values())) > 1 or key in ("training.learning_rate", "training.epochs"):
            rows.append((key, values))
    return Settings(rows, notes)


def kind_of(cells: Iterable[StudyCell]) -> Kind:
    """The kind of the cells' runs; classification where none has begun. Refuses a mixture: their metrics differ."""
    seen = {cell.run.kind.name: cell for cell in cells if cell.run is not None and (cell.run.results or cell.run.sets)}
    if len(seen) > 1:
        told = " and ".join(f"{cell.place} {cell.run.kind.does} ({name})" for name, cell in seen.items() if cell.run)
        raise KeepLoraError(f"{told}: their metrics are not the same, so they cannot stand in one table")
    return next((cell.run.kind for cell in seen.values() if cell.run), CLASSIFICATION)


def summarise(
    cells: Sequence[StudyCell], *, name: str, against: str | None = None, methods: Sequence[str] | None = None,
    orders: Sequence[str] | None = None, titles: Mapping[str, str] | None = None,
    configs: Sequence[tuple[StudyCell, Mapping[str, Any]]] = (), facts: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Study:  # fmt: skip
    """All numbers of a study from its cells, however many of them are finished.

    Parameters
    ----------
    cells : one per method, order and seed, of runs that may stand in one table.
    methods, orders : in the order of tables; None: as they first come.
    against : the method that differences are taken against; None: `choose_reference`.
    configs : configurations of the cells that have one, for the table of settings.
    """
    methods = list(dict.fromkeys(methods or [cell.method for cell in cells]))
    labels = list(dict.fromkeys(orders or [cell.order for cell in cells]))
    reference = choose_reference(methods, against)
    kind = kind_of(cells)
    values = _Values(cells, labels)
    scopes: list[str | None] = [None, *labels]
    estimates: dict[Key, Interval] = {}
    for method in methods:
        for scope in scopes:
            for metric, *_ in kind.metrics:
                if by_seed := values.by_seed(method, scope, metric):
                    estimates[method, scope, metric] = mean_interval(list(by_seed.values()))
    # A variant stands under its own name: its runs call themselves by the method that it is one of, as its siblings' do.
    known_titles = {
        c.method: c.run.label for c in cells if c.run is not None and c.run.results and c.run.method == c.method
    }
    colours = {m: i for i, m in enumerate(m for m in methods if m != "zero-shot")}
    runs = {c.method: c.run for c in cells if c.run is not None and c.run.results}
    rows = tuple(
        MethodRow(
            m, known_titles.get(m) or (titles or {}).get(m, m), colours.get(m, 5),
            runs[m].learns if m in runs else m != "zero-shot", runs[m].bound if m in runs else m in BOUNDS,
        )
        for m in methods
    )  # fmt: skip
    tasks = {c.order: tuple(c.run.tasks) for c in reversed(cells) if c.run is not None and c.run.tasks}
    settings = settings_of(configs, methods)
    ranked = (_ranking(values, methods, key, label) for key, label, *_ in kind.metrics if key in kind.percents)
    return Study(
        name=name, facts=tuple(facts), cells=tuple(cells), methods=rows,
        orders=tuple(OrderRow(label, tasks.get(label, ())) for label in labels),
        seeds=tuple(sorted({cell.seed for cell in cells})), against=reference, estimates=estimates,
        order_means={
            (method, order, metric): value
            for method in methods for metric, *_ in kind.metrics
            for order, value in values.order_means(method, metric).items()
        },
        counts={(m, scope): values.whole_seeds(m, scope) for m in methods for scope in scopes},
        differences=_differences(values, methods, reference, scopes, kind) if reference else {},
        untouched=_untouched(cells, labels, kind), rankings=tuple(one for one in ranked if one is not None),
        matrices=_matrices(cells), costs=_costs(cells, methods), settings=settings.rows,
        notes=(*notes, *settings.notes), kind=kind,
    )  # fmt: skip
