"""Build the video suite's packs: five tasks on short clips, and a general set that is only tested.

    pip install "keeplora[video]" resvg-py==0.5.0 fonttools
    python scripts/build_video_pack.py --work build/stand-in

Needs npm, apt-get and dpkg-deb on a Debian 12 system. The packages are pinned by SHA-256, every choice is made by a
seeded generator and x264 runs in one thread, so a second run with the same pillow and PyAV draws the same frames; one
clip in twenty is stored in a few other bits (see video_clips.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from keeplora.files import atomic_write_json, atomic_write_text

sys.path.insert(0, str(Path(__file__).parent))
from pack_rows import source_records, write_pack
from pack_sources import SOURCES, fetch
from stand_in_mixture import things
from stand_in_scenes import SIDE
from video_clips import FPS, encode
from video_tasks import TASKS, ClipRow

HERE = Path(__file__).resolve().parent.parent / "src/keeplora/suites/video"
USED = {key: SOURCES[key] for key in ("emoji-google", "emoji-twitter")}


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
        record[name] = write_pack(args.out / f"{name}.parquet", rows, "video")
        print(name, record[name], flush=True)
    provenance = {
        "command": "python scripts/build_video_pack.py",
        "clips": {
            "side": SIDE,
            "fps": FPS,
            "codec": "h264 (libx264), yuv420p, mp4",
            "written_by": f"PyAV {av.__version__}",
        },
        "sets": record,
        "sources": source_records(USED.values()),
    }
    atomic_write_json(args.out / "provenance.json", provenance)
    atomic_write_text(args.out / "ATTRIBUTION.md", attribution())


if __name__ == "__main__":
    main()
