"""Pictures for a README or a paper, by matplotlib: white paper, so that they read the same on a light and a dark page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.report.charts import nice_top
from keeplora.report.compare import GREY, Entry, entries
from keeplora.report.kinds import Kind
from keeplora.report.palette import DASHES, SERIES
from keeplora.report.plot_file import check_plot_name, write_figure
from keeplora.report.runs import Run, load_run

INK, SOFT, LINE = "#16202a", "#526070", "#d9e0e8"
# Methods take the hues that the first tasks do not, so that a bar is not read as a task.
BAR_COLOURS = [6, 7, 3, 2, 1, 4, 0, 5]
PLOT_MARKERS = ["o", "s", "^", "D", "v", "X", "P", "|"]


def _style(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _dash(index: int) -> Any:
    pattern = DASHES[index % len(DASHES)]
    return (0, tuple(float(p) for p in pattern.split())) if pattern else "-"


def draw_curves(axes: Any, run: Run, title: str) -> None:
    """One method: a line per task from the moment it is learned, faint before it."""
    moments = range(len(run.accuracy))
    for j, name in enumerate(run.tasks):
        values = [float("nan") if v is None else v for v in run.column(name)]
        colour, mark = SERIES["light"][j % 8], PLOT_MARKERS[j % 8]
        axes.plot(moments, values, color=colour, linewidth=1, alpha=0.3)
        axes.plot(
            moments[j + 1 :], values[j + 1 :], color=colour, linewidth=2, marker=mark, markersize=5, label=f"{j + 1} · {name}"
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel("tasks learned (0 = untouched model)", fontsize=9, color=SOFT)
    axes.set_xticks(range(len(run.tasks) + 1))
    axes.set_xlim(-0.15, len(run.tasks) + 0.15)
    _style(axes)


def _bars(axes: Any, kind: Kind, shown: Sequence[Entry], top: float) -> None:
    wide = 0.8 / len(shown)
    bars = [metric for metric in kind.metrics if metric.key in kind.percents]
    for k, entry in enumerate(shown):
        values = [entry.metrics.get(key) for key, *_ in bars]
        at = [i - 0.4 + wide * (k + 0.5) for i in range(len(bars))]
        heights = [0.0 if v is None else v for v in values]
        axes.bar(
            at,
            heights,
            wide * 0.9,
            color=SERIES["light"][GREY if entry.run is None else BAR_COLOURS[k % 8]],
            label=entry.label,
        )
        for x, value in zip(at, values, strict=True):
            text = "–" if value is None else f"{value:.1f}" if len(shown) <= 3 else f"{value:.0f}"
            axes.text(x, (value or 0) + 1, text, ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xticks(range(len(bars)), [name for _, name, *_ in bars], fontsize=10)
    axes.set_title("Over the whole sequence", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylim(0, top)
    _style(axes)


def plot_summary(run_dirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write one picture of two or more comparable runs: each one's forgetting curves, then its metrics in percent.

    ``path`` ends in ``.png``, ``.svg`` or ``.pdf``. The first three runs get a panel of curves; all (and the untouched
    model) get bars, up to seven. Raises `KeepLoraError` for fewer than two runs, for runs that are not comparable, and
    for a run without results.

    Example::

        plot_summary(["runs/demo-lora", "runs/demo-keeplora++"], "docs/demo.png")
    """
    from matplotlib.figure import Figure

    target = check_plot_name(path)
    if len(run_dirs) < 2:
        raise KeepLoraError(f"a summary plot sets at least two runs side by side, got {len(run_dirs)}")
    runs = [load_run(Path(one)) for one in run_dirs]
    for run in runs:
        if not run.accuracy:
            raise KeepLoraError(f"{run.path} has no evaluated model yet; plot it after its first task")
        if run.results.get("comparison_key") != runs[0].results.get("comparison_key"):
            raise KeepLoraError(f"{run.path} was not made on the same model, tasks, order and data as {runs[0].path}")
    shown = [entry for entry in entries(runs[0], runs[1:]) if entry.charted]
    kind = runs[0].kind
    # A share fills the paper up to 100; CIDEr can pass it.
    top = nice_top([v for run in runs for row in run.accuracy for v in row], 100.0)
    panels = [entry for entry in shown if entry.run is not None][:3]
    figure = Figure(figsize=(3.9 * len(panels) + 5.2, 4.2), facecolor="white", layout="constrained")
    grid = figure.add_gridspec(1, len(panels) + 1, width_ratios=[*[1.0] * len(panels), 1.35])
    first = None
    for k, entry in enumerate(panels):
        first = figure.add_subplot(grid[0, k], sharey=first) if first is not None else figure.add_subplot(grid[0, k])
        if entry.run is not None:
            draw_curves(first, entry.run, entry.label)
        if k == 0:
            first.set_ylim(0, top)
            first.set_ylabel(f"{kind.quantity} on the {kind.items} (%)", fontsize=9, color=SOFT)
            handles, labels = first.get_legend_handles_labels()
        else:
            first.tick_params(labelleft=False)
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    last = figure.add_subplot(grid[0, len(panels)])
    _bars(last, kind, shown, top)
    last.legend(loc="upper left", frameon=False, fontsize=9, ncols=2)
    return write_figure(figure, target, dpi=dpi)
