"""Task sources: folders, tables, `datasets`, parquet packs.

A new source is one file with ``read(spec, base_dir, probe) -> RawTask`` and one line in `SOURCES`.

>>> from keeplora.data import load_task
>>> task = load_task({"name": "pets", "source": "folder", "path": "pets"}, Path("."))  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.data.load import assemble
from keeplora.data.pictures import decode_picture, read_picture
from keeplora.data.sets import PictureSet, TaskData
from keeplora.data.spec import parse_spec
from keeplora.data.splits import split_validation
from keeplora.errors import DataError

#: Source name -> (module, spec keys that it alone knows). The module is imported when a task asks for it.
SOURCES: dict[str, tuple[str, frozenset[str]]] = {
    "folder": ("keeplora.data.folder", frozenset()),
    "table": ("keeplora.data.table", frozenset({"image_column", "label_column", "split_column", "delimiter"})),
    "datasets": ("keeplora.data.hub", frozenset({"image_column", "label_column", "config", "revision"})),
    "pack": ("keeplora.data.pack", frozenset({"task"})),
    "fgvc-aircraft": ("keeplora.data.benchmarks.fgvc_aircraft", frozenset()),
    "caltech101": ("keeplora.data.benchmarks.caltech101", frozenset()),
    "cifar100": ("keeplora.data.benchmarks.cifar100", frozenset()),
    "dtd": ("keeplora.data.benchmarks.dtd", frozenset()),
    "eurosat": ("keeplora.data.benchmarks.eurosat", frozenset()),
    "flowers102": ("keeplora.data.benchmarks.flowers102", frozenset()),
    "food101": ("keeplora.data.benchmarks.food101", frozenset()),
    "mnist": ("keeplora.data.benchmarks.mnist", frozenset({"shots"})),
    "oxford-pet": ("keeplora.data.benchmarks.oxford_pet", frozenset()),
    "stanford-cars": ("keeplora.data.benchmarks.stanford_cars", frozenset()),
    "sun397": ("keeplora.data.benchmarks.sun397", frozenset()),
    "coop": ("keeplora.data.benchmarks.coop", frozenset({"split_file", "images", "shots"})),
}


def load_task(spec: Mapping[str, Any], base_dir: str | Path, *, probe: bool = False) -> TaskData:
    """Load one task, or one probe set that is tested but never trained on.

    Every picture file is read once (hash and header check; ``check: full`` decodes it too); pictures are decoded
    again when asked for, and never kept.

    Args:
        spec: ``name``, ``source`` (folder, table, datasets, pack), ``path`` or ``train`` / ``test`` / ``validation``,
            and the options that docs/data.md lists.
        base_dir: where relative paths start.
        probe: only ``test`` is filled; a source without a test split gives all its pictures.

    Returns:
        The task; things that a person should know but that stop nothing are in its ``warnings``.

    Raises:
        ConfigError: a key or value of ``spec``.
        DataError: a file, row or class, named, with the way to mend it.
    """
    parsed = parse_spec(spec, {name: keys for name, (_, keys) in SOURCES.items()})
    reader = importlib.import_module(SOURCES[parsed.source][0])
    try:
        return assemble(reader.read(parsed, Path(base_dir), probe), parsed, probe=probe)
    except DataError as error:
        raise type(error)(f"task {parsed.name!r}: {error}") from error


__all__ = ["SOURCES", "PictureSet", "TaskData", "decode_picture", "load_task", "read_picture", "split_validation"]
