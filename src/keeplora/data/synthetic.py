"""Pictures that are nobody's: dead leaves, drawn from a seed, whose features stand in for those of pictures at large."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 160
"""Pixels of a side."""


def dead_leaves(index: int, *, seed: int = 0, side: int = SIDE) -> Image.Image:
    """One picture of shapes that lie on one another, plain or grainy, in few colours: RGB, ``side`` × ``side``.

    Occlusion and shapes of all sizes give such pictures much of the statistics of natural ones (Lee, Mumford & Huang, "Occlusion
    models for natural images", IJCV 2001), and networks learn useful features from nothing else (Baradad et al., "Learning to see
    by looking at noise", NeurIPS 2021, arXiv 2106.05963). The same numbers give the same picture.

    >>> dead_leaves(0).size, dead_leaves(0) == dead_leaves(0), dead_leaves(0) == dead_leaves(1)
    ((160, 160), True, False)
    """
    rng = np.random.default_rng((seed, index))
    ground = _colour(rng) if rng.random() < 0.6 else (255, 255, 255)
    picture = Image.new("RGB", (side, side), ground)
    palette = [_colour(rng) for _ in range(rng.integers(2, 8))]
    for _ in range(rng.integers(1, 60)):
        leaf = _leaf(rng, side).rotate(float(rng.uniform(0, 360)))
        if rng.random() < 0.3:
            picture.paste(_grain(rng, side), mask=leaf)
        else:
            picture.paste(palette[rng.integers(len(palette))], mask=leaf)
    return picture


def drifting(picture: Image.Image, frames: int) -> list[Image.Image]:
    """A clip of a window that moves over ``picture`` along its diagonal: RGB frames of three quarters of its side."""
    side = picture.width * 3 // 4
    steps = [round((picture.width - side) * i / max(1, frames - 1)) for i in range(frames)]
    return [picture.crop((at, at, at + side, at + side)) for at in steps]


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in rng.integers(0, 256, 3))
    return r, g, b


def _leaf(rng: np.random.Generator, side: int) -> Image.Image:
    """A mask with one shape: an ellipse, a polygon, a rectangle, a broken line or an arc; small ones are more frequent."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    radius = 3 + 0.45 * side * float(rng.random()) ** 2
    x, y = (float(v) for v in rng.random(2) * side)
    match int(rng.integers(0, 5)):
        case 0:
            flat = float(rng.uniform(0.3, 1.0)) * radius
            draw.ellipse([x - radius, y - flat, x + radius, y + flat], fill=255)
        case 1:
            corners = int(rng.integers(3, 9))
            angles = np.sort(rng.random(corners)) * 2 * math.pi
            reach = radius * rng.uniform(0.3, 1.0, corners)
            draw.polygon(
                [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)], fill=255
            )
        case 2:
            draw.rectangle([x - radius, y - radius / 2, x + radius, y + radius / 2], fill=255)
        case 3:
            points = [(float(a), float(b)) for a, b in rng.random((int(rng.integers(2, 6)), 2)) * side]
            draw.line(points, fill=255, width=int(rng.integers(1, 12)))
        case _:
            begin, end = sorted(float(v) for v in rng.random(2) * 360)
            draw.arc(
                [x - radius, y - radius, x + radius, y + radius], begin, end, fill=255, width=int(rng.integers(1, 14))
            )
    return mask


def _grain(rng: np.random.Generator, side: int) -> Image.Image:
    """Noise whose spectrum falls as 1 / f^p, p from 0.5 (fine) to 2 (clouds), each colour by itself."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1.0
    power = rng.uniform(0.5, 2.0)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, side, side))) / frequency**power).real
    low, high = (edge(noise, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    return Image.fromarray((255 * (noise - low) / (high - low)).transpose(1, 2, 0).astype(np.uint8))
