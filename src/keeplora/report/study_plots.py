"""A study's charts as PNG files for papers and slides, by matplotlib on white paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.files import atomic_write_bytes
from keeplora.report.charts import number
from keeplora.report.palette import HEAT, SERIES
from keeplora.report.plots import INK, LINE, PLOT_MARKERS, SOFT
from keeplora.report.study_charts import cliques, short
from keeplora.report.study_data import MetricRanking, Study
from keeplora.report.study_tables import scale_of, sure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = SERIES["light"][0], SERIES["light"][1]


def _axes(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _grid(count: int, lanes: int, columns: int = 3, wide: float = 3.3) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels of ``lanes`` methods each, names at the left of each row of panels."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(wide * columns + 1.6, rows * (0.9 + 0.3 * lanes)), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    flat = [one for row in axes for one in row]
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def _lanes(axes: Any, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)), titles, color=INK)
    axes.set_ylim(len(titles) - 0.5, -0.5)


def _intervals(axes: Any, k: int, mean: float, low: float | None, high: float | None, solid: bool) -> None:
    if low is not None and high is not None:
        axes.errorbar(mean, k, xerr=[[mean - low], [high - mean]], color=BLUE, capsize=3, linewidth=1.8, fmt="none")
    axes.plot(mean, k, "o", color=BLUE, markersize=6.5, markerfacecolor=BLUE if solid else "white", markeredgewidth=1.6)


def means(study: Study) -> Figure | None:
    """Means with 95 % intervals, a panel per metric."""
    shown = [m for m in study.kind.metrics if any((one.name, None, m[0]) in study.estimates for one in study.methods)]
    if not shown:
        return None
    figure, panels = _grid(len(shown), len(study.methods))
    for axes, (key, name, higher, _) in zip(panels, shown, strict=True):
        for k, method in enumerate(study.methods):
            found = study.estimates.get((method.name, None, key))
            if found is not None:
                _intervals(axes, k, found["mean"], found["low"], found["high"], True)
        _axes(axes, f"{name} ({'→' if higher else '←'} better)")
        _lanes(axes, [method.title for method in study.methods])
    return figure


def forest(study: Study) -> Figure | None:
    """Paired differences to the reference with 95 % intervals, a panel per metric; hollow where p after Holm >= 0.05."""
    methods = [
        m for m in study.methods if any((m.name, None, key) in study.differences for key, *_ in study.kind.metrics)
    ]
    shown = [m for m in study.kind.metrics if any((one.name, None, m[0]) in study.differences for one in methods)]
    if not shown:
        return None
    figure, panels = _grid(len(shown), len(methods))
    for axes, (key, name, higher, _) in zip(panels, shown, strict=True):
        for k, method in enumerate(methods):
            one = study.differences.get((method.name, None, key))
            if one is not None:
                _intervals(axes, k, one.interval["mean"], one.interval["low"], one.interval["high"], sure(one))
        axes.axvline(0, color=INK, linewidth=1.2, zorder=0.6)
        _axes(axes, f"{name} ({'→' if higher else '←'} better)")
        _lanes(axes, [method.title for method in methods])
    figure.supxlabel(
        f"points more than {study.title(study.against or '')}, same seeds and orders; filled: p < 0.05 after Holm",
        fontsize=9, color=SOFT,
    )  # fmt: skip
    return figure


def orders(study: Study) -> Figure | None:
    """Each method's mean under each order, joined by a line, a panel per metric."""
    shown = [m for m in study.kind.metrics if any(key[2] == m[0] for key in study.order_means)]
    if len(study.orders) < 2 or not shown:
        return None
    figure, panels = _grid(len(shown), len(study.methods))
    for axes, (key, name, *_) in zip(panels, shown, strict=True):
        for k, method in enumerate(study.methods):
            found = [study.order_means.get((method.name, order.label, key)) for order in study.orders]
            known = [value for value in found if value is not None]
            axes.plot(known, [k] * len(known), color=SOFT, linewidth=1.5, zorder=1)
            for i, value in enumerate(found):
                if value is not None:
                    axes.plot(value, k, PLOT_MARKERS[i % 8], color=SERIES["light"][i % 8], markersize=6.5, zorder=2)
        _axes(axes, name)
        _lanes(axes, [method.title for method in study.methods])
    for i, order in enumerate(study.orders):
        panels[0].plot([], [], PLOT_MARKERS[i % 8], color=SERIES["light"][i % 8], label=f"order {order.label}")
    figure.legend(loc="outside lower left", ncols=min(len(study.orders), 6), frameon=False, fontsize=9)
    return figure


