"""Charts as inline SVG, drawn by hand so that they follow the page's colours, read aloud, and stay sharp on a phone.

Every chart is about 360 units wide: one column on a phone, several beside each other on a desk. Colours are classes
(``s0``.. for series) that the page's style sheet fills in for the light and the dark theme. Missing values leave gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from keeplora.report.palette import DASHES, MARKERS

WIDTH = 360
Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line or one bar colour: a name, a value per x (None leaves a gap) and the index of its colour and marker."""

    name: str
    values: Values
    index: int = 0
    strong: bool = False


def nice_top(values: Values, at_least: float = 0.0) -> float:
    """The smallest of 1, 2, 3, 4, 5, 6, 8, 10 x 10^k that is not below the largest value; 1 where there is none.

    >>> nice_top([37.2]), nice_top([71.0]), nice_top([0.31]), nice_top([])
    (40.0, 80.0, 0.4, 1.0)
    """
    top = max([v for v in values if v is not None] + [at_least], default=0.0)
    if top < 1e-300 or not math.isfinite(top):
        return 1.0
    step = 10.0 ** math.floor(math.log10(top))
    mantissa = next(m for m in (1, 2, 3, 4, 5, 6, 8, 10) if m >= round(top / step, 9))
    return float(f"{mantissa * step:.3g}")


def ticks(top: float) -> list[float]:
    """Axis ticks from 0 to a `nice_top`: three to five round steps.

    >>> ticks(80.0), ticks(60.0)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [0.0, 20.0, 40.0, 60.0])
    """
    mantissa = round(top / 10.0 ** math.floor(math.log10(top)), 6)
    count = {1: 5, 2: 4, 3: 3, 4: 4, 5: 5, 6: 3, 8: 4}.get(int(mantissa), 4)
    return [float(f"{top * i / count:.6g}") for i in range(count + 1)]


def number(value: float | None, digits: int = 1) -> str:
    """A number for a person: fixed digits, a true minus sign, an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def _axis(value: float) -> str:
    return f"{value:g}"


def _text(x: float, y: float, text: str, *, anchor: str = "middle", cls: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>'


def _rect(x: float, y: float, width: float, height: float, cls: str, title: str = "", style: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    attribute = f' style="{style}"' if style else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" '
        f'class="{cls}"{attribute}>{inner}</rect>'
    )


def marker(index: int, x: float, y: float, size: float = 4.0, title: str = "") -> str:
    """The marker of series ``index`` (circle, square, triangle, ...) centred at (x, y)."""
    kind = MARKERS[index % len(MARKERS)]
    s, inner = size, f"<title>{escape(title)}</title>" if title else ""
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}" class="mark">{inner}</circle>'
    points = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -1.2 * s), (1.1 * s, 0.9 * s), (-1.1 * s, 0.9 * s)],
        "diamond": [(0, -1.3 * s), (1.3 * s, 0), (0, 1.3 * s), (-1.3 * s, 0)],
        "down": [(0, 1.2 * s), (1.1 * s, -0.9 * s), (-1.1 * s, -0.9 * s)],
        "cross": [
            (-s, -0.5 * s),
            (-0.5 * s, -s),
            (0, -0.5 * s),
            (0.5 * s, -s),
            (s, -0.5 * s),
            (0.5 * s, 0),
            (s, 0.5 * s),
            (0.5 * s, s),
            (0, 0.5 * s),
            (-0.5 * s, s),
            (-s, 0.5 * s),
            (-0.5 * s, 0),
        ],
        "plus": [
            (-0.4 * s, -s),
            (0.4 * s, -s),
            (0.4 * s, -0.4 * s),
            (s, -0.4 * s),
            (s, 0.4 * s),
            (0.4 * s, 0.4 * s),
            (0.4 * s, s),
            (-0.4 * s, s),
            (-0.4 * s, 0.4 * s),
            (-s, 0.4 * s),
            (-s, -0.4 * s),
            (-0.4 * s, -0.4 * s),
        ],
        "bar": [(-0.4 * s, -1.2 * s), (0.4 * s, -1.2 * s), (0.4 * s, 1.2 * s), (-0.4 * s, 1.2 * s)],
    }[kind]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon points="{path}" class="mark">{inner}</polygon>'


def swatch(index: int, strong: bool = False) -> Markup:
    """The legend's sample of series ``index``: its line, dash and marker."""
    dash = "" if strong else DASHES[index % len(DASHES)]
    line = f'<line x1="1" y1="7" x2="27" y2="7" class="curve" stroke-dasharray="{dash}"/>'
    return Markup(
        f'<svg class="swatch s{index % 8}" width="28" height="14" viewBox="0 0 28 14" aria-hidden="true">'
        f"{line}{marker(index, 14, 7)}</svg>"
    )


