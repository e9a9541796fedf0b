"""The captioned pictures that the alignment head is trained on, and the pictures that it is judged on.

Training: Debian's openclipart (public domain). Judging: reserved openclipart items and Google's emoji; neither they
nor near-duplicates of them are trained on.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import struct
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

OPENCLIPART = ("openclipart-png", "openclipart-svg")
OPENCLIPART_VERSION = "1:0.18+dfsg"
EMOJI = "emoji-datasource-google@16.0.0"
MAX_PIXELS = 4_000_000  # one openclipart PNG has 623 million: the header decides before anything is decoded
MAX_SAME_TITLE, MAX_SAME_CAPTION = 8, 20
HASH_SIDE, HASH_OVERLAP = 16, 0.6  # at 0.6 pairs are the same drawing or layout in other colours; at 0.5 many are not
_NOISE = {
    "unsorted",
    "clip art",
    "clipart",
    "image",
    "svg",
    "png",
    "media",
    "public domain",
    "contour",
    "outline",
    "hash",
    "",
}


@dataclass
class Item:
    """One picture: `key` is unique, `captions` go from the most complete to the shortest."""

    key: str
    source: str
    names: tuple[str, ...]
    image: Path
    title: str
    keywords: list[str] = field(default_factory=list)

    @property
    def full_caption(self) -> str:
        return ", ".join([self.title, *self.keywords[:5]])

    @property
    def captions(self) -> list[str]:
        found = [self.full_caption, self.title, f"a picture of {self.title}", f"clip art of {self.title}"]
        if self.keywords:
            found += [", ".join(self.keywords[:5]), *self.keywords[:4], f"a picture of {self.keywords[0]}"]
        return list(dict.fromkeys(found))


def stem_key(name: str) -> str:
    """The name by which an openclipart item is reserved: the file's stem in lower case, without folders."""
    return Path(name).stem.strip().lower()


def draw(stem: str) -> int:
    """A number that the stem alone decides."""
    return int(hashlib.sha256(stem.encode()).hexdigest()[:8], 16)


def is_reserved(stem: str) -> bool:
    """Two items of five are never trained on: they are kept for test sets."""
    return draw(stem) % 10 < 4


