"""Parquet packs: encoded pictures with task, split, label, class name, item, origin and licence in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.data.sets import Entry, HeldBytes
from keeplora.data.spec import RawTask, TaskSpec, listing, locate, suggest
from keeplora.errors import ConfigError, DataError

COLUMNS = ("task", "split", "label", "class_name", "item", "origin", "licence", "image")


_KINDS = ("text", "text", "number", "text", "text", "text", "text", "bytes")


def check_columns(schema: Any, file: Path, kinds: Mapping[str, str]) -> None:
    """Refuse a parquet file by the types of its columns.

    Kinds are "text", "number" (whole), "name" (text or number), "bytes" and "files" (a list of bytes).

    A number would be taken for a count of zero bytes, a list cannot be looked up.
    """
    import pyarrow as pa

    of = {
        "text": (pa.types.is_string, pa.types.is_large_string), "number": (pa.types.is_integer,),
        "bytes": (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
    }  # fmt: skip
    of["name"] = (*of["text"], *of["number"])
    for name, kind in kinds.items():
        if name not in schema.names:
            continue
        found = schema.field(name).type
        inner = (
            found.value_type
            if pa.types.is_dictionary(found) or (kind == "files" and pa.types.is_list(found))
            else found
        )
        tests = of["bytes" if kind == "files" else kind]
        if not pa.types.is_null(inner) and not any(test(inner) for test in tests):
            raise DataError(f"{file}: the column {name!r} holds {str(found)[:60]}, not {kind}; rebuild the pack")


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read one task of a pack; ``task`` names it where the pack's name differs from the task's own."""
    if spec.path is None or spec.split_names:
        raise ConfigError("source 'pack' needs `path`, a parquet file or a folder of them, and knows its own splits")
    root = locate(spec.path, base_dir)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{root}: holds no .parquet file; name the folder of the pack")
    wanted = spec.extra.get("task", spec.name)
    tasks: set[str] = set()
    raw = RawTask(splits={}, pretty=False)
    names: dict[int, str] = {}
    licences: set[str] = set()
    seen: Counter[str] = Counter()
    for file in files:
        rows, found = _rows(file, wanted)
        tasks |= found
        for number, row in rows:
            entry = _entry(row, f"{file}, row {number}", seen, names)
            raw.splits.setdefault(row["split"], []).append(entry)
            licences.add(row["licence"] or "unknown")
    if not raw.splits:
        raise DataError(f"{root}: no task {wanted!r} in the pack{suggest(wanted, tasks)}")
    if not probe and "train" not in raw.splits:
        raise DataError(f"{root}: the task {wanted!r} has no training pictures; use it as a probe")
    raw.class_order = [names[label] for label in sorted(names)]
    if len(set(raw.class_order)) < len(names):
        raise DataError(f"{root}: two labels of {wanted!r} have one class name among {listing(raw.class_order, 12)}")
    raw.licence = ", ".join(sorted(licences))
    return raw


def _rows(file: Path, task: str) -> tuple[list[tuple[int, dict[str, Any]]], set[str]]:
    """The rows of ``task`` with their numbers, and every task of the file; other tasks' pictures are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as handle:
            missing = [name for name in COLUMNS if name not in handle.schema_arrow.names]
            if missing:
                raise DataError(f"{file}: not a pack, the column(s) {listing(missing)} are missing; rebuild it")
            check_columns(handle.schema_arrow, file, dict(zip(COLUMNS, _KINDS, strict=True)))
            column = handle.read(columns=["task"])["task"].to_pylist()
        numbers = [number for number, name in enumerate(column) if name == task]
        rows = pq.read_table(file, columns=list(COLUMNS), filters=[("task", "==", task)]).to_pylist() if numbers else []
    except (pa.ArrowException, OSError) as error:
        brief = str(error).splitlines()[0][:120]
        raise DataError(f"{file}: cannot be read as parquet ({brief}); fetch or build it again") from error
    return list(zip(numbers, rows, strict=True)), set(column)


def _entry(row: dict[str, Any], where: str, seen: Counter[str], names: dict[int, str]) -> Entry:
    split, label, name = row["split"], row["label"], row["class_name"]
    if split not in ("train", "test") or label is None or not name:
        raise DataError(f"{where}: split {split!r}, label {label!r}, class {name!r}; rebuild the pack")
    if names.setdefault(label, name) != name:
        raise DataError(f"{where}: label {label} is {name!r} here and {names[label]!r} elsewhere; rebuild the pack")
    # an item may be drawn in several styles: number its pictures
    key = f"{split}/{name}/{row['origin']}/{row['item']}"
    seen[key] += 1
    key = f"{key}#{seen[key]}" if seen[key] > 1 else key
    return Entry(key, name, f"{where} ({key})", HeldBytes(bytes(row["image"] or b"")))
