"""Food-101 (``food-101/{images,meta}``): the official lists ``meta/train.txt`` and ``meta/test.txt``.

Class names are those of ``meta/classes.txt`` with spaces for underscores ("apple pie"), in that file's order, which is
alphabetical: what torchvision's sorted keys of ``meta/train.json`` give, and so what ZSCL's code uses.
"""

from __future__ import annotations

from pathlib import Path

from keeplora.data.benchmarks.common import benchmark_root, need, read_lines
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

_HOW = "unpack food-101.tar.gz again, which holds images/ and meta/"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official split; pictures are not touched."""
    root = benchmark_root(spec, base_dir)
    images = need(root / "images", "the picture folder", _HOW, folder=True)
    folders = read_lines(root / "meta/classes.txt", "the list of classes", _HOW)
    names = {folder: folder.replace("_", " ") for folder in folders}
    raw = RawTask(splits={}, class_order=list(names.values()), pretty=False)
    for split in ("train", "test"):
        table = root / f"meta/{split}.txt"
        raw.splits[split] = entries = []
        for line in read_lines(table, f"the list of {split} pictures", _HOW):
            folder = line.partition("/")[0]
            if folder not in names or folder == line:
                raise DataError(f"{table}: {line!r} is not `class/number` with a class of classes.txt; {_HOW}")
            path = images / f"{line}.jpg"
            entries.append(Entry(f"{split}/{line}.jpg", names[folder], str(path), FileBytes(path)))
    return raw