def _svg(height: float, body: Sequence[str], label: str, width: int = WIDTH) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def line_chart(
    series: Sequence[Series],
    x_labels: Sequence[str],
    *,
    label: str,
    top: float,
    height: int = 170,
    learned_at: int | None = None,
    chance: float | None = None,
    digits: int = 1,
    bands: Sequence[tuple[float, float, str]] = (),
    x_title: str = "",
) -> Markup:
    """Lines over evenly spaced moments, y from 0 to ``top``.

    ``learned_at`` shades the moments from that x on; ``chance`` draws a dotted level; ``bands`` are (from, to, name) in x
    units, shaded in turn. ``label`` is read aloud in place of the chart.
    """
    left, right, above, below = 34.0, 10.0, 18.0 if bands else 10.0, 34.0 if x_title else 22.0
    count = max(len(x_labels), 2)
    plot_w, plot_h = WIDTH - left - right, height - above - below

    def at(i: float, value: float) -> tuple[float, float]:
        return left + plot_w * i / (count - 1), above + plot_h * (1 - value / top)

    body: list[str] = []
    for k, (start, end, name) in enumerate(bands):
        x0, x1 = at(max(start, 0), 0)[0], at(min(end, count - 1), 0)[0]
        if k % 2:
            body.append(_rect(x0, above, x1 - x0, plot_h, "learned"))
        body.append(_text((x0 + x1) / 2, above - 5, name, cls="tick"))
    if learned_at is not None and learned_at < count:
        x0 = at(learned_at, 0)[0]
        body.append(_rect(x0, above, WIDTH - right - x0, plot_h, "learned"))
    for tick in ticks(top):
        y = at(0, tick)[1]
        body += [
            _line(left, y, WIDTH - right, y, "grid"),
            _text(left - 6, y + 4, _axis(tick), anchor="end", cls="tick"),
        ]
    if chance is not None and 0 < chance < top:
        y = at(0, chance)[1]
        body.append(_line(left, y, WIDTH - right, y, "chance"))
    every = math.ceil(len(x_labels) / 12) or 1
    body += [_text(at(i, 0)[0], above + plot_h + 15, x, cls="tick") for i, x in enumerate(x_labels) if i % every == 0]
    if x_title:
        body.append(_text(left + plot_w / 2, height - 4, x_title, cls="tick"))
    for one in sorted(series, key=lambda s: s.strong):  # the run itself is drawn last, on top
        body.append(f'<g class="s{one.index % 8}{" strong" if one.strong else ""}">')
        dash = "" if one.strong else DASHES[one.index % len(DASHES)]
        path, pen_up = [], True
        for i, value in enumerate(one.values):
            if value is not None:
                path.append(f"{'M' if pen_up else 'L'}{at(i, value)[0]:.1f} {at(i, value)[1]:.1f}")
            pen_up = value is None
        if path:
            body.append(f'<path d="{"".join(path)}" class="curve" stroke-dasharray="{dash}"/>')
        if count <= 32:
            body += [
                marker(
                    one.index, *at(i, v), 4.0 if one.strong else 3.2, f"{one.name}, {x_labels[i]}: {number(v, digits)}"
                )
                for i, v in enumerate(one.values)
                if v is not None and i < len(x_labels)
            ]
        body.append("</g>")
    return _svg(height, body, label)


