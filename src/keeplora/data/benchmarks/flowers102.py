"""Oxford 102 Flowers: ``jpg/image_00001.jpg``, ``imagelabels.mat`` and ``setid.mat``.

Official training and test pictures (``trnid`` 1,020 and ``tstid`` 6,149; ``valid`` is not used, as in MTIL). The files
hold numbers; the names are CLIP's, see `names.FLOWERS102`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keeplora.data.benchmarks.common import benchmark_root, need, read_mat
from keeplora.data.benchmarks.names import FLOWERS102
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec, listing
from keeplora.errors import DataError

HOW = "fetch it again from the 102 Flowers page of the Oxford Visual Geometry Group"


def _numbers(values: Any, most: int, path: Path, variable: str) -> list[int]:
    """Whole numbers from 1 to ``most``, or a DataError."""
    found = np.atleast_1d(values)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iuf" or np.any(found != np.floor(found)):
        raise DataError(f"{path}: the variable {variable!r} is not a list of whole numbers; {HOW}")
    if found.min() < 1 or found.max() > most:
        raise DataError(
            f"{path}: the variable {variable!r} holds {int(found.min())} to {int(found.max())}, not 1 to {most}; {HOW}"
        )
    return [int(value) for value in found]


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official splits; ``path`` is the folder ``flowers-102``."""
    root = benchmark_root(spec, base_dir)
    jpg = need(root / "jpg", "the folder of pictures", "unpack 102flowers.tgz there", folder=True)
    labels_file, sets_file = root / "imagelabels.mat", root / "setid.mat"
    values = read_mat(labels_file, ["labels"], "the table of labels", HOW)["labels"]
    labels = _numbers(values, len(FLOWERS102), labels_file, "labels")
    sets = read_mat(sets_file, ["trnid", "tstid"], "the table of splits", HOW)
    raw = RawTask(splits={}, class_order=list(FLOWERS102), pretty=False)
    chosen = {s: _numbers(sets[v], len(labels), sets_file, v) for s, v in (("train", "trnid"), ("test", "tstid"))}
    both = sorted(set(chosen["train"]) & set(chosen["test"]))
    if both:
        raise DataError(f"{sets_file}: the picture(s) {listing(map(str, both))} are in train and in test; {HOW}")
    for split, numbers in chosen.items():
        raw.splits[split] = []
        for number in dict.fromkeys(numbers):
            path = jpg / f"image_{number:05d}.jpg"
            entry = Entry(f"{split}/{path.name}", FLOWERS102[labels[number - 1] - 1], str(path), FileBytes(path))
            raw.splits[split].append(entry)
    return raw
