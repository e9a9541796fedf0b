"""Packs of conversations: one parquet file of rows, and what provenance.json says of it and of where the rows come from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keeplora.files import atomic_write_bytes, sha256_file


def write_pack(file: Path, rows: Sequence[dict[str, Any]], held: str) -> dict[str, object]:
    """Write the rows; returns their record.

    Args:
        held: the column of encoded bytes, "image" or "video"; it is stored as it is, the others are compressed.
    """
    names = ("split", "id", held, "conversations", "kind", "origin", "licence", "items")
    schema = pa.schema([(name, pa.binary() if name == held else pa.string()) for name in names])
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, sink, compression={c: "none" if c == held else "zstd" for c in schema.names})
    file = atomic_write_bytes(file, sink.getvalue().to_pybytes())
    what = {"image": "pictures", "video": "clips"}[held]
    return {
        "train": sum(row["split"] == "train" for row in rows),
        "test": sum(row["split"] == "test" for row in rows),
        "kinds": dict(sorted(Counter(str(row["kind"]) for row in rows if row["split"] == "test").items())),
        "bytes": file.stat().st_size,
        "sha256": sha256_file(file),
        f"{what}_sha256": hashlib.sha256(b"".join(bytes(row[held]) for row in rows)).hexdigest(),
    }


def source_records(sources: Iterable[Any]) -> list[dict[str, str]]:
    """The packages that the rows come from."""
    keys = ("registry", "package", "version", "sha256", "licence")
    return [{key: getattr(source, key) for key in keys} for source in sources]
