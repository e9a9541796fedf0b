"""A study's numbers as tables: for the page, and from the same rows for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import math
from typing import Any

from keeplora.evaluation.stats import Interval
from keeplora.report.charts import number
from keeplora.report.compare import signed
from keeplora.report.palette import HEAT_LEVELS
from keeplora.report.study_data import Difference, MeanMatrix, Study
from keeplora.report.tables import Cell, Table, count, duration, size

UNTOUCHED = "Untouched model"
SURE = 0.05


def with_half(found: Interval | None) -> str:
    """A mean with half its interval.

    >>> with_half({"mean": 48.04, "low": 45.7, "high": 50.4, "n": 5, "sd": 1.9}), with_half(None)
    ('48.0 ± 2.3', '–')
    """
    if found is None:
        return "–"
    half = "" if found["low"] is None else f" ± {number(found['mean'] - found['low'])}"
    return number(found["mean"]) + half


def with_ends(one: Difference | None) -> str:
    """A difference with the ends of its interval."""
    if one is None:
        return "–"
    low, high = one.interval["low"], one.interval["high"]
    return signed(one.interval["mean"]) + ("" if low is None or high is None else f" [{signed(low)}, {signed(high)}]")


def p_value(p: float | None) -> str:
    """A p value as it is written.

    >>> p_value(0.0312), p_value(0.00004), p_value(None)
    ('0.031', '< 0.001', '–')
    """
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def sure(one: Difference | None) -> bool:
    """Whether the adjusted t test tells the difference from 0."""
    return one is not None and one.t_p_holm is not None and one.t_p_holm < SURE


def heads(study: Study) -> list[str]:
    return [f"{name} {'↑' if higher else '↓'}" for _, name, higher, _ in study.kind.metrics]


def methods_table(study: Study, scope: str | None) -> Table:
    """Methods × metrics as mean ± half a 95 % interval, with n; the untouched model last unless zero-shot was run."""
    rows: list[list[Cell | str]] = []
    winners = {key: study.best(scope, key, higher) for key, _, higher, _ in study.kind.metrics}
    for method in study.methods:
        cells: list[Cell | str] = [method.title, study.n_text(method.name, scope)]
        for key, *_ in study.kind.metrics:
            found = study.estimates.get((method.name, scope, key))
            cells.append(Cell(with_half(found), best=method.name in winners[key]))
        rows.append(cells)
    if all(method.learns for method in study.methods) and study.untouched:
        rows.append([UNTOUCHED, "–", *(number(study.untouched.get((scope, key))) for key, *_ in study.kind.metrics)])
    units = "seeds × orders" if scope is None and len(study.orders) > 1 else "seeds"
    marks = "★ best mean, of three seeds at least; ↑ higher is better, ↓ lower"
    caption = f"Mean ± half a 95 % t interval, {study.scope_title(scope)} (n: {units}; {marks})"
    return Table(caption, ["method", "n", *heads(study)], rows, sticky=True)


def differences_table(study: Study, scope: str | None) -> Table | None:
    """Each method less the reference: difference and interval; bold where Holm's p of the t test is below 0.05."""
    if study.against is None:
        return None
    rows: list[list[Cell | str]] = []
    for method in study.methods:
        mine = {key: study.differences.get((method.name, scope, key)) for key, *_ in study.kind.metrics}
        if method.name == study.against or not any(mine.values()):
            continue
        pairs = max(one.pairs for one in mine.values() if one)
        rows.append(
            [method.title, str(pairs), *(Cell(with_ends(one), "sure" if sure(one) else "") for one in mine.values())]
        )
    if not rows:
        return None
    title = study.title(study.against)
    caption = (
        f"Less {title}, same cells, in points: mean [95 % interval], {study.scope_title(scope)}; bold: Holm’s p < 0.05"
    )
    return Table(caption, [f"less {title}", "pairs", *heads(study)], rows, sticky=True)


def tests_table(study: Study, scope: str | None) -> Table | None:
    """Every paired test, t and Wilcoxon, over seeds: both as they are and adjusted."""
    rows: list[list[Cell | str]] = []
    for key, name, *_ in study.kind.metrics:
        for method in study.methods:
            one = study.differences.get((method.name, scope, key))
            if one is not None:
                tests = (one.t_p, one.t_p_holm, one.wilcoxon_p, one.wilcoxon_p_holm, one.wilcoxon_smallest)
                ns = [str(one.interval["n"]), str(one.wilcoxon_n)]
                rows.append(
                    [
                        name,
                        method.title,
                        with_ends(one),
                        ns[0],
                        *map(p_value, tests[:2]),
                        ns[1],
                        *map(p_value, tests[2:]),
                    ]
                )
    if not rows:
        return None
    head = [
        "metric",
        "method",
        "difference",
        "seeds",
        "t: p",
        "Holm",
        "seeds that differ",
        "Wilcoxon: p",
        "Holm",
        "smallest possible p",
    ]
    return Table(f"Paired tests, {study.scope_title(scope)}", head, rows, (1,))