def _run(command: Sequence[str], cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def download(work: Path) -> None:
    """Put the sources under `work` with apt-get and npm; what is there is kept."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "deb").is_dir():
        for package in OPENCLIPART:
            _run(["apt-get", "download", package], work)
        for archive in work.glob("openclipart-*.deb"):
            if OPENCLIPART_VERSION not in archive.name.replace("%3a", ":"):
                raise SystemExit(f"{archive.name}: the head was made from version {OPENCLIPART_VERSION}-*")
            _run(["dpkg-deb", "-x", str(archive), "deb.part"], work)
        (work / "deb.part").rename(work / "deb")
    if not (work / EMOJI).is_dir():
        archive = work / _run(["npm", "pack", "--silent", EMOJI], work).split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(work / EMOJI, filter="data")


def _words(name: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[_\-.]+", " ", name)).strip()


def _caption(svg: Path) -> tuple[str, list[str]]:
    """Title and keywords from an openclipart SVG's metadata."""
    text = svg.read_text(encoding="utf-8", errors="replace")[:200_000]
    block = re.search(r"<metadata.*?</metadata>", text, re.S)
    if not block:
        return "", []
    # A work's own title comes before those of its creator and publisher.
    title = re.search(r"<(?:cc:)?Work.*?<dc:title[^>]*>(.*?)</dc:title>", block[0], re.S)
    words = re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", block[0], re.S)
    clean = [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", w))).strip().lower() for w in words]
    name = re.sub(r"\s+", " ", html.unescape(title[1])).strip().lower() if title else ""
    return _words(name), [w for w in dict.fromkeys(_words(c) for c in clean) if w not in _NOISE and len(w) < 40]


def clipart(work: Path) -> list[Item]:
    """Every openclipart picture of at most `MAX_PIXELS`, once, under all names it has.

    A title that many items share names a collection, not the picture: the file's own name stands in for it. Of items
    whose captions are equal, `MAX_SAME_CAPTION` are kept.
    """
    root = work / "deb/usr/share/openclipart/png"
    names: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        if path.exists():
            names.setdefault(path.resolve(), []).append(path)
    items = []
    for real, paths in names.items():
        width, height = struct.unpack(">II", real.read_bytes()[16:24])  # a PNG says its size first
        if width * height > MAX_PIXELS:
            continue
        relative = real.relative_to(root.resolve()).with_suffix("")
        svg = root.parent / "svg" / relative.with_suffix(".svg")
        title, keywords = _caption(svg) if svg.is_file() else ("", [])
        folders = [w for part in reversed(relative.parts[:-1]) if (w := _words(part.lower())) not in _NOISE]
        stems = tuple(sorted({stem_key(p.name) for p in paths} | {stem_key(real.name)}))
        keywords = list(dict.fromkeys([*keywords, *folders[:1]]))
        items.append(
            Item(f"openclipart/{relative}", "openclipart", stems, real, re.sub(r"\s*\d+$", "", title), keywords)
        )
    common = Counter(i.title for i in items)
    for item in items:
        if common[item.title] > MAX_SAME_TITLE or len(item.title) < 3:
            item.title = re.sub(r"\s*\b\w?\d\w*", "", _words(stem_key(item.key))) or item.keywords[0]
        item.keywords = [w for w in item.keywords if w != item.title]
    seen: Counter[str] = Counter()
    kept = []
    for item in sorted(items, key=lambda i: draw(i.key)):  # which of equals are kept must not depend on the alphabet
        seen[item.full_caption] += 1
        if seen[item.full_caption] <= MAX_SAME_CAPTION:
            kept.append(item)
    return sorted(kept, key=lambda i: i.key)


def emoji(work: Path, categories: int = 20) -> tuple[list[Item], list[str]]:
    """Google's emoji (without skin-tone variants) of the most populous subcategories; title = subcategory."""
    folder = work / EMOJI / "package"
    entries = json.loads((folder / "emoji.json").read_text())
    entries = [e for e in entries if e["has_img_google"] and e["category"] != "Component"]
    classes = sorted(c for c, _ in Counter(e["subcategory"] for e in entries).most_common(categories))
    items = [
        Item(
            f"emoji/{e['short_name']}",
            "emoji",
            (e["short_name"],),
            folder / "img/google/64" / e["image"],
            e["subcategory"],
        )
        for e in entries
        if e["subcategory"] in classes
    ]
    return items, classes


def picture(item: Item) -> Image.Image:
    """Decode to RGB; transparency becomes white."""
    with Image.open(item.image) as opened:
        rgba = opened.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def squared(image: Image.Image) -> Image.Image:
    """The whole picture on a white square, so that the centre crop cuts nothing off."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def difference_hash(image: Image.Image) -> np.ndarray:
    """Where grey rises and where it falls, left to right and top to bottom: float32 of 0 and 1, [4 × 256].

    Flat areas give 0 in both, so that two different small drawings on white do not count as alike.
    """
    side = HASH_SIDE + 1
    grey = np.asarray(squared(image).convert("L").resize((side, side), Image.Resampling.BOX), np.int16)
    steps = (np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1])
    return np.concatenate([(sign * step > 4).ravel() for step in steps for sign in (1, -1)]).astype(np.float32)


def near_duplicates(hashes: np.ndarray, of: np.ndarray, overlap: float = HASH_OVERLAP) -> np.ndarray:
    """Which rows of `hashes` [N, K] share at least `overlap` of the set bits (intersection over union) with any row
    of `of` [M, K]; bool [N]. Pictures without any set bit are alike."""
    both = hashes @ of.T
    either = hashes.sum(axis=1)[:, None] + of.sum(axis=1)[None] - both
    return ((either == 0) | (both >= overlap * either)).any(axis=1)


def list_hash(keys: Iterable[str]) -> str:
    """SHA-256 of the sorted item names, one a line."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
