"""Caltech-101: ``101_ObjectCategories/<category>/image_0001.jpg``.

There is no official split. MTIL permutes the 8,677 pictures with a fixed seed: categories sorted by code point without
``BACKGROUND_Google``, pictures 1, 2, ... within. The class names are CLIP's; see `names.CALTECH101`.
"""

from __future__ import annotations

import re
from pathlib import Path

from keeplora.data.benchmarks.common import benchmark_root, file_names, folder_names, inner_folder, split_80_20
from keeplora.data.benchmarks.names import CALTECH101
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec, listing, suggest
from keeplora.errors import DataError

HOW = "unpack 101_ObjectCategories.tar.gz, from the Caltech-101 page of CaltechDATA, again"
_PICTURE = re.compile(r"image_(\d{4})\.jpg")


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """List the categories; ``path`` is the folder that holds ``101_ObjectCategories``.

    A gap in a category's numbers is refused: every later picture would change sides.
    """
    root = inner_folder(benchmark_root(spec, base_dir), "101_ObjectCategories", "the folder of categories", HOW)
    raw = RawTask(splits={}, class_order=list(CALTECH101.values()), pretty=False)
    entries: list[Entry] = []
    ignored: list[str] = []
    for category in folder_names(root, "the folder of categories", HOW):
        if category == "BACKGROUND_Google":
            continue
        if category not in CALTECH101:
            raise DataError(
                f"{root / category}: no category of Caltech-101{suggest(category, CALTECH101)}; "
                "move it elsewhere, as it would change the seeded split"
            )
        label = CALTECH101[category]
        folder = root / category
        names = file_names(folder, "the category", HOW)
        pictures = [name for name in names if _PICTURE.fullmatch(name)]
        ignored += [f"{category}/{name}" for name in names if not _PICTURE.fullmatch(name)]
        if not pictures:
            raw.empty.setdefault("train", []).append((category, str(folder)))
        for number, name in enumerate(pictures, 1):
            if name != f"image_{number:04d}.jpg":
                raise DataError(f"{folder}: image_{number:04d}.jpg is missing, which shifts the split; {HOW}")
            path = folder / name
            entries.append(Entry(f"{category}/{name}", label, str(path), FileBytes(path)))
    if not entries:
        raise DataError(f"{root}: holds no category of Caltech-101; {HOW}")
    if ignored:
        raw.warnings.append(f"{len(ignored)} file(s) that are no picture of Caltech-101 ignored: {listing(ignored)}")
    raw.splits = split_80_20(entries)
    return raw
