"""The leak audit in the report: layers × tasks by colour, and each precision's leaks beside its rounding floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keeplora.report.charts import WIDTH, _line, _rect, _svg, _text
from keeplora.report.palette import HEAT_LEVELS

LEAST, LIMIT = 1e-9, 1e-5
"""The scale's ends: less than LEAST is drawn as LEAST, more than METHOD.md's limit in red."""
TITLED = 800
"""Cells up to this many tell their value under the pointer; beyond it the table below has to do."""

Grid = list[list[float | None]]


@dataclass(frozen=True)
class Precision:
    """One export or the running model: a leak per layer and basis, and the floors beside them (none for an adapter)."""

    label: str
    leaks: tuple[float, ...]
    floors: tuple[float, ...]


def leak_grid(audit: Mapping[str, Any]) -> tuple[list[str], list[str], Grid]:
    """(layers, tasks, factor leaks [layer][task]) in the order of the rows; None where a task did not move a layer.

    >>> rows = [{"layer": "q", "task": "a", "factor_leak": 2e-8}, {"layer": "q", "task": "b", "factor_leak": None}]
    >>> leak_grid({"rows": rows})
    (['q'], ['a', 'b'], [[2e-08, None]])
    """
    rows = [row for row in audit.get("rows") or [] if isinstance(row, Mapping)]
    layers = list(dict.fromkeys(str(row.get("layer")) for row in rows))
    tasks = list(dict.fromkeys(str(row.get("task")) for row in rows))
    found = {(str(row.get("layer")), str(row.get("task"))): _moved(row) for row in rows}
    return layers, tasks, [[found.get((layer, task)) for task in tasks] for layer in layers]


def _moved(row: Mapping[str, Any]) -> float | None:
    leak = row.get("factor_leak")
    still = leak == 0 and row.get("by_basis") == []  # it did not adapt the layer: nothing that could leak
    return None if still or not isinstance(leak, int | float) else float(leak)


def precisions(audit: Mapping[str, Any]) -> list[Precision]:
    """What the weights leak, by precision; of an audit without exports the running weights alone."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for row in audit.get("exports") or []:
        name = str(row.get("export"))
        label = f"{name} {row.get('dtype')}" if name in ("running", "saved") else name
        _put(groups, label, row.get("leak"), row.get("floor"))
    if not groups:
        for layer in {row["layer"]: row for row in audit.get("rows") or [] if row.get("layer")}.values():
            _put(groups, "running", layer.get("weight_leak"), layer.get("weight_floor"))
    return [Precision(label, tuple(leaks), tuple(floors)) for label, (leaks, floors) in groups.items() if leaks]


def _put(groups: dict[str, tuple[list[float], list[float]]], label: str, leak: Any, floor: Any) -> None:
    leaks, floors = groups.setdefault(label, ([], []))
    if isinstance(leak, int | float):
        leaks.append(float(leak))
        if isinstance(floor, int | float):
            floors.append(float(floor))


def short_names(names: Sequence[str], most: int) -> list[str]:
    """The names without the parts that all of them begin with; of a long one the tower, the block and its last parts.

    As many last parts as tell the layers apart.

    >>> short_names(["model.layers.0.q", "model.layers.1.q"], 30), short_names(["vision_model.encoder.3.attention.query"], 20)
    (['0.q', '1.q'], ['vision 3 · query'])
    >>> short_names([f"text_model.encoder.layer.0.{x}output.dense" for x in ("attention.", "")] + ["vision_model.q"], 34)
    ['text 0 · attention.output.dense', 'text 0 · output.dense', 'vision_model.q']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    kept = [p[shared:] for p in parts]
    short: list[str] = []
    for last in range(1, max(map(len, kept), default=0) + 1):
        short = [name if len(name := ".".join(p)) <= most else _block_name(p, last, most) for p in kept]
        if len(set(short)) == len(set(names)):
            break
    return short


def _block_name(parts: Sequence[str], last: int, most: int) -> str:
    block = next((k for k, part in enumerate(parts) if part.isdigit()), None)
    name = ".".join(parts)
    if block is not None:
        name = (
            f"{parts[0].removesuffix('_model')} {parts[block]} · {'.'.join(parts[max(block + 1, len(parts) - last) :])}"
        )
    return name if len(name) <= most else f"{name[:4]}…{name[5 - most :]}"


def leak_level(leak: float) -> int:
    """The colour of a leak, 0 (LEAST or less) to HEAT_LEVELS − 1 (LIMIT), even on a log scale.

    >>> leak_level(0.0), leak_level(1e-7), leak_level(1e-5)
    (0, 6, 12)
    """
    share = math.log(max(leak, LEAST) / LEAST) / math.log(LIMIT / LEAST)
    return min(HEAT_LEVELS - 1, max(0, round(share * (HEAT_LEVELS - 1))))


def leak_figures(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two charts, as the report's figures; empty for an audit without rows."""
    layers, tasks, grid = leak_grid(audit)
    known = [v for row in grid for v in row if v is not None]
    if not known:
        return []
    figures = [
        {
            "title": "Factors, layer by task", "chart": _heat(layers, tasks, grid),
            "note": "light is 1e-9 or less, dark is near 1e-5, red is above it; columns are tasks in the order learned",
        }
    ]  # fmt: skip
    found = precisions(audit)
    if any(one.leaks for one in found):
        note = "a dot per layer, a dash for what rounding to that precision causes by itself"
        figures.append({"title": "Weights, by precision", "chart": _strips(found), "note": note})
    return figures


