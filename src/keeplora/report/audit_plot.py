"""The leak audit as one picture, by matplotlib: layers × tasks, and what each precision leaks beside its rounding floor."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.report.audit_charts import LEAST, LIMIT, Precision, leak_grid, precisions, short_names
from keeplora.report.palette import HEAT, SERIES
from keeplora.report.plot_file import check_plot_name, write_figure

INK, SOFT, LINE, OVER, NONE = "#16202a", "#526070", "#d9e0e8", "#c0392b", "#e9edf1"
ROWS = 96
"""Layers beyond this many are named in the picture every so often only."""


def plot_audit(
    audit: Mapping[str, Any], path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 150
) -> Path:
    """Write the picture of an audit.

    Args:
        audit: what ``keeplora audit --json`` prints, `keeplora.tuner.Audit.to_dict`, or ``audit`` of a results.json.
        path: ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        KeepLoraError: another ending, or an audit without rows.

    Example::

        plot_audit(learner.audit("full").to_dict(), "leaks.png")
    """
    from matplotlib.figure import Figure

    target = check_plot_name(path)
    layers, tasks, grid = leak_grid(audit)
    if not layers:
        raise KeepLoraError(f"{target}: the audit has no rows to plot; learn a task first")
    found = precisions(audit)
    left = 2.6 + min(max(0.45 * len(tasks), 1.3), 8.0)
    right = 1.0 + 1.1 * max(len(found), 3) if found else 0.4
    tall = min(max(0.19 * len(layers), 2.8), 12.0) + 1.6
    figure = Figure(figsize=(left + right, tall), facecolor="white", layout="constrained")
    # The dots need no more height than a page is wide: what is left of a tall picture stays empty.
    share = min(1.0, 4.6 / tall)
    grid_spec = figure.add_gridspec(2, 2, width_ratios=[left, right], height_ratios=[share, 1 - share + 1e-6])
    _grid(figure, figure.add_subplot(grid_spec[:, 0]), layers, tasks, grid)
    if found:
        _strips(figure.add_subplot(grid_spec[0, 1] if share < 1 else grid_spec[:, 1]), found)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return write_figure(figure, target, dpi=dpi)


def _grid(
    figure: Any, axes: Any, layers: Sequence[str], tasks: Sequence[str], grid: Sequence[Sequence[float | None]]
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from numpy import array, ma, nan

    values = array([[nan if v is None else max(v, LEAST) for v in row] for row in grid], dtype=float)
    colours = LinearSegmentedColormap.from_list("leak", HEAT["light"]).with_extremes(over=OVER, bad=NONE)
    shown = axes.imshow(
        ma.masked_invalid(values), aspect="auto", interpolation="nearest", cmap=colours, norm=LogNorm(LEAST, LIMIT)
    )
    over = [(i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if v is not None and v > LIMIT]
    for i, j in over[:400]:
        axes.text(j, i, "✗" if len(layers) <= ROWS else "", ha="center", va="center", color="white", fontsize=7)
    every = math.ceil(len(layers) / ROWS) // 2 * 2 + 1  # odd, so that not the same half of a block's layers is named
    names = short_names(layers, 40)
    axes.set_yticks(range(0, len(layers), every), names[::every], fontsize=7 if len(layers) > 12 else 8)
    step = math.ceil(len(tasks) / 24)
    long = max(len(name) for name in tasks) > 3
    axes.set_xticks(
        range(0, len(tasks), step), [_cut(n) for n in tasks[::step]], fontsize=8, rotation=40 if long else 0,
        ha="right" if long else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.tick_params(colors=SOFT, length=0)
    axes.set_xticks([x - 0.5 for x in range(1, len(tasks))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))] if len(layers) <= ROWS else [], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Factors\n‖B A U‖ / ‖B A‖", loc="left", fontsize=11, fontweight="bold", color=INK)
    bar = figure.colorbar(
        shown,
        ax=axes,
        extend="max",
        pad=0.02,
        fraction=0.05,
        aspect=24,
        shrink=min(1.0, 24 / len(layers)),
        anchor=(0, 0.97),
    )
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=SOFT, length=0, labelsize=8)
    bar.ax.set_title("over", fontsize=8, color=OVER, pad=12, loc="left")


def _strips(axes: Any, found: Sequence[Precision]) -> None:
    # V: U₀ with t = 0, and what task t added with everything that came after it.
    axes.set_title("Weights\n‖(W − Wₜ) V‖ / ‖W − Wₜ‖", loc="left", fontsize=11, fontweight="bold", color=INK)
    for i, one in enumerate(found):
        colour = SERIES["light"][i % 8]
        _dots(
            axes,
            i - 0.17 if one.floors else i,
            one.leaks,
            colour,
            "o",
            "leak, a dot per layer and basis" if i == 0 else None,
        )
        _dots(axes, i + 0.17, one.floors, "#8b97a5", "_", "what rounding causes by itself" if i == 0 else None)
    axes.set_yscale("log")
    axes.set_ylim(LEAST / 2, 2.0)
    axes.axhline(LIMIT, color=OVER, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(len(found) - 0.5, LIMIT * 1.15, "1e-5", ha="right", va="bottom", fontsize=8, color=OVER)
    axes.set_xticks(range(len(found)), [one.label.replace(" ", "\n") for one in found], fontsize=9)
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0, which="both", labelsize=8)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=1, frameon=False, fontsize=8, labelcolor=SOFT,
        handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip


def _dots(axes: Any, x: float, values: Sequence[float], colour: str, mark: str, label: str | None) -> None:
    # Golden-ratio steps spread neighbours apart, and are the same in every picture.
    at = [x + 0.22 * ((i * 0.618034) % 1.0 - 0.5) for i in range(len(values))]
    size = 14 if mark == "o" else 26
    edge = {"linewidths": 0} if mark == "o" else {"linewidths": 1.0}
    axes.scatter(at, [max(v, LEAST) for v in values], s=size, color=colour, marker=mark, alpha=0.7, label=label, **edge)


def _cut(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
