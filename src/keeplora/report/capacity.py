"""Layers × tasks: how full every layer is after each task, as a chart of the report and as a picture of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from keeplora.errors import KeepLoraError
from keeplora.report.charts import WIDTH, _rect, _svg, _text, number
from keeplora.report.palette import HEAT, HEAT_LEVELS
from keeplora.report.plot_file import check_plot_name, write_figure
from keeplora.report.tables import Cell, Table

ROW = 16
NAMES = 118


def by_tower(capacity: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The layers of results.json's ``capacity``, by tower, shallow ones first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    layers = sorted(capacity.get("layers") or [], key=lambda one: (one["depth"] is None, one["depth"] or 0))
    for layer in layers:
        groups.setdefault(str(layer["tower"] or "model"), []).append(layer)
    return groups


def row_name(layer: Mapping[str, Any]) -> str:
    """Block and last part of a layer's name.

    >>> row_name({"layer": "vision_model.encoder.layers.3.self_attn.q_proj", "depth": 3})
    '3 · q_proj'
    """
    leaf = str(layer["layer"]).rpartition(".")[2]
    return leaf if layer["depth"] is None else f"{layer['depth']} · {leaf}"


def shares(layer: Mapping[str, Any]) -> list[float]:
    """Percent of the dimensions that are protected, at the start and after each task."""
    return [100.0 * used / layer["in"] for used in layer["used"]]


def figures(capacity: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One chart per tower: a row per layer, a column per moment; a cell's shade is the protected share."""
    found = []
    for tower, layers in by_tower(capacity or {}).items():
        tight = sum(1 for layer in layers if layer["state"] in ("tight", "full", "frozen"))
        note = (
            f"{tight} of {len(layers)} layers have no room for another task like the last"
            if tight
            else f"all {len(layers)} layers have room for another task like the last"
        )
        found.append({"title": f"{tower} tower, layer by layer", "note": note, "chart": _chart(tower, layers)})
    return found


def _chart(tower: str, layers: Sequence[Mapping[str, Any]]) -> Markup:
    steps = max(len(layer["used"]) for layer in layers)
    wide = (WIDTH - NAMES) / steps
    body = [
        _text(NAMES + wide * (i + 0.5), 11, "W" if i == 0 else str(i), cls="tick")
        for i in range(0, steps, -(-steps // 12))
    ]
    for row, layer in enumerate(layers):
        y, name = 16 + row * ROW, row_name(layer)
        body.append(_text(NAMES - 6, y + 12, name if len(name) < 20 else name[:18] + "…", anchor="end", cls="tick"))
        for i, share in enumerate(shares(layer)):
            level = min(HEAT_LEVELS - 1, int(share / 100 * HEAT_LEVELS))
            when = "from W" if i == 0 else f"after task {i}"
            title = f"{layer['layer']}, {when}: {layer['used'][i]} of {layer['in']}"
            style = f"fill:var(--h{level})"
            body.append(_rect(NAMES + wide * i, y, wide - 1, ROW - 1, "cell", title, style))
            if wide >= 26:
                text = f'<text x="{NAMES + wide * (i + 0.5) - 0.5:.1f}" y="{y + 11.5:.1f}" text-anchor="middle" '
                ink = f"fill:var(--i{level})"
                body.append(f'{text}style="{ink};font-size:10px">{escape(number(share, 0))}</text>')
    spoken = "; ".join(
        f"{row_name(layer)}: {', '.join(number(s, 0) for s in shares(layer))}" for layer in layers[:40]
    )  # a screen reader has the table below for the rest
    label = f"Protected percent of each layer's dimensions in the {tower} tower, from the weights and after each task. {spoken}."
    return _svg(18 + ROW * len(layers), body, label)


def table(capacity: Mapping[str, Any] | None) -> Table | None:
    """Left dimensions, state and forecast of every layer."""
    layers = (capacity or {}).get("layers") or []
    if not layers:
        return None
    rows: list[list[Cell | str]] = [
        [
            str(layer["layer"]), f"{layer['used'][-1]}/{layer['in']}", str(layer["left"]), str(layer["rank"]),
            str(layer["state"]), forecast_text(layer["forecast"]),
            " ".join("–" if share is None else f"{100 * share:.1f}" for share in layer["explained"]) or "–",
        ]
        for layer in layers
    ]  # fmt: skip
    head = ["layer", "used", "left", "rank", "state", "tasks that fit", "protected share of each task, % (ε)"]
    return Table("Room left in every layer", head, rows, (len(head) - 1,))


def forecast_text(forecast: Mapping[str, Any]) -> str:
    """A forecast in a cell: the likely number, and the range where there is one.

    >>> forecast_text({"likely": 3, "low": 1, "high": None, "tasks": 4})
    '3 (1–∞)'
    """
    if not forecast["tasks"]:
        return "–"
    likely, low, high = ("∞" if forecast[k] is None else str(forecast[k]) for k in ("likely", "low", "high"))
    return likely if low == high == likely else f"{likely} ({low}–{high})"


def plot_capacity(
    capacity: Mapping[str, Any], path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 150
) -> Path:
    """Write the charts of `figures` as one picture under ``title``; ``path`` ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises `KeepLoraError` for another ending, and where there is no layer to draw.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    target = check_plot_name(path)
    towers = by_tower(capacity)
    if not towers:
        raise KeepLoraError(f"{target}: there is no layer whose capacity could be drawn")
    steps = len(capacity["tasks"]) + 1
    tallest = max(len(layers) for layers in towers.values())
    figure = Figure(
        figsize=(max(3.2, 1.8 + 0.45 * steps) * len(towers), 1.2 + 0.22 * tallest),
        facecolor="white",
        layout="constrained",
    )
    colours = LinearSegmentedColormap.from_list("fill", list(HEAT["light"]))
    for k, (tower, layers) in enumerate(towers.items(), start=1):
        axes = figure.add_subplot(1, len(towers), k)
        rows = [shares(layer) for layer in layers]
        image = axes.imshow(rows, cmap=colours, vmin=0, vmax=100, aspect="auto")
        axes.set_title(f"{tower} tower", loc="left", fontsize=11)
        axes.set_yticks(range(len(layers)), [row_name(layer) for layer in layers], fontsize=7)
        axes.set_xticks(range(steps), ["W", *(str(i) for i in range(1, steps))], fontsize=8)
        axes.set_xlabel("tasks learned (W: none)", fontsize=8)
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if steps <= 16:
                    axes.text(
                        x,
                        y,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if share > 55 else "black",
                    )
        axes.set_ylim(tallest - 0.5, -0.5)  # rows of one height in every tower
        axes.spines[:].set_visible(False)
        if k == len(towers):
            figure.colorbar(image, ax=axes, label="protected dimensions, %")
    figure.suptitle(
        f"{title}: protected dimensions" if title else "Protected dimensions", x=0.01, ha="left", fontsize=12
    )
    return write_figure(figure, target, dpi=dpi)
