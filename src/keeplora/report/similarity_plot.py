"""Tasks' similarity as one picture, by matplotlib: the overlap matrix, and prediction beside measured drop."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import KeepLoraError
from keeplora.report.audit_plot import INK, LINE, NONE, SOFT
from keeplora.report.palette import HEAT, SERIES
from keeplora.report.plot_file import check_plot_name, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osv^D<>P"
COLOURS = (0, 1, 3, 5, 4, 6, 2, 7)
"""Of `SERIES`, so that neighbours are unlike."""
AXES = {
    "overlap": "overlap of the two subspaces, share",
    "energy": "energy of the later task inside\nthe earlier one's subspace, share",
    "gradient": "energy of the later gradient inside\nthe earlier subspace, share",
    "update": "later update on the earlier task's\nfeatures, ‖ΔW x‖² per ‖x‖²",
    "size": "size of the later update, ‖ΔW‖²",
}
"""What each predictor's axis shows, and its unit."""


def plot_similarity(found: Mapping[str, Any], path: str | os.PathLike[str], *, dpi: int = 130) -> Path:
    """Write the picture of what ``keeplora analyze similarity --json`` prints: the overlaps, and a panel per predictor.

    Runs go by their ``titles`` where there are some, else by their folders' names.

    Raises:
        KeepLoraError: another ending than ``.png``, ``.svg`` or ``.pdf``, or no task.
    """
    target = check_plot_name(path)
    if not found["tasks"]:
        raise KeepLoraError(f"{target}: there is no task to draw; learn one first")
    return write_figure(similarity_figure(found), target, dpi=dpi, bbox_inches="tight", pad_inches=0.1)


def similarity_figure(found: Mapping[str, Any]) -> Figure:
    """The picture that `plot_similarity` writes."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    tasks = found["tasks"]
    measured = [pair for pair in found["pairs"] if pair["drop"] is not None]
    known = {name for pair in measured for name, value in pair["predicted"].items() if value is not None}
    predictors = [name for name in (measured[0]["predicted"] if measured else ()) if name in known]
    figure = Figure(figsize=(4.6 + 2.6 * len(predictors), 4.2), facecolor="white", layout="constrained")
    widths = [1.5, *[1.0] * len(predictors)]
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    axes = panels[0]
    values = [[math.nan if v is None else v for v in row] for row in found["overlap"]]
    colours = LinearSegmentedColormap.from_list("overlap", HEAT["light"]).with_extremes(bad=NONE)
    axes.imshow(values, cmap=colours, vmin=0.0, vmax=1.0)
    for y, row in enumerate(values if len(tasks) <= 16 else []):
        for x, value in enumerate(row):
            ink = "white" if value > 0.6 else INK
            axes.text(x, y, "" if value != value else f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.set_title("Overlap of own subspaces", loc="left", fontsize=10, color=INK)
    axes.spines[:].set_visible(False)
    titles = found.get("titles") or {}
    runs = list(dict.fromkeys(pair["run"] for pair in measured))
    for axes, predictor in zip(panels[1:], predictors, strict=True):
        for k, run in enumerate(runs):
            points = [(p["predicted"][predictor], p["drop"]) for p in measured if p["run"] == run]
            points = [(x, y) for x, y in points if x is not None]
            axes.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=26,
                alpha=0.85,
                linewidths=0,
                label=titles.get(run, run),
                color=SERIES["light"][COLOURS[k % 8]],
                marker=MARKS[k % len(MARKS)],
            )
        if predictor == "update":
            axes.set_xscale("log")
        axes.set_title(predictor, loc="left", fontsize=10, color=INK)
        axes.set_xlabel(AXES.get(predictor, predictor), fontsize=8, color=INK)
        axes.axhline(0.0, color=LINE, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
    for axes in panels:
        axes.tick_params(colors=SOFT, labelsize=8)
    if predictors:
        panels[1].set_ylabel("points the earlier task fell", fontsize=8, color=INK)
        # Below the panels: inside them it would lie on the points.
        figure.legend(
            *panels[-1].get_legend_handles_labels(), frameon=False, fontsize=8, labelcolor=SOFT,
            ncols=min(len(runs), 2 + len(predictors)), loc="outside lower right",
        )  # fmt: skip
    return figure