def _heat(layers: Sequence[str], tasks: Sequence[str], grid: Grid) -> Markup:
    left, above = 150.0, 16.0
    tall = min(14.0, max(2.5, 420 / len(layers)))
    wide = (WIDTH - left - 4) / len(tasks)
    every = math.ceil(11 / tall) // 2 * 2 + 1  # odd, so that not the same half of a block's layers is named
    names = short_names(layers, 26)
    titled = len(layers) * len(tasks) <= TITLED
    step = math.ceil(len(tasks) / 14)
    body = [_text(left + wide * (j + 0.5), 11, str(j + 1), cls="tick") for j in range(0, len(tasks), step)]
    for i, row in enumerate(grid):
        y = above + tall * i
        if i % every == 0:
            body.append(_text(left - 6, y + tall / 2 + 4, names[i], anchor="end", cls="tick"))
        for j, leak in enumerate(row):
            title = f"{layers[i]}, {tasks[j]}: {'not adapted' if leak is None else f'{leak:.1e}'}" if titled else ""
            fill = "var(--track)" if leak is None else "var(--bad)" if leak > LIMIT else f"var(--h{leak_level(leak)})"
            gap = 0.6 if tall > 5 else 0.0
            body.append(_rect(left + wide * j, y, wide - gap, tall - gap, "cell", title, f"fill:{fill}"))
    worst = max(((v, i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if v is not None))
    label = (
        f"Factor leak of {len(layers)} layers by {len(tasks)} tasks on a log scale. The worst is {worst[0]:.1e}, in "
        f"{layers[worst[1]]} by task {tasks[worst[2]]}; the limit is 1e-5."
    )
    return _svg(above + tall * len(layers) + 6, body, label)


def _strips(found: Sequence[Precision]) -> Markup:
    height, left, right, above, below = 220, 40.0, 6.0, 10.0, 24.0
    low, high = math.log10(LEAST) - 0.2, 0.3
    plot_h = height - above - below
    slot = (WIDTH - left - right) / len(found)

    def y_of(value: float) -> float:
        return above + plot_h * (high - math.log10(max(value, LEAST))) / (high - low)

    body: list[str] = []
    for power in (-9, -7, -5, -3, -1):
        y = y_of(10.0**power)
        body += [_line(left, y, WIDTH - right, y, "chance" if power == -5 else "grid")]
        body += [_text(left - 6, y + 4, f"1e{power}".replace("-", "−"), anchor="end", cls="tick")]
    for i, one in enumerate(found):
        middle = left + slot * (i + 0.5)
        body.append(_text(middle, above + plot_h + 16, one.label, cls="tick"))
        shift = 0.17 * slot if one.floors else 0.0
        body.append(f'<g class="s{i % 8}">')
        for k, leak in enumerate(one.leaks):
            x = middle - shift + 0.24 * slot * ((k * 0.618034) % 1.0 - 0.5)
            body.append(f'<circle cx="{x:.1f}" cy="{y_of(leak):.1f}" r="2" class="fill" fill-opacity="0.6"/>')
        body.append("</g>")
        for k, floor in enumerate(one.floors):
            x, y = middle + shift + 0.24 * slot * ((k * 0.618034) % 1.0 - 0.5), y_of(floor)
            body.append(_line(x - 3, y, x + 3, y, "floor"))
    spoken = "; ".join(
        f"{one.label}: leaks up to {max(one.leaks):.0e}"
        + (f", floor up to {max(one.floors):.0e}" if one.floors else "")
        for one in found
    )
    return _svg(height, body, f"Leak of the weights by precision, log scale. {spoken}.")
