"""A long sequence, or many orders: what is left of each task with its age, of the probes, and what the order changes.

    keeplora compare studies/long.yaml
    python benchmarks/sequence.py runs/long --figure docs/images/long.png
    python benchmarks/sequence.py docs/evidence/long.json            # the kept numbers of the runs

Prints, as Markdown: every metric of both methods and their paired difference, once over orders (the seeds of an order averaged
first: would it be so in another order?) and once over seeds (the orders averaged first: would it be so with other luck?),
with the least and the largest difference of any order; the tasks learned so far, after five, ten, ... of them (does the
difference grow with the sequence?); what a task has lost so many tasks after it was learned; and in how many layers the method
could still learn (M4: a layer without residual dimensions sits the task out). Intervals are of 95 % (Student's t). Those over
the orders of one seed say nothing of other seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from study_runs import told  # the sibling script: this folder is sys.path[0]

from keeplora.evaluation.stats import mean_interval, paired_difference
from keeplora.files import atomic_write_json
from keeplora.study.collect import study_cells
from keeplora.study.store import StudyStore

METRICS = {
    "last": "Last", "average": "Avg", "transfer": "Transfer", "probe": "Probe", "forgetting": "Forgetting", "bwt": "BWT",
}  # fmt: skip
AFTER = (5, 10, 15)
AGES = ((1, 1), (2, 5), (6, 10), (11, 15), (16, 99))
Row = Mapping[str, Any]
"""A finished run: method, order, seed, metrics, ``accuracy`` (T + 1 rows of T, the first before any task), ``probes``
(T + 1 means), ``adapted`` (share of the layers with a rank above 0, per task; empty where the method has no layers to tell)."""


def read(study: Path) -> list[Row]:
    """The finished runs of a study's folder, or what `main` wrote."""
    if study.is_file():
        return json.loads(study.read_text(encoding="utf-8"))
    return [
        row_of(cell.method, cell.order, cell.seed, cell.run.results)
        for cell in study_cells(StudyStore(study).load())
        if cell.run is not None and cell.metrics
    ]


def row_of(method: str, order: str, seed: int, results: Mapping[str, Any]) -> Row:
    ranks = [layer["rank"] for layer in results.get("layers") or []]
    return {
        "method": method, "order": order, "seed": seed,
        "metrics": {name: round(results["metrics"][name], 3) for name in METRICS},
        "accuracy": [[round(value, 2) for value in after] for after in results["accuracy"]],
        "probes": [round(fmean(after), 2) for after in results["probe_accuracy"]],
        "adapted": [round(fmean(rank > 0 for rank in task), 4) for task in zip(*ranks, strict=True)],
    }  # fmt: skip


def lost_by_age(accuracy: Sequence[Sequence[float]]) -> dict[int, list[float]]:
    """Age (tasks learned since) → points lost since it was learned, for every task that has reached it.

    >>> lost_by_age([[0, 0, 0], [90, 0, 0], [80, 70, 0], [85, 60, 50]])
    {1: [10, 10], 2: [5]}
    """
    found: dict[int, list[float]] = defaultdict(list)
    last = len(accuracy) - 1
    for task in range(last):
        for after in range(task + 2, last + 1):
            found[after - task - 1].append(accuracy[task + 1][task] - accuracy[after][task])
    return dict(sorted(found.items()))


def learned_so_far(accuracy: Sequence[Sequence[float]]) -> list[float]:
    """Mean accuracy over the tasks learned so far, after each.

    >>> learned_so_far([[0, 0], [90, 0], [80, 70]])
    [90.0, 75.0]
    """
    return [fmean(accuracy[after][:after]) for after in range(1, len(accuracy))]


def by_unit(rows: Iterable[Row], unit: str, value: Callable[[Row], float]) -> dict[Any, float]:
    """Mean value of each order (``unit`` "order") or seed."""
    found: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        found[row[unit]].append(value(row))
    return {key: fmean(values) for key, values in sorted(found.items())}


def paired(rows: Sequence[Row], method: str, against: str) -> tuple[list[Row], list[Row]]:
    """The runs of both methods that share order and seed, in the same order, of the seeds in which no order is missing."""
    sides = [{(row["order"], row["seed"]): row for row in rows if row["method"] == m} for m in (method, against)]
    both = sides[0].keys() & sides[1].keys()
    orders = {order for order, _ in both}
    whole = [seed for seed in {s for _, s in both} if all((order, seed) in both for order in orders)]
    keys = sorted(key for key in both if key[1] in whole)
    return [sides[0][key] for key in keys], [sides[1][key] for key in keys]


def differences(ours: Sequence[Row], theirs: Sequence[Row], method: str, against: str) -> list[str]:
    """The table of metrics: both methods, and their difference over orders and over seeds."""
    units = {unit: len({row[unit] for row in ours}) for unit in ("order", "seed")}
    head = (
        f"| | {against} | {method} | difference over {units['order']} orders | over {units['seed']} seeds | by order |"
    )
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    values: dict[str, Callable[[Row], float]] = {
        title: lambda row, name=name: row["metrics"][name] for name, title in METRICS.items()
    }  # fmt: skip
    values["Probe, last"] = lambda row: row["probes"][-1]  # Probe is the mean over the sequence
    for title, value in values.items():
        means = [fmean(map(value, side)) for side in (theirs, ours)]
        columns = []
        for unit in units:
            a, b = by_unit(ours, unit, value), by_unit(theirs, unit, value)
            columns.append(told(paired_difference(list(a.values()), list(b.values()))))
        a, b = by_unit(ours, "order", value), by_unit(theirs, "order", value)
        spread = [a[order] - b[order] for order in a]
        lines.append(
            f"| {title} | {means[0]:.1f} | {means[1]:.1f} | {' | '.join(columns)} | {min(spread):.1f} to {max(spread):.1f} |"
        )
    return lines