def _rank_panel(axes: Any, one: MetricRanking, study: Study) -> None:
    """The usual critical-difference diagram: best half named at the left, the others at the right, ties joined."""
    found = one.ranking
    order = sorted(range(len(one.methods)), key=lambda i: found.ranks[i])
    values, names = [found.ranks[i] for i in order], [short(study.title(one.methods[i]), 24) for i in order]
    k, half = len(order), math.ceil(len(order) / 2)
    axes.set_xlim(1 - 0.5 * k, k + 0.5 * k)
    for i in range(1, k + 1):
        axes.plot([i, i], [0, 0.18], color=INK, linewidth=1)
        if (i - 1) % math.ceil(k / 12) == 0:
            axes.text(i, 0.3, str(i), ha="center", va="bottom", fontsize=8, color=SOFT)
    axes.plot([1, k], [0, 0], color=INK, linewidth=1)
    groups = cliques(values, found.critical_difference)
    start = -0.6 - 0.32 * len(groups)
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        left = i < half
        y = start - 0.55 * (i if left else k - 1 - i)
        end = 0.9 if left else k + 0.1
        axes.plot([value, value, end], [0, y, y], color=BLUE, linewidth=1)
        label = f"{name}  {number(value, 2)}" if left else f"{number(value, 2)}  {name}"
        axes.text(
            end + (-0.05 if left else 0.05),
            y,
            label,
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            color=INK,
        )
    for i, (first, last) in enumerate(groups):
        y = -0.35 - 0.32 * i
        axes.plot(
            [values[first] - 0.04, values[last] + 0.04], [y, y], color=ORANGE, linewidth=4, solid_capstyle="round"
        )
    end = 1 + found.critical_difference
    axes.plot([1, end], [1.15, 1.15], color=INK, linewidth=2)
    axes.text(1, 1.25, f"CD {number(found.critical_difference, 2)}", fontsize=8, va="bottom", color=SOFT)
    axes.set_ylim(start - 0.55 * half - 0.1, 1.9)
    axes.set_title(
        f"{one.name}: mean rank over {found.blocks} blocks", loc="left", fontsize=11, fontweight="bold", color=INK
    )
    axes.axis("off")


def critical_difference(study: Study) -> Figure | None:
    """Critical-difference diagrams, a panel per metric."""
    if not study.rankings:
        return None
    from matplotlib.figure import Figure

    count, lanes = len(study.rankings), max(math.ceil(len(one.methods) / 2) for one in study.rankings)
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(12, rows * (1.9 + 0.26 * lanes)), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    flat = [one for row in axes for one in row]
    for spare in flat[count:]:
        spare.set_visible(False)
    for panel, one in zip(flat, study.rankings, strict=False):
        _rank_panel(panel, one, study)
    return figure


def matrices(study: Study, order: str) -> Figure | None:
    """Mean accuracy matrices of one order, methods side by side on one colour scale."""
    shown = [(m, study.matrices[m.name, order]) for m in study.methods if (m.name, order) in study.matrices]
    if not shown:
        return None
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    low, high = scale_of(study)
    colours = LinearSegmentedColormap.from_list("heat", list(HEAT["light"]))
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = (max(len(row) for row in m.rows) + len(m.probes) for _, m in shown[:1]), len(shown[0][1].rows)
    cell = 0.42
    size = (columns * (cell * next(width) + 0.9), rows * (cell * height + 0.75))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr]
    flat = [one for row in figure.subplots(rows, columns, squeeze=False) for one in row]
    for spare in flat[len(shown) :]:
        spare.set_visible(False)
    for axes, (method, matrix) in zip(flat, shown, strict=False):
        body = [(*row, *probes) for row, probes in zip(matrix.rows, matrix.probe_rows, strict=False)] or matrix.rows
        values = [[math.nan if v is None else v for v in row] for row in body]
        axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="equal")
        axes.axvline(len(matrix.tasks) - 0.5, color="white", linewidth=6)
        for i, row in enumerate(body):
            for j, v in enumerate(row):
                dark = v is not None and (v - low) / (high - low) > 0.5
                text = "" if v is None else number(v, 0)
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
        names = [
            *map(str, range(1, len(matrix.tasks) + 1)),
            *(f"p{i + 1}" for i in range(len(matrix.probes))),
        ]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(body)), [str(i) for i in range(len(body))])
        axes.tick_params(colors=SOFT, length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_title(method.title, loc="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def plot_study(study: Study, folder: Path, *, dpi: int = 130) -> list[Path]:
    """Write every plot that the study has data for as ``folder/NAME.png``; plots of an earlier call are removed."""
    made: dict[str, Callable[[], Figure | None]] = {
        "means": lambda: means(study), "forest": lambda: forest(study), "orders": lambda: orders(study),
        "critical-difference": lambda: critical_difference(study),
    }  # fmt: skip
    for order in study.orders:
        made[f"matrices-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', order.label)}"] = lambda label=order.label: matrices(
            study, label
        )
    paths = []
    for name, make in made.items():
        figure = make()
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=dpi)
            paths.append(atomic_write_bytes(folder / f"{name}.png", buffer.getvalue()))
    for stale in set(folder.glob("*.png")) - set(paths) if folder.is_dir() else ():
        stale.unlink()
    return paths
