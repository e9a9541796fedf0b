"""Describable Textures (DTD r1.0.1): ``images/<class>/<file>`` and ``labels/{train1.txt, test1.txt}``.

Official split 1, training and test lists (1,880 each; ``val1`` is not used, as in MTIL). The 47 names are the class
folders, sorted, e.g. ``polka-dotted``.
"""

from __future__ import annotations

from pathlib import Path

from keeplora.data.benchmarks.common import benchmark_root, inner_folder, need, read_lines
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

HOW = "unpack dtd-r1.0.1.tar.gz, from the DTD page of the Oxford Visual Geometry Group, again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official lists; ``path`` is the folder that ``images`` and ``labels`` lie in, or the one above (``dtd``)."""
    root = inner_folder(benchmark_root(spec, base_dir), "dtd", "the dataset's folder", HOW)
    images = need(root / "images", "the folder of pictures", HOW, folder=True)
    raw = RawTask(splits={}, pretty=False)
    for split in ("train", "test"):
        table = root / "labels" / f"{split}1.txt"
        entries: dict[str, Entry] = {}
        for line in read_lines(table, f"the {split} list of split 1", HOW):
            name, _, file = line.partition("/")
            if not name or not file or "/" in file:
                raise DataError(f"{table}: the line {line!r} is not <class>/<file>; {HOW}")
            path = images / name / file
            entries[line] = Entry(f"{split}/{line}", name.replace("_", " "), str(path), FileBytes(path))
        raw.splits[split] = list(entries.values())
    raw.class_order = sorted({entry.label for entry in raw.splits["train"]})
    return raw
