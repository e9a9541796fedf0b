"""Build the stand-in's packs: six visual-question-answering and caption tasks, and a general set that is only tested.

    pip install "keeplora" resvg-py==0.5.0 fonttools
    python scripts/build_vqa_pack.py --work build/stand-in

Needs npm, apt-get and dpkg-deb on a Debian 12 system. The packages are pinned by SHA-256, every choice is made by a hash
of names or a seeded generator, so a second run with the same pillow and resvg-py writes the same pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from keeplora.files import atomic_write_json, atomic_write_text

sys.path.insert(0, str(Path(__file__).parent))
from pack_attribution import MIT
from pack_rows import source_records, write_pack
from pack_sources import SOURCES, fetch
from stand_in_mixture import things
from vqa_tasks import TASKS, TEXTILE, Row

HERE = Path(__file__).resolve().parent.parent / "src/keeplora/suites/vqa"
USED = ("mnist", "noto", "signs", "tabler", "emoji-google", "emoji-twitter", "openclipart")
ALL = {key: SOURCES[key] for key in USED} | {"textile": TEXTILE}
LOSSLESS_LIMIT, QUALITY = 2500, 80


def encode(image: Image.Image) -> bytes:
    """WebP bytes: lossless where small, else lossy."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, quality=60, method=4)
    image.save(lossy, "WEBP", quality=QUALITY, method=4)
    return exact.getvalue() if exact.tell() <= max(LOSSLESS_LIMIT, lossy.tell()) else lossy.getvalue()


def as_dict(row: Row) -> dict[str, object]:
    """The parquet row; the first question carries the picture's place, as in LLaVA's files."""
    conversation = []
    for number, (question, answer) in enumerate(row.turns):
        conversation += [
            {"from": "human", "value": f"<image>\n{question}" if number == 0 else question},
            {"from": "gpt", "value": answer},
        ]
    origins = row.origin.split("; ")
    packages = {key: ALL[key].package if key in ALL else "drawn by the script" for key in origins}
    licences = {ALL[key].licence if key in ALL else "Apache-2.0" for key in origins}
    return {
        "split": row.split,
        "id": row.id,
        "image": encode(row.image.convert("RGB")),
        "conversations": json.dumps(conversation),
        "kind": row.kind,
        "origin": "; ".join(packages.values()),
        "licence": "; ".join(sorted(licences)),
        "items": "; ".join(row.items),
    }


def attribution() -> str:
    """ATTRIBUTION.md from the sources' records."""
    parts = [
        "# Where the pictures of the question and caption packs come from\n",
        "The pictures in this folder's parquet files were made by `scripts/build_vqa_pack.py` from the packages below; the",
        "columns `origin` and `licence` name the package and the licence of every single picture. keeplora itself is under",
        "Apache-2.0, and so are the scenes of plain shapes that the script draws; the other pictures stay under their own",
        "licences. Questions and answers were made from the packages' own names and categories.\n",
        "general.parquet uses all of the packages but conformal-clip-data.\n",
    ]
    used = {
        "mnist": "numbers, general",
        "signs": "signs, general",
        "emoji-google": "counting, relations, general",
        "emoji-twitter": "counting, relations, general",
        "openclipart": "captions, general",
        "textile": "textures",
    }
    for key, source in ALL.items():
        parts += [
            f"## {source.package} {source.version} ({source.registry})\n",
            f"- used in: {used.get(key, 'general')}",
            f"- licence: {source.licence}",
            f"- copyright: {source.holder}",
            "- changed: cut out, composed, brought to 112 pixels where they were not, stored as WebP\n"
            if key != "textile"
            else f"- changed: {source.changes}\n",
        ]
    parts += [
        "The textiles are simulated, not photographed.\n",
        "Twemoji graphics are licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); Noto Emoji under",
        "Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0). Logos and signs remain their owners' where they are marks.\n",
        "## The MIT licence, for the packages under it\n",
        MIT,
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/stand-in"), help="where rendered pictures are kept")
    parser.add_argument("--packages", type=Path, help="where the packages are downloaded to (default: WORK/packages)")
    parser.add_argument("--out", type=Path, default=HERE, help="the packs' folder")
    parser.add_argument("--only", nargs="*", default=list(TASKS), help="write only these")
    args = parser.parse_args()
    packages = (args.packages or args.work / "packages").resolve()

    def folders(key: str) -> Path:
        return fetch(ALL[key], packages)

    drawn = things(folders, args.work / "things.pkl")
    record: dict[str, object] = {}
    for name in args.only:
        rows = [as_dict(row) for row in TASKS[name](folders, drawn)]
        record[name] = write_pack(args.out / f"{name}.parquet", rows, "image")
        print(name, record[name], flush=True)
    if set(args.only) == set(TASKS):
        sources = source_records(ALL.values())
        provenance = {"command": "python scripts/build_vqa_pack.py", "side": 112, "sets": record, "sources": sources}
        atomic_write_json(args.out / "provenance.json", provenance)
        atomic_write_text(args.out / "ATTRIBUTION.md", attribution())


if __name__ == "__main__":
    main()
