"""A study's charts as inline SVG: means with intervals, differences, ranks, orders. One row per method, so that twenty fit.

Like `charts`, they are 360 units wide, take their colours from the page, and carry a label that is read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keeplora.report.charts import WIDTH, _axis, _line, _rect, _svg, _text, marker, number

LANE, MARK, FOOT, LEFT, RIGHT = 38.0, 23.0, 24.0, 6.0, 6.0
_MOST_NAME = 28  # beside a difference with its interval, on a phone


@dataclass(frozen=True)
class Dot:
    """A row: a value with its interval (None where there is none). ``solid`` fills the mark; ``text`` stands at the end."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    text: str = ""
    solid: bool = True
    strong: bool = False
    index: int = 0


@dataclass(frozen=True)
class Span:
    """An axis: its ends and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value lies, in units of the chart; beyond the ends it is held at them."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return LEFT + (WIDTH - LEFT - RIGHT) * share


def span(values: Sequence[float | None], *, zero: bool = False, whole: bool = False) -> Span:
    """An axis of round steps around every value, of both signs; ``zero`` puts 0 on it, ``whole`` takes steps of 1 or more.

    >>> span([3.2, 48.0]).ticks, span([-2.5, 11.0], zero=True).ticks
    ((0.0, 10.0, 20.0, 30.0, 40.0, 50.0), (-5.0, 0.0, 5.0, 10.0, 15.0))
    """
    known = [v for v in values if v is not None and math.isfinite(v)] + ([0.0] if zero else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{i * step:.6g}") + 0.0 for i in range(first, max(last, first + 1) + 1))
    return Span(ticks[0], ticks[-1], ticks)


def short(name: str, most: int = _MOST_NAME) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _frame(axis: Span, rows: int, zero: bool) -> tuple[list[str], float]:
    """Grid lines and tick labels below ``rows`` lanes; the height of the whole."""
    bottom = rows * LANE + 6
    body = []
    for tick in axis.ticks:
        body.append(_line(axis.at(tick), 2, axis.at(tick), bottom, "zero" if zero and tick == 0 else "grid"))
        anchor = "start" if tick == axis.ticks[0] else "end" if tick == axis.ticks[-1] else "middle"
        x = axis.at(tick) + (-LEFT if anchor == "start" else RIGHT if anchor == "end" else 0)
        body.append(_text(x, bottom + 14, _axis(tick).replace("-", "−"), anchor=anchor, cls="tick"))
    return body, bottom + FOOT


def _name(k: int, name: str, text: str, strong: bool) -> list[str]:
    """A lane's words: the name at its left, the value at its right, on a wash that hides the grid behind them."""
    y = k * LANE + 13
    return [
        _rect(0, y - 11, WIDTH, 15, "paper"),
        _text(0, y, short(name), anchor="start", cls="name strong" if strong else "name"),
        _text(WIDTH, y, text, anchor="end", cls="value"),
    ]


def dots(rows: Sequence[Dot], *, label: str, zero: bool = False) -> Markup:
    """Values with intervals, one lane each; ``zero`` draws the line that differences are read against."""
    axis = span([v for row in rows for v in (row.value, row.low, row.high)], zero=zero)
    body, height = _frame(axis, len(rows), zero)
    for k, row in enumerate(rows):
        body += _name(k, row.name, row.text, row.strong)
        if row.value is None:
            continue
        y = k * LANE + MARK
        body.append(f'<g class="s{row.index % 8}{"" if row.solid else " hollow"}">')
        if row.low is not None and row.high is not None:
            low, high = axis.at(row.low), axis.at(row.high)
            body += [_line(low, y, high, y, "whisker"), _line(low, y - 4, low, y + 4, "whisker")]
            body.append(_line(high, y - 4, high, y + 4, "whisker"))
        body += [marker(0, axis.at(row.value), y, 4.6, f"{row.name}: {row.text}"), "</g>"]
    return _svg(height, body, label)


