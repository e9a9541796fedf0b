"""What each benchmark source needs below its folder, so that everything that is missing is told at once.

A loader stops at the first thing it misses. A name that ends in "/" is a folder; "a|b" means that one of the two will do.
"""

from __future__ import annotations

import os
from pathlib import Path

from keeplora.data.spec import TaskSpec

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

LAYOUTS: dict[str, tuple[str, ...]] = {
    "fgvc-aircraft": (
        "data/images/", "data/variants.txt", "data/images_variant_train.txt", "data/images_variant_test.txt"
    ),
    "caltech101": ("101_ObjectCategories/",),
    "cifar100": ("meta", "train", "test"),
    "dtd": ("dtd/images/", "dtd/labels/train1.txt", "dtd/labels/test1.txt"),
    "eurosat": ("2750/",),
    "flowers102": ("jpg/", "imagelabels.mat", "setid.mat"),
    "food101": ("images/", "meta/classes.txt", "meta/train.txt", "meta/test.txt"),
    "mnist": tuple(f"raw/{name}|raw/{name}.gz" for name in _IDX),
    "oxford-pet": ("images/", "annotations/trainval.txt", "annotations/test.txt"),
    "stanford-cars": (
        "cars_train/", "cars_test/", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat",
        "cars_test_annos_withlabels.mat|devkit/cars_test_annos_withlabels.mat",
    ),
    "sun397": ("ClassName.txt",),
}  # fmt: skip
_COOP_AIRCRAFT = ("variants.txt", "images_variant_train.txt", "images_variant_test.txt")


def needed(spec: TaskSpec) -> tuple[str, ...]:
    """The names that must exist below the folder of ``spec``; none for sources whose layout is the user's own."""
    if spec.source == "coop":
        file = spec.extra.get("split_file")
        return (f"{spec.extra.get('images', 'images')}/", *((file,) if file else _COOP_AIRCRAFT))
    return LAYOUTS.get(spec.source, ())


def look_for(root: Path, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(found, missing) of ``names`` below ``root``; a missing one that lies one folder deeper says so."""
    inner = {name.split("/")[0] for name in names}
    if inner == {root.name} and not (root / root.name).is_dir():
        root = root.parent  # the path names the inner folder, which the loaders take too
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        choices = name.split("|")
        there = next((choice for choice in choices if _exists(root, choice)), None)
        if there is not None:
            found.append(there)
        else:
            missing.append(" or ".join(choices) + _deeper(root, choices))
    return found, missing


def _exists(root: Path, name: str) -> bool:
    path = root / name
    return path.is_dir() if name.endswith("/") else path.is_file()


def _deeper(root: Path, choices: list[str]) -> str:
    """Archives are often unpacked into a folder of their own name: look one folder down."""
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return ""
    for folder in folders[:100]:
        if any(_exists(root / folder, choice) for choice in choices):
            return f" (it lies in {folder}/: move what {folder}/ holds one folder up)"
    return ""