def bar_chart(series: Sequence[Series], *, label: str, top: float, best: Sequence[int] = ()) -> Markup:
    """One horizontal bar per series (its first value), its name above it and its value at its end; ``best`` get a star."""
    lane, width = 37.0, 210
    body: list[str] = []
    for k, one in enumerate(series):
        y, value = 4 + k * lane, one.values[0] if one.values else None
        name = one.name if len(one.name) <= 34 else one.name[:33] + "…"
        body.append(_text(0, y + 10, name, anchor="start", cls="name strong" if one.strong else "name"))
        length = 0.0 if value is None else width * min(max(value / top, 0), 1)
        body.append(_rect(0, y + 16, width, 11, "track"))
        body.append(
            f'<g class="s{one.index % 8}">{_rect(0, y + 16, length, 11, "fill", f"{one.name}: {number(value)}")}</g>'
        )
        star = " ★" if k in best else ""
        body.append(_text(width + 6, y + 26, number(value) + star, anchor="start", cls="value"))
    return _svg(4 + lane * max(len(series), 1), body, label, width + 60)


def stacked_columns(
    categories: Sequence[str], stacks: Sequence[Sequence[float]], names: Sequence[str], *, label: str, x_title: str
) -> Markup:
    """Columns of shares (percent of 100), stacked from below: part 0 in grey, later parts in ever stronger colour."""
    height, left, right, above, below = 190, 34.0, 4.0, 10.0, 34.0
    plot_w, plot_h = WIDTH - left - right, height - above - below
    body: list[str] = []
    for tick in ticks(100):
        y = above + plot_h * (1 - tick / 100)
        body += [
            _line(left, y, WIDTH - right, y, "grid"),
            _text(left - 6, y + 4, _axis(tick), anchor="end", cls="tick"),
        ]
    slot = plot_w / max(len(categories), 1)
    wide = min(slot * 0.78, 34)
    every = math.ceil(len(categories) / 14) or 1
    for i, (category, stack) in enumerate(zip(categories, stacks, strict=True)):
        x, base = left + slot * i + (slot - wide) / 2, 0.0
        body.append(_rect(x, above, wide, plot_h, "free", f"{x_title} {category}: {number(100 - sum(stack))} % free"))
        for part, share in enumerate(stack):
            y = above + plot_h * (1 - (base + share) / 100)
            cls, style = (
                ("weights", "") if part == 0 else ("part", f"fill-opacity:{part_opacity(part, len(names)):.2f}")
            )
            body.append(
                _rect(
                    x,
                    y,
                    wide,
                    plot_h * share / 100,
                    cls,
                    f"{x_title} {category}, {names[part]}: {number(share)} %",
                    style,
                )
            )
            base += share
        if i % every == 0:
            body.append(_text(x + wide / 2, above + plot_h + 15, category, cls="tick"))
    body.append(_text(left + plot_w / 2, height - 4, x_title, cls="tick"))
    return _svg(height, body, label)


def part_opacity(part: int, count: int) -> float:
    """Opacity of part 1..count - 1 of a stack, from 0.3 to 1."""
    return 1.0 if count <= 2 else 0.3 + 0.7 * (part - 1) / (count - 2)


def stacked_bars(
    names: Sequence[str], stacks: Sequence[Sequence[float]], parts: Sequence[str], *, label: str, unit: str
) -> Markup:
    """One horizontal bar per name, split into ``parts`` (series colours 0, 1, 2), its total at its end."""
    top = max((sum(stack) for stack in stacks), default=0) or 1.0
    lane, body = 37.0, []
    for k, (name, stack) in enumerate(zip(names, stacks, strict=True)):
        y, x = 4 + k * lane, 0.0
        body.append(_text(0, y + 10, name if len(name) <= 44 else name[:43] + "…", anchor="start", cls="name"))
        for part, value in enumerate(stack):
            length = (WIDTH - 70) * value / top
            title = f"{name}, {parts[part]}: {number(value)} {unit}"
            body.append(f'<g class="s{part}">{_rect(x, y + 16, length, 11, "fill", title)}</g>')
            x += length
        body.append(_text(x + 6, y + 26, f"{number(sum(stack))} {unit}", anchor="start", cls="value"))
    return _svg(6 + lane * max(len(stacks), 1), body, label)
