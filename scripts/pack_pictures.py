"""Pictures of the demo pack: bringing them to one size, comparing them, encoding them."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 112
"""Side of every stored picture in pixels: what the embedded model sees by default."""

LOSSLESS_LIMIT, QUALITY = 4500, 90
"""Flat art is kept exactly where that takes at most so many bytes; the rest is WebP at this quality."""

THUMB, NEAR_BITS, NEAR_GREY, NEAR_CORRELATION = 16, 12, 6.0, 0.04
"""Near-duplicates: at most 12 of 256 difference-hash bits apart, 16 x 16 thumbnails that differ by at most 6 of 255 grey
levels and are correlated to at least 1 - 0.04: thin strokes on white agree in most pixels without being alike."""


@dataclass
class Picture:
    """One picture with its class: pictures of one `item` never stand on both sides of a split.

    `side` is "train" or "test" where the source decides it, else the split does.
    """

    class_name: str
    item: str
    origin: str
    image: Image.Image
    side: str = ""


def draw(text: str) -> int:
    """A number that the text alone decides: every choice of the pack is made with it, so none depends on a seed."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def squared(image: Image.Image, background: str | tuple[int, int, int] = "white", margin: int = 0) -> Image.Image:
    """The whole picture, RGB, centred on a square of `SIDE` pixels with `margin` pixels left free on every side."""
    rgba = image.convert("RGBA")
    room = SIDE - 2 * margin
    factor = room / max(rgba.size)
    size = (max(1, round(rgba.width * factor)), max(1, round(rgba.height * factor)))
    if size != rgba.size:
        # premultiplied, or the colour under transparent pixels would fringe the edges
        method = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
        rgba = rgba.convert("RGBa").resize(size, method).convert("RGBA")
    canvas = Image.new("RGBA", (SIDE, SIDE), background)
    canvas.alpha_composite(rgba, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return canvas.convert("RGB")


def encode(image: Image.Image) -> bytes:
    """WebP bytes: lossless where small, else quality 90."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, quality=60, method=4)
    image.save(lossy, "WEBP", quality=QUALITY, method=4)
    small = exact.tell() <= max(LOSSLESS_LIMIT, lossy.tell())
    return exact.getvalue() if small else lossy.getvalue()


def decode(data: bytes) -> Image.Image:
    """The stored picture as RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def fingerprint(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """(difference hash as 256 signs, 16 x 16 x 3 thumbnail in 0..255), both float32 and flat."""
    grey = np.asarray(image.convert("L").resize((THUMB + 1, THUMB), Image.Resampling.BOX), np.int16)
    signs = np.where(grey[:, 1:] > grey[:, :-1], 1.0, -1.0).astype(np.float32).ravel()
    thumb = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), np.float32).ravel()
    return signs, thumb


def near_pairs(images: list[Image.Image], slack: float = 1.0) -> list[tuple[int, int]]:
    """All pairs (i < j) of exact or near-duplicates; both limits are multiplied by `slack`."""
    prints = [fingerprint(image) for image in images]
    signs, thumbs = np.stack([p[0] for p in prints]), np.stack([p[1] for p in prints])
    shapes = thumbs - thumbs.mean(axis=1, keepdims=True)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True).clip(1e-6)
    pairs = []
    for i in range(len(images) - 1):
        close = np.flatnonzero(signs[i + 1 :] @ signs[i] >= signs.shape[1] - 2 * NEAR_BITS * slack) + i + 1
        difference = np.abs(thumbs[close] - thumbs[i]).mean(axis=1)
        alike = shapes[close] @ shapes[i] >= 1 - NEAR_CORRELATION * slack
        pairs += [(i, int(j)) for j in close[(difference <= NEAR_GREY * slack) & alike]]
    return pairs
