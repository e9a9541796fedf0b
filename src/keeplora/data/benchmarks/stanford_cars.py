"""Stanford Cars (``stanford_cars/{cars_train,cars_test,devkit,cars_test_annos_withlabels.mat}``): the official split.

Class names are those of ``devkit/cars_meta.mat``, unchanged, with the year last ("Acura TL Sedan 2012"), as in
torchvision, whose classes ZSCL's code uses. The test labels are a file of their own beside the kit; copies of the
dataset that put it into ``devkit`` are read too. The kit's own ``cars_test_annos.mat`` holds no labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keeplora.data.benchmarks.common import benchmark_root, need, read_mat
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

_HOW = "unpack car_devkit.tgz again"
_HOW_TEST = "fetch cars_test_annos_withlabels.mat, which comes apart from the kit"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official split; pictures are not touched."""
    root = benchmark_root(spec, base_dir)
    meta = root / "devkit/cars_meta.mat"
    found = np.atleast_1d(read_mat(meta, ["class_names"], "the list of classes", _HOW)["class_names"]).tolist()
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise DataError(f"{meta}: `class_names` is not a list of names; {_HOW}")
    names = [name.strip() for name in found]
    labelled = root / "cars_test_annos_withlabels.mat"
    inside = root / "devkit" / labelled.name
    if not labelled.exists() and inside.exists():
        labelled = inside
    tables = {"train": (root / "devkit/cars_train_annos.mat", _HOW), "test": (labelled, _HOW_TEST)}
    raw = RawTask(splits={}, class_order=names, pretty=False)
    for split, (table, how) in tables.items():
        folder = root / f"cars_{split}"
        need(folder, f"the folder of the {split} pictures", f"unpack cars_{split}.tgz again", folder=True)
        raw.splits[split] = entries = []
        for file, number in _annotations(table, split, how):
            if not 1 <= number <= len(names):
                raise DataError(f"{table}: {file!r} is of class {number}, cars_meta.mat has {len(names)}; {how}")
            path = folder / file
            entries.append(Entry(f"{split}/{file}", names[number - 1], str(path), FileBytes(path)))
    return raw


def _annotations(table: Path, split: str, how: str) -> list[tuple[str, int]]:
    """(file name, class from 1) of every picture."""
    rows = np.atleast_1d(read_mat(table, ["annotations"], f"the {split} labels", how)["annotations"])
    lacking = [field for field in ("fname", "class") if field not in (rows.dtype.names or ())]
    if lacking:
        raise DataError(f"{table}: its annotations have no {' and no '.join(lacking)}; {how}")
    try:
        return [(str(file), int(number)) for file, number in zip(rows["fname"], rows["class"], strict=True)]
    except (TypeError, ValueError) as error:
        raise DataError(f"{table}: a class is no number ({error}); {how}") from error