def cost_table(study: Study) -> Table:
    """Means over the finished cells: time, of it statistics, memory, state, trained parameters."""
    rows: list[list[Cell | str]] = []
    for method in study.methods:
        cost = study.costs.get(method.name, {})
        n = sum(1 for cell in study.cells if cell.method == method.name and cell.finished)
        trained = cost.get("trained_parameters")
        rows.append(
            [
                method.title,
                str(n),
                duration(cost.get("seconds")),
                duration(cost.get("statistics_seconds")),
                size(cost.get("peak_memory_bytes")),
                size(cost.get("state_bytes")),
                count(None if trained is None else round(trained)),
            ]
        )
    head = ["method", "cells", "time", "of it statistics", "peak memory", "state between tasks", "trained parameters"]
    return Table("Cost of a run, mean over its finished cells", head, rows, sticky=True)


def settings_table(study: Study) -> Table | None:
    """Settings that differ between methods, and the learning rates and epochs of all."""
    if not study.settings:
        return None
    names = [method for method in study.methods if any(method.name in values for _, values in study.settings)]
    rows: list[list[Cell | str]] = [[key, *(values.get(m.name, "–") for m in names)] for key, values in study.settings]
    return Table(
        "Settings that differ between methods, learning rate and epochs", ["setting", *(m.title for m in names)], rows
    )


def cells_table(study: Study) -> Table:
    """Per method and order: the finished seeds, and how far the others are."""
    rows: list[list[Cell | str]] = []
    for method in study.methods:
        row: list[Cell | str] = [method.title]
        for order in study.orders:
            mine = [c for c in study.cells if c.method == method.name and c.order == order.label]
            done = " ".join(str(c.seed) for c in mine if c.finished)
            rest = ", ".join(f"{c.seed} {c.progress}" for c in mine if not c.finished)
            row.append("; ".join(part for part in (done, rest) if part) or "–")
        rows.append(row)
    left = tuple(range(1, len(study.orders) + 1))
    return Table(
        "Finished seeds, and the state of the others",
        ["method", *(f"order {o.label}" for o in study.orders)],
        rows,
        left,
    )


def missing_lines(study: Study, most: int = 12) -> list[str]:
    """The cells that are not in the tables, one line each, those that failed first and with their last words."""
    rank = {"failed": 0, "interrupted": 1, "running": 2}
    found = sorted(study.missing, key=lambda cell: rank.get(cell.state, len(rank)))
    lines = []
    for cell in found[:most]:
        told = cell.error.strip().splitlines()
        lines.append(f"{cell.place}: {cell.progress}" + (f": {told[-1]}" if told else ""))
    if len(found) > most:
        lines.append(f"and {len(found) - most} more")
    return lines


def heat(matrix: MeanMatrix, low: float, high: float, learns: bool) -> list[dict[str, Any]]:
    """Rows of a mean matrix with a colour level per cell, on the scale of ``low`` to ``high``."""

    def cell(value: float | None, cls: str = "") -> Cell:
        if value is None:
            return Cell("–", f"{cls} none".strip())
        level = min(HEAT_LEVELS - 1, max(0, int((value - low) / (high - low) * HEAT_LEVELS)))
        return Cell(number(value, 0), f"heat heat{level} {cls}".strip())

    rows = []
    for i, row in enumerate(matrix.rows):
        probes = matrix.probe_rows[i] if i < len(matrix.probe_rows) else ()
        rows.append(
            {
                "label": str(i),
                "cells": [cell(v, "new" if learns and j == i - 1 else "") for j, v in enumerate(row)],
                "probes": [cell(v) for v in probes],
            }
        )
    return rows


def scale_of(study: Study) -> tuple[float, float]:
    """The tens around every value of every mean matrix: one colour scale for all."""
    rows = [row for matrix in study.matrices.values() for row in (*matrix.rows, *matrix.probe_rows)]
    values = [v for row in rows for v in row if v is not None]
    low = 10 * math.floor(min(values, default=0) / 10)
    return low, max(10 * math.ceil(max(values, default=100) / 10), low + 10)
