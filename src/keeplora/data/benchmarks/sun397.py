"""SUN397 (``SUN397/{a..y}/...`` with ``ClassName.txt``): all pictures, cut 80/20 with seed 42.

Class names are the paths of ``ClassName.txt`` without the letter, underscores as spaces, slashes kept: "airplane cabin",
"church/outdoor". So torchvision has them, whose classes the code of ZSCL and of KeepLoRA uses.

torchvision lists the pictures in whatever order the file system gives, before the seeded cut; so which pictures the
published work trained and tested on is not known. Here the names are sorted: the counts are the published ones, and
the same cut is made on every machine.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from keeplora.data.benchmarks.common import benchmark_root, file_names, read_lines, split_80_20
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

_HOW = "unpack SUN397.tar.gz again"
ORDER_WARNING = (
    "the published 80/20 cut of SUN397 follows an order of the file system that was not recorded; here the names are "
    "sorted, so the counts agree but the pictures of train and test differ"
)


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """List the classes' folders, one listing each, and cut; pictures are not touched."""
    root = benchmark_root(spec, base_dir)
    table = root / "ClassName.txt"
    names: dict[str, str] = {}
    for line in read_lines(table, "the list of classes", _HOW):
        folder = line[1:]
        if not line.startswith("/") or folder[1:2] != "/" or len(folder) < 3 or ".." in folder or folder in names:
            raise DataError(f"{table}: {line!r} is not `/letter/class`, or is there twice; {_HOW}")
        names[folder] = folder[2:].replace("_", " ")
    found: list[tuple[tuple[str, ...], str]] = []
    for folder in names:
        pictures = [f for f in file_names(root / folder, "a class folder", _HOW, (".jpg",)) if f.startswith("sun_")]
        if not pictures:
            raise DataError(f"{root / folder}: the class folder holds no sun_*.jpg; {_HOW}")
        parts = PurePosixPath(folder).parts
        found += [((*parts, file), folder) for file in pictures]
    _refuse_unlisted(root, names)
    entries: list[Entry] = []
    for parts, folder in sorted(found):
        path = root.joinpath(*parts)
        entries.append(Entry("/".join(parts), names[folder], str(path), FileBytes(path)))
    raw = RawTask(splits=split_80_20(entries), class_order=list(names.values()), pretty=False)
    raw.warnings.append(ORDER_WARNING)
    return raw


def _refuse_unlisted(root: Path, names: dict[str, str]) -> None:
    """A class folder that ClassName.txt lacks would be lost without a word, and all later classes renumbered."""
    above = {str(parent) for folder in names for parent in PurePosixPath(folder).parents if str(parent) != "."}
    for parent in sorted(above):
        for name in file_names(root / parent, "a folder of classes", _HOW):
            if f"{parent}/{name}" not in names and f"{parent}/{name}" not in above and (root / parent / name).is_dir():
                raise DataError(f"{root / parent / name}: the folder is no class of ClassName.txt; {_HOW}")
