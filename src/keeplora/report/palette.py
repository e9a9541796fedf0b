"""Colours that a colour-blind reader can tell apart, for a light and a dark page, and the contrast that they must have.

The hues follow Okabe & Ito, darkened for white paper and lightened for the dark page. Charts never rely on colour alone:
every series also has its own marker and dash.
"""

from __future__ import annotations

Rgb = tuple[float, float, float]

SURFACE = {"light": "#ffffff", "dark": "#171c24"}
SERIES = {
    "light": ["#0068a8", "#c84b00", "#00805c", "#a8428a", "#8a6100", "#4f5b66", "#6a4fc8", "#00757f"],
    "dark": ["#56b4e9", "#ff9a52", "#2fc79a", "#e68fc4", "#e3b341", "#b0bac5", "#b9a3ff", "#4fd0dd"],
}
MARKERS = ["circle", "square", "triangle", "diamond", "down", "cross", "plus", "bar"]
DASHES = ["", "6 3", "2 3", "8 3 2 3", "4 2", "1 3", "10 4", "6 2 1 2"]
HEAT = {"light": ("#f2f7fb", "#0b4f86"), "dark": ("#1c232d", "#2f73b5")}
INK = {"light": ("#080c10", "#ffffff"), "dark": ("#e8edf3", "#ffffff")}
HEAT_LEVELS = 13


def _rgb(colour: str) -> Rgb:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def mix(low: str, high: str, share: float) -> str:
    """The colour ``share`` (0..1) of the way from ``low`` to ``high``, in sRGB.

    >>> mix("#000000", "#ffffff", 0.5)
    '#808080'
    """
    return "#" + "".join(
        f"{round(255 * (a + (b - a) * share)):02x}" for a, b in zip(_rgb(low), _rgb(high), strict=True)
    )


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours, 1..21; text needs 4.5, lines and marks 3.

    >>> contrast("#000000", "#ffffff")
    21.0
    """

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return round((light + 0.05) / (dark + 0.05), 2)


def heat(theme: str, level: int) -> tuple[str, str]:
    """Background and the better-readable ink of heat-map level 0..HEAT_LEVELS - 1 in theme "light" or "dark"."""
    background = mix(*HEAT[theme], level / (HEAT_LEVELS - 1))
    return background, max(INK[theme], key=lambda ink: contrast(background, ink))


def css(theme: str) -> str:
    """The custom properties of a theme: ``--surface``, ``--s0``.., ``--h0``.. (heat) and ``--i0``.. (ink on it)."""
    rules = [f"--surface:{SURFACE[theme]}"]
    rules += [f"--s{i}:{colour}" for i, colour in enumerate(SERIES[theme])]
    for level in range(HEAT_LEVELS):
        background, ink = heat(theme, level)
        rules += [f"--h{level}:{background}", f"--i{level}:{ink}"]
    return ";".join(rules)
