"""Build the demo pack: five tasks and two probe sets of pictures from public packages, split by item.

    pip install "keeplora" resvg-py==0.5.0 fonttools
    python scripts/build_demo_pack.py --work build/pack

Needs npm, apt-get and dpkg-deb on a Debian 12 system. The packages are pinned by SHA-256, every choice is made by a hash
of names, so a second run with the same pillow and resvg-py writes the same pictures. Figures of the untouched model
(zero-shot, linear probe) are added by scripts/pack_measure.py.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from keeplora.files import atomic_write_bytes, atomic_write_json, atomic_write_text, sha256_file

sys.path.insert(0, str(Path(__file__).parent))
from pack_attribution import attribution
from pack_pictures import SIDE, Picture, encode
from pack_sources import SOURCES, fetch
from pack_split import Split, split, unlike
from pack_tasks import PROBES, TASKS, PackSet

HERE = Path(__file__).resolve().parent.parent / "src/keeplora/suites/demo"
SMALLEST_CLASS = {"train": 10, "test": 4}


def rows(pack_set: PackSet, sides: Split) -> list[dict[str, object]]:
    """The rows of one parquet file; classes are numbered in alphabetical order."""
    classes = sorted({picture.class_name for picture in sides["test"]})
    return [
        {
            "task": pack_set.name,
            "split": side,
            "label": classes.index(picture.class_name),
            "class_name": picture.class_name,
            "item": picture.item,
            "origin": SOURCES[picture.origin].package,
            "licence": SOURCES[picture.origin].licence,
            "image": encode(picture.image),
        }
        for side in ("train", "test")
        for picture in sides[side]
    ]


def parquet(table_rows: list[dict[str, object]]) -> bytes:
    """The rows as a parquet file; the pictures are compressed already."""
    schema = pa.schema([(name, pa.int64() if name == "label" else pa.string()) for name in list(table_rows[0])[:-1]])
    schema = schema.append(pa.field("image", pa.binary()))
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(table_rows, schema=schema)
    pq.write_table(table, sink, compression={name: "none" if name == "image" else "zstd" for name in schema.names})
    return sink.getvalue().to_pybytes()


def enough(pack_set: PackSet, sides: Split) -> Split:
    """Leave out classes that are too small to say anything."""
    counts = {side: Counter(picture.class_name for picture in found) for side, found in sides.items()}
    needed = {side: least for side, least in SMALLEST_CLASS.items() if side == "test" or pack_set.train}
    good = {c for c in counts["test"] if all(counts[side][c] >= least for side, least in needed.items())}
    for class_name in sorted(set(counts["test"]) | set(counts["train"])):
        if class_name not in good:
            print(f"{pack_set.name}: class {class_name!r} left out, too small")
    return {side: [p for p in found if p.class_name in good] for side, found in sides.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/pack"), help="where packages are downloaded to and kept"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="the pack's folder")
    args = parser.parse_args()

    def folders(key: str) -> Path:
        return fetch(SOURCES[key], args.work.resolve())

    candidates: dict[str, list[Picture]] = {}
    for pack_set in (*TASKS, *PROBES):
        candidates[pack_set.name] = pack_set.pictures(folders)
        print(f"{pack_set.name}: {len(candidates[pack_set.name])} candidates", flush=True)
    kept = unlike(candidates)
    record: dict[str, object] = {}
    for pack_set in (*TASKS, *PROBES):
        sides = enough(pack_set, split(pack_set, kept[pack_set.name]))
        found = rows(pack_set, sides)
        file = atomic_write_bytes(args.out / f"{pack_set.name}.parquet", parquet(found))
        pictures = hashlib.sha256(b"".join(bytes(row["image"]) for row in found))  # type: ignore[call-overload]
        record[pack_set.name] = {
            "kind": "task" if pack_set.train else "probe",
            "classes": len({row["class_name"] for row in found}),
            "train": len(sides["train"]),
            "test": len(sides["test"]),
            "candidates": len(candidates[pack_set.name]),
            "unlike": len(kept[pack_set.name]),
            "origins": dict(sorted(Counter(str(row["origin"]) for row in found).items())),
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "pictures_sha256": pictures.hexdigest(),
        }
        print(pack_set.name, record[pack_set.name], flush=True)
    sources = [
        {"registry": s.registry, "package": s.package, "version": s.version, "sha256": s.sha256, "licence": s.licence}
        for s in SOURCES.values()
    ]
    provenance = {"command": "python scripts/build_demo_pack.py", "side": SIDE, "sets": record, "sources": sources}
    atomic_write_json(args.out / "provenance.json", provenance)
    atomic_write_text(args.out / "ATTRIBUTION.md", attribution())


if __name__ == "__main__":
    main()
