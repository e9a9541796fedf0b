"""Composed scenes: coloured shapes, or cut-out pictures, in the cells of a grid, and what is true of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from stand_in_pictures import Thing

SIDE, SCALE = 112, 3
COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 215, 40),
    "orange": (245, 140, 25),
    "purple": (130, 50, 160),
    "pink": (245, 130, 180),
    "brown": (125, 75, 35),
    "black": (20, 20, 20),
    "grey": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def place_name(row: int, column: int) -> str:
    """The name of a cell of the 3 x 3 grid.

    >>> place_name(0, 0), place_name(0, 1), place_name(1, 1)
    ('top left', 'top', 'centre')
    """
    if row == 1:
        return COLUMNS[column]
    return ROWS[row] if column == 1 else f"{ROWS[row]} {COLUMNS[column]}"


@dataclass
class Piece:
    """One thing of a scene: `what` is a shape or a group, `colour` is empty for cut-outs; centre in 0..1."""

    what: str
    colour: str
    x: float
    y: float
    cell: tuple[int, int]
    item: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.what}".strip()


def ground(rng: Random, noisy: bool = True) -> Image.Image:
    """White, a light tint, a light gradient or light noise."""
    kind = rng.random() if noisy else rng.uniform(0, 0.65)
    tint = np.array([rng.uniform(205, 255) for _ in range(3)], np.float32)
    if kind < 0.35:
        tint[:] = 255
    plane = np.broadcast_to(tint, (SIDE, SIDE, 3)).copy()
    if kind > 0.65:
        angle = rng.uniform(0, 2 * math.pi)
        ys, xs = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
        plane += 40 * ((xs * math.cos(angle) + ys * math.sin(angle))[..., None])
    if kind > 0.85:
        noise = np.random.default_rng(rng.randrange(2**31)).normal(0, 10, (SIDE, SIDE, 1))
        plane += noise
    return Image.fromarray(plane.clip(0, 255).astype(np.uint8))


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        r = radius * 0.86
        return [(-r, -r), (r, -r), (r, r), (-r, r)]
    if shape == "triangle":
        return [(0, -radius), (radius * 0.95, radius * 0.8), (-radius * 0.95, radius * 0.8)]
    if shape == "diamond":
        return [(0, -radius), (radius * 0.7, 0), (0, radius), (-radius * 0.7, 0)]
    if shape == "star":
        turns = [(k * math.pi / 5, radius if k % 2 == 0 else radius * 0.42) for k in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]
    if shape == "cross":
        a, b = radius, radius * 0.34
        return [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    curve = [t * 2 * math.pi / 40 for t in range(40)]  # heart
    return [
        (
            radius * math.sin(t) ** 3,
            -radius * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in curve
    ]


def stamp(shape: str, colour: str, radius: float, rng: Random) -> Image.Image:
    """The shape on transparency, smoothed, its colour shaded a little."""
    side = math.ceil(2 * radius) + 2
    big = Image.new("L", (side * SCALE, side * SCALE), 0)
    pen, centre, r = ImageDraw.Draw(big), side * SCALE / 2, radius * SCALE
    if shape in ("circle", "ring"):
        pen.ellipse((centre - r, centre - r, centre + r, centre + r), fill=255)
        if shape == "ring":
            hole = r * 0.58
            pen.ellipse((centre - hole, centre - hole, centre + hole, centre + hole), fill=0)
    else:
        pen.polygon([(centre + x, centre + y) for x, y in _outline(shape, r)], fill=255)
    mask = big.resize((side, side), Image.Resampling.BOX)
    shade = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[colour])
    picture = Image.new("RGBA", (side, side), shade)
    picture.putalpha(mask)
    return picture


def cells(rng: Random, count: int, grid: int = 3) -> list[tuple[int, int]]:
    """Different cells of the grid, in random order."""
    return rng.sample([(row, column) for row in range(grid) for column in range(grid)], count)


def paste(
    canvas: Image.Image, picture: Image.Image, cell: tuple[int, int], rng: Random, grid: int = 3
) -> tuple[float, float]:
    """Lay a cut-out into its cell with a little jitter; returns its centre in 0..1."""
    step = SIDE / grid
    slack = max(0.0, (step - max(picture.size)) / 2)
    x = (cell[1] + 0.5) * step + rng.uniform(-slack, slack)
    y = (cell[0] + 0.5) * step + rng.uniform(-slack, slack)
    canvas.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)
    return x / SIDE, y / SIDE


def shape_scene(rng: Random, count: int, kinds: int | None = None) -> tuple[Image.Image, list[Piece]]:
    """`count` shapes in the 3 x 3 grid; `kinds` limits how many different (shape, colour) pairs there are."""
    canvas = ground(rng)
    looks = [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(kinds or count)]
    pieces = []
    for number, cell in enumerate(cells(rng, count)):
        shape, colour = looks[number] if number < len(looks) else rng.choice(looks)
        x, y = paste(canvas, stamp(shape, colour, rng.uniform(10.5, 17.5), rng), cell, rng)
        pieces.append(Piece(shape, colour, x, y, cell))
    return canvas, pieces


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """A cut-out at `side` pixels (longest side)."""
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def thing_scene(
    rng: Random,
    things: list[Thing],
    sizes: tuple[int, int],
    spots: list[tuple[int, int]],
    grid: int = 3,
    noisy: bool = True,
) -> tuple[Image.Image, list[Piece]]:
    """Cut-outs in the given cells of a grid."""
    canvas = ground(rng, noisy)
    pieces = []
    for thing, cell in zip(things, spots, strict=True):
        assert thing.cutout is not None
        x, y = paste(canvas, fitted(thing.cutout, rng.randint(*sizes)), cell, rng, grid)
        pieces.append(Piece(thing.group, "", x, y, cell, thing.item, thing.source))
    return canvas, pieces


def digit_picture(rng: Random, scans: list[np.ndarray], sizes: tuple[int, int], jitter: float) -> Image.Image:
    """Scans side by side, light ink on dark or dark ink on light."""
    side = rng.randint(*sizes)
    canvas = Image.new("L", (SIDE, SIDE), 0)
    wide, high = (SIDE - side * len(scans)) / 2, (SIDE - side) / 2
    left = wide + rng.uniform(-min(jitter, wide), min(jitter, wide))
    top = high + rng.uniform(-min(jitter, high), min(jitter, high))
    for number, scan in enumerate(scans):
        small = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(small, (round(left + number * side), round(top)))
    if rng.random() < 0.5:
        canvas = canvas.point(lambda v: 255 - v)
    return canvas.filter(ImageFilter.GaussianBlur(0.3)).convert("RGB")
