"""The drift between two states as one picture, by matplotlib: layers × measures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.report.audit_charts import short_names
from keeplora.report.audit_plot import INK, NONE, ROWS, SOFT
from keeplora.report.palette import HEAT
from keeplora.report.plot_file import check_plot_name, write_figure

MEASURES = (
    ("relative", "‖D‖/‖W‖\n%", 100.0, None), ("moved", "‖D‖", 1.0, None), ("overlap", "overlap\nof U", 1.0, 1.0),
    ("largest_angle", "U angle\nlargest °", 1.0, 90.0), ("weight_angle", "W angle\nlargest °", 1.0, 90.0),
    ("a_in_b", "ΔW_a\nin U_b %", 100.0, 100.0), ("b_in_a", "ΔW_b\nin U_a %", 100.0, 100.0),
    ("moved_in_a", "D\nin U_a %", 100.0, 100.0),
)  # fmt: skip
"""Key, heading, factor, and the end of the colours' scale; None: the largest value."""
STILL = (("overlap", 1.0, 1e-5), ("largest_angle", 0.0, 1e-3))
"""Key, value and how near to it every layer has to be for the column to be left out."""


def plot_drift(found: Mapping[str, Any], path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write the picture of what ``keeplora analyze drift --json`` prints (`keeplora.tuner.drift.Drift.to_dict`).

    Raises:
        KeepLoraError: another ending than ``.png``, ``.svg`` or ``.pdf``, or no layer to draw.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    target = check_plot_name(path)
    layers = found["layers"]
    if not layers:
        raise KeepLoraError(f"{target}: there is no layer to draw")
    measures = [m for m in MEASURES if any(row[m[0]] is not None for row in layers)]
    # Between states of one run the protected subspace only grows: two columns that say nothing.
    still = {key for key, value, near in STILL if all(r[key] is None or abs(r[key] - value) < near for r in layers)}
    measures = [m for m in measures if m[0] not in still] or measures
    if any(m[0] == "relative" for m in measures):
        measures = [m for m in measures if m[0] != "moved"]
    colours = LinearSegmentedColormap.from_list("drift", HEAT["light"]).with_extremes(bad=NONE)
    tall = min(max(0.19 * len(layers), 2.4), 14.0) + 1.2
    figure = Figure(figsize=(2.6 + 0.95 * len(measures), tall), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    names = short_names([row["layer"] for row in layers], 40)
    every = math.ceil(len(layers) / ROWS)
    for i, (axes, (key, heading, factor, end)) in enumerate(zip(panels, measures, strict=True)):
        values = [[math.nan if row[key] is None else row[key] * factor] for row in layers]
        top = end or max((v for (v,) in values if v == v), default=1.0) or 1.0
        axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=0.0, vmax=top)
        for y, (value,) in enumerate(values if len(layers) <= ROWS else []):
            ink = "white" if value > 0.6 * top else INK
            axes.text(0, y, "" if value != value else f"{value:.3g}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(heading, fontsize=8, color=INK)
        axes.set_xticks([])
        axes.set_yticks(range(0, len(layers), every) if i == 0 else [], names[::every] if i == 0 else [], fontsize=7)
        axes.tick_params(colors=SOFT, length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle(f"Drift from a = {found['a']} to b = {found['b']}", x=0.01, ha="left", fontsize=11, color=INK)
    return write_figure(figure, target, dpi=dpi)