def spread(rows: Sequence[tuple[str, Sequence[float | None]]], labels: Sequence[str], *, label: str) -> Markup:
    """One lane per method, one mark per task order (series colour and marker of the order), joined by a line."""
    axis = span([v for _, values in rows for v in values])
    body, height = _frame(axis, len(rows), False)
    for k, (name, values) in enumerate(rows):
        known = [v for v in values if v is not None]
        gap = f"{number(max(known) - min(known))} apart" if len(known) > 1 else "–"
        body += _name(k, name, gap, False)
        y = k * LANE + MARK
        if len(known) > 1:
            body.append(_line(axis.at(min(known)), y, axis.at(max(known)), y, "join"))
        for i, value in enumerate(values):
            if value is not None:
                title = f"{name}, order {labels[i]}: {number(value)}"
                body.append(f'<g class="s{i % 8}">{marker(i, axis.at(value), y, 4.6, title)}</g>')
    return _svg(height, body, label)


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Of ranks in rising order, the widest runs (first, last) that lie within ``difference``: not told apart.

    >>> cliques([1.0, 1.5, 3.0, 3.2], 1.8)
    [(0, 1), (1, 3)]
    """
    found: list[tuple[int, int]] = []
    for i, rank in enumerate(ranks):
        j = max(k for k in range(i, len(ranks)) if ranks[k] - rank <= difference + 1e-12)
        if j > i and (not found or j > found[-1][1]):
            found.append((i, j))
    return found


def ranks(names: Sequence[str], mean_ranks: Sequence[float], difference: float, *, label: str) -> Markup:
    """Critical-difference diagram, turned so that it fits a phone: methods downwards by mean rank, bars join the ties."""
    order = sorted(range(len(names)), key=lambda i: mean_ranks[i])
    values = [mean_ranks[i] for i in order]
    groups = cliques(values, difference)
    # Bars stand at the right, side by side where they overlap.
    depth: list[int] = []
    for i, (first, _) in enumerate(groups):
        taken = {depth[j] for j in range(i) if groups[j][1] >= first}
        depth.append(next(d for d in range(len(groups)) if d not in taken))
    room = 12.0 * (max(depth, default=-1) + 1)
    k = len(names)
    axis = Span(1.0, float(k), tuple(float(t) for t in range(1, k + 1, math.ceil(k / 12))))
    scale = (WIDTH - room - LEFT - RIGHT) / (WIDTH - LEFT - RIGHT)

    def at(rank: float) -> float:
        return LEFT + (axis.at(rank) - LEFT) * scale

    top, bottom = 26.0, 26.0 + k * LANE + 4
    body = [_line(at(t), top, at(t), bottom, "grid") for t in axis.ticks]
    body += [_text(at(t), bottom + 14, f"{t:.0f}", cls="tick") for t in axis.ticks]
    end = min(1.0 + difference, float(k))
    body += [_line(at(1), 18, at(end), 18, "cd"), _line(at(1), 14, at(1), 22, "cd")]
    more = " (wider than the axis)" if end < 1.0 + difference else ""
    if not more:
        body.append(_line(at(end), 14, at(end), 22, "cd"))
    body.append(_text(at(1), 10, f"CD {number(difference, 2)}{more}", anchor="start", cls="tick"))
    for row, i in enumerate(order):
        y = top + row * LANE
        body.append(_rect(0, y + 2, WIDTH - room, 15, "paper"))
        body.append(_text(0, y + 13, short(names[i]), anchor="start", cls="name"))
        body.append(_text(WIDTH - room, y + 13, number(values[row], 2), anchor="end", cls="value"))
        title = f"{names[i]}: mean rank {number(values[row], 2)}"
        body.append(f'<g class="s0">{marker(0, at(values[row]), y + MARK, 4.6, title)}</g>')
    for (first, last), place in zip(groups, depth, strict=True):
        x = WIDTH - room + 8 + 12 * place
        body.append(_line(x, top + first * LANE + 8, x, top + last * LANE + MARK + 4, "clique"))
    return _svg(bottom + 20, body, label)
