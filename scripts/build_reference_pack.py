"""Build the demo suites' reference set: captioned clip art, which methods with a reference set (zscl) distil on.

    python scripts/build_reference_pack.py --work build/head

Needs npm, apt-get and dpkg-deb on a Debian 12 system. The pictures are openclipart items that no probe may hold (the
probes' items are reserved by name) and that are no near-duplicate of any picture of the tasks and probes; one item per
title. Every choice is made by a hash of names, so a second run with the same pillow writes the same file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from keeplora.files import atomic_write_bytes

sys.path.insert(0, str(Path(__file__).parent))
from build_demo_pack import HERE, parquet
from head_data import clipart, download, is_reserved
from pack_pictures import Picture, decode, draw, encode, near_pairs, squared
from pack_sources import SOURCES
from pack_split import SLACK

COUNT = 320
WORDS, LETTERS = 5, 40
"""Longest title that is taken: longer ones are sentences about the drawing's origin."""


def candidates(work: Path) -> list[Picture]:
    """One picture per title, in an order that names alone decide."""
    download(work)
    found: dict[str, Picture] = {}
    for item in sorted(clipart(work), key=lambda i: draw(i.key)):
        title = item.title.strip().lower()
        plain = title.replace(" ", "").isalpha() and len(title.split()) <= WORDS and 3 <= len(title) <= LETTERS
        if plain and title not in found and not any(is_reserved(name) for name in item.names):
            with Image.open(item.image) as image:
                found[title] = Picture(title, item.key, "openclipart", squared(image, margin=4))
        if len(found) == 2 * COUNT:
            break
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/head"), help="where packages are downloaded to")
    parser.add_argument("--out", type=Path, default=HERE, help="the pack's folder")
    args = parser.parse_args()
    mine = candidates(args.work.resolve())
    # Compared as they are stored: encoding must not bring two pictures back under the limits.
    encoded = {picture.class_name: encode(picture.image) for picture in mine}
    others = [
        decode(row["image"])
        for file in sorted(args.out.glob("*.parquet")) if file.stem != "reference"
        for row in pq.read_table(file, columns=["image"]).to_pylist()
    ]  # fmt: skip
    pictures = others + [decode(encoded[picture.class_name]) for picture in mine]
    alike = {j - len(others) for i, j in near_pairs(pictures, SLACK) if j >= len(others)}
    kept = [picture for n, picture in enumerate(mine) if n not in alike][:COUNT]
    classes = sorted(picture.class_name for picture in kept)
    rows = [
        {
            "task": "reference", "split": "test", "label": classes.index(picture.class_name),
            "class_name": picture.class_name, "item": picture.item, "origin": SOURCES["openclipart"].package,
            "licence": SOURCES["openclipart"].licence, "image": encoded[picture.class_name],
        }
        for picture in kept
    ]  # fmt: skip
    file = atomic_write_bytes(args.out / "reference.parquet", parquet(rows))
    print(f"{file}: {len(rows)} pictures of {len(mine)} candidates, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
