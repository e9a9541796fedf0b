"""A stream as the detector of new tasks saw it, as one picture, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.report.audit_plot import INK, LINE, OVER, SOFT
from keeplora.report.palette import SERIES
from keeplora.report.plot_file import check_plot_name, write_figure


def plot_boundary(
    found: Mapping[str, Any], path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 130
) -> Path:
    """Write the picture of what ``keeplora analyze boundary --json`` prints: above each sample's number, below the statistic.

    Raises:
        KeepLoraError: another ending than ``.png``, ``.svg`` or ``.pdf``, or no sample was judged.
    """
    from matplotlib.figure import Figure

    target = check_plot_name(path)
    if not found["positions"]:
        raise KeepLoraError(f"{target}: no sample was judged, for the warm-up took them all; use a smaller one")
    figure = Figure(figsize=(9.5, 4.6), facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    names = [found["tasks"][0], *(name for _, name in found["boundaries"])] if found["boundaries"] else []
    ends = [0, *(at for at, _ in found["boundaries"]), found["samples"]]
    for axes in (above, below):
        for start, end in found["warmups"]:
            axes.axvspan(
                start, end, color="#eef2f6", linewidth=0, label="warm-up" if start == found["warmups"][0][0] else None
            )
        for k, (at, _) in enumerate(found["boundaries"]):
            axes.axvline(at, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label=None if k else "a task begins")
        for k, alarm in enumerate(found["alarms"]):
            axes.axvline(alarm["at"], color=OVER, linewidth=1.2, label=None if k else "alarm")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(colors=SOFT, labelsize=8)
    above.scatter(found["positions"], found["values"], s=5, color=SERIES["light"][0], linewidths=0)
    above.set_ylabel("energy outside what\nwas seen, in spreads", fontsize=8, color=INK)
    # In symmetric logarithms: a new task can be many spreads away, and the warm-up's own samples must still be told apart.
    above.set_yscale("symlog", linthresh=2.0)
    for name, start, end in zip(names, ends, ends[1:], strict=False):
        above.text((start + end) / 2, 1.02, name, ha="center", va="bottom", fontsize=8, color=INK,
                   transform=above.get_xaxis_transform())  # fmt: skip
    below.plot(found["positions"], found["statistics"], ".", markersize=2.5, color=SERIES["light"][0])
    below.axhline(1.0, color=OVER, linewidth=0.8, linestyle=":")
    below.set_ylim(-0.04, 1.1)
    below.set_ylabel("CUSUM / threshold", fontsize=8, color=INK)
    below.set_xlabel("samples", fontsize=8, color=INK)
    # Below the panels: inside them it would lie on the lines that it explains.
    figure.legend(
        *below.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        labelcolor=SOFT,
        ncols=3,
        loc="outside lower right",
    )
    heading = f"{title}: " if title else ""
    figure.suptitle(
        f"{heading}{found['kind']} stream, {found['alarm_rate']:g} false alarms per sample asked for", x=0.01, ha="left",
        fontsize=11, color=INK,
    )  # fmt: skip
    return write_figure(figure, target, dpi=dpi)
