"""CIFAR-100, the Python version: the pickles ``train``, ``test`` and ``meta``, read by `pickles.read_batch`.

Official split (50,000 and 10,000 pictures), fine labels. The 100 names and their order are those of ``meta``, with
spaces for underscores, e.g. ``aquarium fish``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keeplora.data.benchmarks.common import ArrayBytes, benchmark_root
from keeplora.data.benchmarks.pickles import read_batch
from keeplora.data.sets import Entry
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

HOW = "unpack cifar-100-python.tar.gz, from the CIFAR page of the University of Toronto, again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read both batches into memory (180 MB in all, the test batch alone for a probe); ``path`` is ``cifar-100-python``."""
    root = benchmark_root(spec, base_dir)
    meta = root / "meta"
    names = read_batch(meta, ("fine_label_names",), "the list of classes", HOW)["fine_label_names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{meta}: 'fine_label_names' is not a list of names; {HOW}")
    classes = [(n.decode("latin1") if isinstance(n, bytes) else n).replace("_", " ") for n in names]
    splits = {split: _entries(root / split, split, classes) for split in (("test",) if probe else ("train", "test"))}
    return RawTask(splits=splits, class_order=classes, pretty=False)


def _entries(path: Path, split: str, classes: list[str]) -> list[Entry]:
    batch = read_batch(path, ("data", "fine_labels"), f"the {split} batch", HOW)
    data, labels = batch["data"], batch["fine_labels"]
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or not len(data):
        raise DataError(f"{path}: 'data' is not an array of 32 x 32 RGB pictures, one a row; {HOW}")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{path}: 'fine_labels' is not a list of {len(data)} labels, one a picture; {HOW}")
    pictures = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    entries = []
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < len(classes):
            raise DataError(f"{path}, row {row}: the label is {label!r}, not 0 to {len(classes) - 1}; {HOW}")
        entries.append(Entry(f"{split}/{row:05d}", classes[label], f"{path}, row {row}", ArrayBytes(pictures, row)))
    return entries
