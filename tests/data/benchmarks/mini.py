"""Miniature benchmark trees in each dataset's own on-disk format: a few classes, a few small pictures each.

The pictures of a class share a tint, so that a model can learn them; every picture differs from all others, in four
flat quarters that survive JPEG. What a maker writes follows from its seed alone.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

Maker = Callable[[Path, int], None]

AIRCRAFT = ("707-320", "A300B4", "F/A-18", "Yak-42")
CALTECH = ("Faces", "accordion", "crocodile_head", "yin_yang")
CIFAR = ("apple", "aquarium_fish", "beaver", "maple_tree")
DTD = ("banded", "dotted", "polka-dotted", "zigzagged")
EUROSAT = ("AnnualCrop", "Forest", "SeaLake")
FLOWERS = (1, 5, 77, 102)


def quarters(source: str, seed: int, label: str, index: int) -> np.ndarray:
    """The colours ``[2, 2, 3]`` (uint8) of picture ``index`` of a class."""
    tint = np.random.default_rng(zlib.crc32(f"{source}/{label}".encode())).integers(40, 216, 3)
    noise = np.random.default_rng([seed, index, zlib.crc32(f"{source}/{label}/{index}".encode())])
    return np.clip(tint + noise.integers(-40, 41, (2, 2, 3)), 0, 255).astype(np.uint8)


def picture(source: str, seed: int, label: str, index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Pixels ``[height, width, 3]`` (uint8) of a picture of ``size`` (width, height)."""
    width, height = size
    colours = quarters(source, seed, label, index)
    return colours[np.arange(height) * 2 // height][:, np.arange(width) * 2 // width]


def write_jpeg(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)


def fgvc_aircraft(root: Path, seed: int) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, variant in enumerate(AIRCRAFT):
        for index in range(9):
            number = f"{(c * 9 + index) * 7919 % 999_983:07d}"
            write_jpeg(data / f"images/{number}.jpg", picture("fgvc-aircraft", seed, variant, index, (40, 28)))
            split = ("train", "val", "test")[index % 3]
            lists[split].append(f"{number} {variant}")
    for split, lines in lists.items():
        lines = [*sorted(lines, key=lambda line: zlib.crc32(line.encode()))]
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("\n".join(AIRCRAFT) + "\n")
    (data / "families.txt").write_text("Boeing 707\nA300\nF/A-18\nYak-42\n")


def caltech101(root: Path, seed: int) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    for c, category in enumerate(CALTECH):
        for index in range(8 + c):
            pixels = picture("caltech101", seed, category, index, (36, 30))
            write_jpeg(folder / category / f"image_{index + 1:04d}.jpg", pixels)
    for index in range(3):
        pixels = picture("caltech101", seed, "BACKGROUND_Google", index)
        write_jpeg(folder / f"BACKGROUND_Google/image_{index + 1:04d}.jpg", pixels)
    (folder / "BACKGROUND_Google/tmp").write_bytes(b"")  # in the real archive too


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: byte strings for text and bytes, numpy under its old module names."""

    dispatch = pickle._Pickler.dispatch.copy()

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def _string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[str] = dispatch[bytes] = _string
    dispatch[type(np.empty)] = save_global


def pickle2(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer).dump(value)
    return buffer.getvalue()


def cifar100(root: Path, seed: int, dump: Callable[[object], bytes] = pickle2) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, first, count in (("train", 0, 8), ("test", 8, 4)):
        rows = [(label, first + index) for index in range(count) for label in range(len(CIFAR))]
        random.Random(seed).shuffle(rows)
        pictures = np.stack([picture("cifar100", seed, CIFAR[label], index) for label, index in rows])
        batch = {
            "filenames": [f"{CIFAR[label]}_s_{index:06d}.png" for label, index in rows],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": [label for label, _ in rows],
            "coarse_labels": [label // 2 for label, _ in rows],
            "data": np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).reshape(len(rows), -1),
        }
        (folder / split).write_bytes(dump(batch))
    meta = {"fine_label_names": list(CIFAR), "coarse_label_names": ["fruit", "trees"]}
    (folder / "meta").write_bytes(dump(meta))


def dtd(root: Path, seed: int) -> None:
    folder = root / "dtd/dtd"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in DTD:
        for index in range(9):
            file = f"{name}/{name}_{index * 3 + 2:04d}.jpg"
            write_jpeg(folder / "images" / file, picture("dtd", seed, name, index, (30, 34)))
            lists[("train", "val", "test")[index % 3]].append(file)
    (folder / "labels").mkdir()
    for split, lines in lists.items():
        (folder / f"labels/{split}1.txt").write_text("\n".join(lines) + "\n")
        (folder / f"labels/{split}2.txt").write_text("\n".join(lines[::-1]) + "\n")
    (folder / "imdb").mkdir()
    (folder / "imdb/imdb.mat").write_bytes(b"")


def eurosat(root: Path, seed: int) -> None:
    for name in EUROSAT:
        for index in range(11):
            write_jpeg(root / f"eurosat/2750/{name}/{name}_{index + 1}.jpg", picture("eurosat", seed, name, index))


def flowers102(root: Path, seed: int) -> None:
    folder = root / "flowers-102"
    labels: list[int] = []
    sets: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for label in FLOWERS:
        for index in range(8):
            labels.append(label)
            number = len(labels)
            pixels = picture("flowers102", seed, str(label), index, (34, 30))
            write_jpeg(folder / f"jpg/image_{number:05d}.jpg", pixels)
            sets[("trnid", "valid", "tstid", "tstid")[index % 4]].append(number)
    random.Random(seed).shuffle(sets["tstid"])
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([ids], np.uint16) for name, ids in sets.items()})


#: Source name -> maker(data folder, seed).
MAKERS: dict[str, Maker] = {
    "fgvc-aircraft": fgvc_aircraft,
    "caltech101": caltech101,
    "cifar100": cifar100,
    "dtd": dtd,
    "eurosat": eurosat,
    "flowers102": flowers102,
}
#: Source name -> the `path` of its task.
PATHS: dict[str, str] = {
    "fgvc-aircraft": "fgvc-aircraft-2013b",
    "caltech101": "caltech101",
    "cifar100": "cifar-100-python",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "flowers102": "flowers-102",
}

if importlib.util.find_spec("tests.data.benchmarks.mini_b") is not None:
    from tests.data.benchmarks import mini_b

    MAKERS |= mini_b.MAKERS_B
    PATHS |= getattr(mini_b, "PATHS_B", {})


def make_mini(root: Path, sources: Iterable[str] | None = None, seed: int = 0) -> Path:
    """Write the miniature trees of ``sources`` (all by default) below ``root``, and give ``root`` back."""
    root.mkdir(parents=True, exist_ok=True)
    for source in MAKERS if sources is None else sources:
        MAKERS[source](root, seed)
    return root
