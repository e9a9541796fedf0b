"""FGVC-Aircraft (2013b), variants: ``data/{images, variants.txt, images_variant_train.txt, images_variant_test.txt}``.

Official training and test lists (3,334 and 3,333 pictures; ``val`` is not used, as in MTIL). The 100 names and their
order are those of ``variants.txt``, e.g. ``707-320``, without the maker.
"""

from __future__ import annotations

from pathlib import Path

from keeplora.data.benchmarks.common import benchmark_root, inner_folder, need, read_lines
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec, suggest
from keeplora.errors import DataError

HOW = "unpack fgvc-aircraft-2013b.tar.gz, from the FGVC-Aircraft page of the Oxford Visual Geometry Group, again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the official lists; ``path`` is the folder ``fgvc-aircraft-2013b``."""
    data = inner_folder(benchmark_root(spec, base_dir), "data", "the data folder", HOW)
    images = need(data / "images", "the folder of pictures", HOW, folder=True)
    raw = RawTask(splits={}, pretty=False)
    variants = read_lines(data / "variants.txt", "the list of variants", HOW)
    raw.class_order = [name.replace("_", " ") for name in variants]
    known = dict(zip(variants, raw.class_order, strict=True))
    for split in ("train", "test"):
        table = data / f"images_variant_{split}.txt"
        entries: dict[str, Entry] = {}
        for line in read_lines(table, f"the {split} list", HOW):
            name, _, variant = line.partition(" ")
            if variant not in known:
                raise DataError(f"{table}: the line {line!r} names no variant{suggest(variant, known)}; {HOW}")
            path = images / f"{name}.jpg"
            entries[name] = Entry(f"{split}/{name}", known[variant], str(path), FileBytes(path))
        raw.splits[split] = list(entries.values())
    return raw
