"""Build the video suite's packs: five tasks on short clips, and a general set that is only tested.

    pip install "keeplora[video]" resvg-py==0.5.0 fonttools
    python scripts/build_video_pack.py --work build/stand-in

Needs npm, apt-get and dpkg-deb on a Debian 12 system. The packages are pinned by SHA-256, every choice is made by a
seeded generator and x264 runs in one thread, so a second run with the same pillow and PyAV draws the same frames; one
clip in twenty is stored in a few other bits (see video_clips.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from keeplora.files import atomic_write_bytes, atomic_write_json, atomic_write_text, sha256_file

sys.path.insert(0, str(Path(__file__).parent))
from pack_sources import SOURCES, fetch
from stand_in_mixture import things
from stand_in_scenes import SIDE
from video_clips import FPS, encode
from video_tasks import TASKS, ClipRow

HERE = Path(__file__).resolve().parent.parent / "src/keeplora/suites/video"
USED = {key: SOURCES[key] for key in ("emoji-google", "emoji-twitter")}
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.string()),
        ("video", pa.binary()),
        ("conversations", pa.string()),
        ("kind", pa.string()),
        ("origin", pa.string()),
        ("licence", pa.string()),
        ("items", pa.string()),
    ]
)


def as_dict(row: ClipRow) -> dict[str, object]:
    """The parquet row; the question carries the video's place, as in LLaVA's files."""
    conversation = [{"from": "human", "value": f"<video>\n{row.question}"}, {"from": "gpt", "value": row.answer}]
    packages = [USED[key].package if key in USED else "drawn by the script" for key in row.origins]
    licences = {USED[key].licence if key in USED else "Apache-2.0" for key in row.origins}
    return {
        "split": row.split,
        "id": row.id,
        "video": encode(row.frames),
        "conversations": json.dumps(conversation),
        "kind": row.kind,
        "origin": "; ".join(packages),
        "licence": "; ".join(sorted(licences)),
        "items": "; ".join(row.items),
    }


def attribution() -> str:
    """ATTRIBUTION.md from the sources' records."""
    parts = [
        "# Where the pictures in the video packs come from\n",
        "The clips in this folder's parquet files were made by `scripts/build_video_pack.py` from the packages below; the",
        "columns `origin` and `licence` name the packages and the licences of every single clip. keeplora itself is under",
        "Apache-2.0, and so are the plain grounds and shapes that the script draws; the emoji stay under their own licences.",
        "Questions and answers were made from the packages' own categories and from what the script makes the pictures do.\n",
    ]
    for source in USED.values():
        parts += [
            f"## {source.package} {source.version} ({source.registry})\n",
            "- used in: all packs",
            f"- licence: {source.licence}",
            f"- copyright: {source.holder}",
            "- changed: composed into clips of 112 pixels, encoded as H.264\n",
        ]
    parts += [
        "Twemoji graphics are licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); Noto Emoji under",
        "Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0).",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    import av

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/stand-in"), help="where rendered pictures are kept")
    parser.add_argument("--packages", type=Path, help="where the packages are downloaded to (default: WORK/packages)")
    parser.add_argument("--out", type=Path, default=HERE, help="the packs' folder")
    args = parser.parse_args()
    packages = (args.packages or args.work / "packages").resolve()
    drawn = things(lambda key: fetch(SOURCES[key], packages), args.work / "things.pkl")
    record: dict[str, object] = {}
    for name, make in TASKS.items():
        rows = [as_dict(row) for row in make(drawn["emoji"])]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, sink, compression={c: "none" if c == "video" else "zstd" for c in SCHEMA.names})
        file = atomic_write_bytes(args.out / f"{name}.parquet", sink.getvalue().to_pybytes())
        record[name] = {
            "train": sum(row["split"] == "train" for row in rows),
            "test": sum(row["split"] == "test" for row in rows),
            "kinds": dict(sorted(Counter(str(row["kind"]) for row in rows if row["split"] == "test").items())),
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "clips_sha256": hashlib.sha256(b"".join(bytes(row["video"]) for row in rows)).hexdigest(),  # type: ignore[call-overload]
        }
        print(name, record[name], flush=True)
    sources = [
        {"registry": s.registry, "package": s.package, "version": s.version, "sha256": s.sha256, "licence": s.licence}
        for s in USED.values()
    ]
    provenance = {
        "command": "python scripts/build_video_pack.py",
        "clips": {
            "side": SIDE,
            "fps": FPS,
            "codec": "h264 (libx264), yuv420p, mp4",
            "written_by": f"PyAV {av.__version__}",
        },
        "sets": record,
        "sources": sources,
    }
    atomic_write_json(args.out / "provenance.json", provenance)
    atomic_write_text(args.out / "ATTRIBUTION.md", attribution())


if __name__ == "__main__":
    main()
