"""EuroSAT, the RGB version: ``2750/<class>/<class>_1.jpg``.

There is no official split. MTIL permutes the 27,000 pictures with a fixed seed: classes, then file names, both sorted
by code point (``_1``, ``_10``, ``_100``, ...), as torchvision's ImageFolder lists them. The class names are CLIP's;
see `names.EUROSAT`.
"""

from __future__ import annotations

from pathlib import Path

from keeplora.data.benchmarks.common import (
    IMAGE_FOLDER_EXTENSIONS,
    benchmark_root,
    file_names,
    folder_names,
    inner_folder,
    split_80_20,
)
from keeplora.data.benchmarks.names import EUROSAT
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec, listing, suggest
from keeplora.errors import DataError

HOW = "unpack EuroSAT.zip (the RGB version), from the EuroSAT page or its Zenodo record, again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """List the classes; ``path`` is the folder that holds ``2750``."""
    root = inner_folder(benchmark_root(spec, base_dir), "2750", "the folder of classes", HOW)
    raw = RawTask(splits={}, class_order=list(EUROSAT.values()), pretty=False)
    entries: list[Entry] = []
    for name in folder_names(root, "the folder of classes", HOW):
        if name not in EUROSAT:
            raise DataError(
                f"{root / name}: no class of EuroSAT{suggest(name, EUROSAT)}; "
                "move it elsewhere, as it would change the seeded split"
            )
        folder = root / name
        pictures = file_names(folder, "the class", HOW, IMAGE_FOLDER_EXTENSIONS)
        if not pictures:
            raw.empty.setdefault("train", []).append((name, str(folder)))
        have = set(pictures)
        gaps = [f"{name}_{i}.jpg" for i in range(1, len(pictures) + 1) if f"{name}_{i}.jpg" not in have]
        if gaps:
            raw.warnings.append(
                f"{folder}: {listing(gaps)} missing, so the seeded split is not the published one; {HOW}"
            )
        for picture in pictures:
            path = folder / picture
            entries.append(Entry(f"{name}/{picture}", EUROSAT[name], str(path), FileBytes(path)))
    if not entries:
        raise DataError(f"{root}: holds no class of EuroSAT; {HOW}")
    raw.splits = split_80_20(entries)
    return raw
