"""The captioned pictures that the alignment head is trained on, and the pictures that it is judged on.

Training: Debian's openclipart (public domain) and coloured or filled icon sets from npm (MIT, Apache-2.0, CC0).
Judging: reserved openclipart items and Google's emoji; neither they nor near-duplicates of them are trained on.
"""

from __future__ import annotations

import hashlib
import html
import io
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
ICON_SETS = {
    "flat-color-icons": "1.2.3",
    "fluent-color": "1.2.21",
    "healthicons": "1.2.13",
    "icon-park": "1.2.4",
    "maki": "1.2.5",
    "marketeq": "1.2.2",
    "medical-icon": "1.2.0",
    "meteocons": "1.2.4",
    "temaki": "1.2.6",
}
EMOJI = "emoji-datasource-google@16.0.0"
MAX_PIXELS = 4_000_000  # one openclipart PNG has 623 million: the header decides before anything is decoded
MAX_SAME_TITLE, MAX_SAME_CAPTION = 8, 20
HASH_SIDE, HASH_BITS = 16, 16  # near-duplicate: at most 16 of 256 difference-hash bits apart
_SIZE = re.compile(r"-(?:\d\d|24px|15|11)$")
_STYLE = re.compile(r"-(?:outline|fill|duo|flat|svg|filled|solid)$")
_NOISE = {"unsorted", "clip art", "clipart", "image", "svg", "png", "media", "public domain", "contour", "outline", "hash", ""}


@dataclass
class Item:
    """One picture: `key` is unique, `captions` go from the most complete to the shortest."""

    key: str
    source: str
    names: tuple[str, ...]
    image: Path | bytes
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
    for package in [*(f"@iconify-json/{name}@{version}" for name, version in ICON_SETS.items()), EMOJI]:
        folder = work / package.replace("/", "-").lstrip("@")
        if not folder.is_dir():
            archive = work / _run(["npm", "pack", "--silent", package], work).split()[-1]
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")


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
        items.append(Item(f"openclipart/{relative}", "openclipart", stems, real, re.sub(r"\s*\d+$", "", title), keywords))
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


def icons(work: Path) -> list[Item]:
    """One picture per icon name of the icon sets, in colour where the set has it, on white."""
    import resvg_py

    items = []
    for name, version in ICON_SETS.items():
        folder = work / f"iconify-json-{name}@{version}" / "package"
        data = json.loads((folder / "icons.json").read_text())
        chosen: dict[str, str] = {}
        for icon in data["icons"]:  # of sizes and styles, the plain name or else the last (largest, filled)
            base = _STYLE.sub("", _SIZE.sub("", icon))
            if base not in chosen or icon == base or chosen[base] != base:
                chosen[base] = icon
        for base, icon in sorted(chosen.items()):
            title = re.sub(r"\s*\d+$", "", _words(base))
            entry = data["icons"][icon]
            if len(title) < 3 or entry.get("hidden"):
                continue
            width, height = (entry.get(k, data.get(k, 16)) for k in ("width", "height"))
            left, top = (entry.get(k, data.get(k, 0)) for k in ("left", "top"))
            body = entry["body"].replace("currentColor", "#111111")
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{body}</svg>'
            )
            try:
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=160, height=160, background="white"))
            except ValueError:
                continue
            items.append(Item(f"{name}/{base}", name, (base,), png, title))
    return items


def emoji(work: Path, categories: int = 20) -> tuple[list[Item], list[str]]:
    """Google's emoji (without skin-tone variants) of the most populous subcategories; title = subcategory."""
    folder = work / EMOJI / "package"
    entries = json.loads((folder / "emoji.json").read_text())
    entries = [e for e in entries if e["has_img_google"] and e["category"] != "Component"]
    classes = sorted(c for c, _ in Counter(e["subcategory"] for e in entries).most_common(categories))
    items = [
        Item(f"emoji/{e['short_name']}", "emoji", (e["short_name"],), folder / "img/google/64" / e["image"], e["subcategory"])
        for e in entries
        if e["subcategory"] in classes
    ]
    return items, classes


def picture(item: Item) -> Image.Image:
    """Decode to RGB; transparency becomes white."""
    source = io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image
    with Image.open(source) as opened:
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
    """256 signs of horizontal grey differences, as ±1 float32 [256]."""
    grey = np.asarray(squared(image).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), np.int16)
    return np.where(grey[:, 1:] > grey[:, :-1], 1.0, -1.0).astype(np.float32).ravel()


def near_duplicates(hashes: np.ndarray, of: np.ndarray, bits: int = HASH_BITS) -> np.ndarray:
    """Which rows of `hashes` [N, 256] are within `bits` of any row of `of` [M, 256]; bool [N]."""
    return (hashes @ of.T >= hashes.shape[1] - 2 * bits).any(axis=1)


def list_hash(keys: Iterable[str]) -> str:
    """SHA-256 of the sorted item names, one a line."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