def growing(ours: Sequence[Row], theirs: Sequence[Row], method: str, against: str) -> list[str]:
    """The table of the mean accuracy over the tasks learned so far; intervals over orders. Of a sequence longer than five."""
    lines = [f"| tasks learned | {against} | {method} | difference |", "| ---: | ---: | ---: | ---: |"]
    tasks = len(ours[0]["accuracy"]) - 1
    for after in (*(n for n in AFTER if n < tasks), tasks):
        a, b = (
            by_unit(side, "order", lambda row, n=after: learned_so_far(row["accuracy"])[n - 1])
            for side in (ours, theirs)
        )
        difference = told(paired_difference(list(a.values()), list(b.values())))
        lines.append(f"| {after} | {fmean(b.values()):.1f} | {fmean(a.values()):.1f} | {difference} |")
    return lines if len(lines) > 3 else []


def ageing(sides: Mapping[str, Sequence[Row]]) -> list[str]:
    """The table of what is lost with age; intervals over orders."""
    lines = ["| points lost, tasks learned since | " + " | ".join(sides) + " |", "| --- |" + " ---: |" * len(sides)]
    for low, high in AGES:
        columns = []
        for rows in sides.values():

            def value(row: Row, low: int = low, high: int = high) -> float:
                ages = lost_by_age(row["accuracy"])
                return fmean(v for age, values in ages.items() if low <= age <= high for v in values)

            tasks = len(rows[0]["accuracy"]) - 1
            reached = low < tasks
            columns.append(told(mean_interval(list(by_unit(rows, "order", value).values()))) if reached else "")
        if any(columns):
            lines.append(
                f"| {low if low == high else f'{low}–{high}' if high < 99 else f'{low} or more'} | {' | '.join(columns)} |"
            )
    return lines


def room(sides: Mapping[str, Sequence[Row]]) -> list[str]:
    """In how many layers each method could learn: at the first, the middle and the last task."""
    lines = ["| layers that could learn, percent | first task | middle | last |", "| --- | ---: | ---: | ---: |"]
    for name, rows in sides.items():
        shares = [row["adapted"] for row in rows if row["adapted"]]
        if shares:
            at = [0, len(shares[0]) // 2, len(shares[0]) - 1]
            lines.append(f"| {name} | " + " | ".join(f"{100 * fmean(s[k] for s in shares):.0f}" for k in at) + " |")
    return lines if len(lines) > 2 else []


def figure(sides: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Mean of the learned tasks, mean of the probes, and points lost by age: a line per method, every run a faint one."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 3.6), layout="constrained")
    panels = drawing.subplots(1, 3)
    curves: list[tuple[str, str, Callable[[Row], list[float]], int]] = [
        ("mean accuracy of the tasks learned so far", "tasks learned", lambda row: learned_so_far(row["accuracy"]), 1),
        ("mean accuracy of the probes", "tasks learned", lambda row: row["probes"], 0),
        (
            "points lost since a task was learned", "tasks learned since",
            lambda row: [fmean(values) for values in lost_by_age(row["accuracy"]).values()], 1,
        ),
    ]  # fmt: skip
    for axes, (title, below, curve, first) in zip(panels, curves, strict=True):
        for number, (name, rows) in enumerate(sides.items()):
            lines = [curve(row) for row in rows]
            x = range(first, first + len(lines[0]))
            for line in lines:
                axes.plot(x, line, color=f"C{number}", alpha=0.2, linewidth=0.8)
            mean = [fmean(values) for values in zip(*lines, strict=True)]
            axes.plot(x, mean, "os"[number % 2] + "-", color=f"C{number}", label=name, markersize=4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(below)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("percent")
    panels[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's folder, or the sequence.json that was written there")
    parser.add_argument("--method", default="keeplora++")
    parser.add_argument("--against", default="lora", help="the method that differences are taken against")
    parser.add_argument("--figure", type=Path, help="write the figure here as well")
    args = parser.parse_args()
    rows = read(args.study) if args.study.exists() else []
    ours, theirs = paired(rows, args.method, args.against)
    if not ours:
        parser.error(
            f"{args.study} holds no seed with finished runs of {args.method} and {args.against} in the same orders"
        )
    sides = {args.against: theirs, args.method: ours}
    pair = (ours, theirs, args.method, args.against)
    tables = [differences(*pair), growing(*pair), ageing(sides), room(sides)]
    print("\n\n".join("\n".join(table) for table in tables if table))
    if args.study.is_dir():
        atomic_write_json(args.study / "sequence.json", rows)
    if args.figure:
        figure(sides, args.figure)


if __name__ == "__main__":
    main()
