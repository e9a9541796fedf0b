"""Pictures made for the tests of this folder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encode(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (12, 10), **options: object) -> bytes:
    """A small picture of noise; another seed, another picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


class Tree:
    """Writes picture files below a folder, every one different from all others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def write(self, name: str, data: bytes | None = None) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        path.write_bytes(encode(self.count) if data is None else data)
        return path

    def classes(self, prefix: str, names: str, count: int) -> None:
        for name in names.split():
            for index in range(count):
                self.write(f"{prefix}/{name}/{index}.png")
