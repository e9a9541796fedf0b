"""Oxford-IIIT Pet (``oxford-iiit-pet/{annotations,images}``): the official trainval and test lists.

Class names come from the file names, as in torchvision, whose classes ZSCL's code uses: the number after the last
underscore taken off, each word with a capital ("English Cocker Spaniel"). The order is that of the lists' class ids.
"""

from __future__ import annotations

from pathlib import Path

from keeplora.data.benchmarks.common import benchmark_root, need, read_lines
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

_HOW = "unpack images.tar.gz and annotations.tar.gz again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official split; pictures are not touched."""
    root = benchmark_root(spec, base_dir)
    images = need(root / "images", "the picture folder", _HOW, folder=True)
    raw = RawTask(splits={}, pretty=False)
    names: dict[int, str] = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        table = root / "annotations" / file
        raw.splits[split] = entries = []
        for line in read_lines(table, f"the list of {split} pictures", _HOW):
            if line.startswith("#"):
                continue
            fields = line.split()
            breed, _, number = fields[0].rpartition("_")
            if len(fields) != 4 or not breed or not number or not fields[1].isdecimal():
                raise DataError(f"{table}: {line!r} is not `Breed_number class species breed`; {_HOW}")
            name = " ".join(word.title() for word in breed.split("_"))
            if names.setdefault(int(fields[1]), name) != name:
                raise DataError(f"{table}: class {fields[1]} is {name!r} here, {names[int(fields[1])]!r} above; {_HOW}")
            path = images / f"{fields[0]}.jpg"
            entries.append(Entry(f"{split}/{path.name}", name, str(path), FileBytes(path)))
        if not entries:
            raise DataError(f"{table}: names no picture; {_HOW}")
    raw.class_order = [names[number] for number in sorted(names)]
    if len(set(raw.class_order)) < len(names):
        raise DataError(f"{root / 'annotations'}: two class ids have one breed; {_HOW}")
    return raw
