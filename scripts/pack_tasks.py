"""The five tasks and two probe sets of the demo pack: which picture of which package is what."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pack_pictures import SIDE, Picture, draw, squared
from pack_signs import sign_group, sign_item
from PIL import Image, ImageChops, ImageDraw, ImageFont

Folders = Callable[[str], Path]
"""From a source's key to the folder with its files."""


@dataclass(frozen=True)
class PackSet:
    """One task (`train` > 0) or probe: how many pictures of a class each side gets at most, and its prompts."""

    name: str
    pictures: Callable[[Folders], list[Picture]]
    templates: tuple[str, ...]
    train: int
    test: int


def digits(folders: Folders) -> list[Picture]:
    """Scanned handwriting, 28 x 28 grey levels in 0..1 one after another; the item is the place in the file."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    found = []
    for digit, name in enumerate(names):
        data = json.loads((folders("mnist") / f"package/src/digits/{digit}.json").read_text())["data"]
        scans = (255 * np.asarray(data).reshape(-1, 28, 28)).round().astype(np.uint8)
        chosen = sorted(range(len(scans)), key=lambda i: draw(f"digit {digit} {i}"))[:80]
        found += [Picture(name, f"{digit}-{i}", "mnist", squared(Image.fromarray(scans[i]))) for i in sorted(chosen)]
    return found


SCRIPTS = (
    *("Arabic", "Armenian", "Bengali", "Cherokee", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Glagolitic"),
    *("Malayalam", "Thai", "Yi"),
)
_LATIN_LOOK = set("АВЕКМНОРСТХасеорхуіјѕԁԛԝһѵІЈЅҮ")
"""Cyrillic letters drawn like Latin ones tell nothing about the script."""


def scripts(folders: Folders) -> list[Picture]:
    """Two rows of three letters in the script's sans or serif face; no letter is in train and test pictures both."""
    fonts = folders("noto") / "usr/share/fonts/truetype/noto"
    found = []
    for script, chars in _letters().items():
        stem = "" if script == "Cyrillic" else script
        faces = [fonts / f"Noto{style}{stem}-Regular.ttf" for style in ("Sans", "Serif")]
        faces = [face for face in faces if face.is_file()]
        supported = set.intersection(*(set(_characters(face)) for face in faces))
        usable = sorted((c for c in chars if ord(c) in supported), key=lambda c: draw(f"letter {c}"))[:60]
        third = len(usable) // 3
        for side, pool, count in (("test", usable[:third], 20), ("train", usable[third:], 40)):
            for number in range(count):
                word = "".join(pool[draw(f"{script} {side} {number} {place}") % len(pool)] for place in range(6))
                face = faces[draw(f"face {word}") % len(faces)]
                picture = _glyph(f"{word[:3]}\n{word[3:]}", face, 40 + draw(f"size {word}") % 25)
                found.append(Picture(script, word, "noto", picture, side))
    return found


def _letters() -> dict[str, list[str]]:
    """The letters of each script by their Unicode names."""
    prefix = {"Thai": "THAI CHARACTER", "Ethiopic": "ETHIOPIC SYLLABLE", "Yi": "YI SYLLABLE"}
    letters: dict[str, list[str]] = {script: [] for script in SCRIPTS}
    for code in range(0x370, 0x1E900):
        char = chr(code)
        name = unicodedata.name(char, "")
        for script in SCRIPTS:
            wanted = prefix.get(script, f"{script.upper()} {'(CAPITAL |SMALL )?' if script != 'Arabic' else ''}LETTER")
            if unicodedata.category(char)[0] == "L" and re.match(wanted, name) and char not in _LATIN_LOOK:
                letters[script].append(char)
    return letters


def _characters(face: Path) -> list[int]:
    from fontTools.ttLib import TTFont

    return list(TTFont(face, lazy=True).getBestCmap())


def _glyph(text: str, face: Path, size: int) -> Image.Image:
    """`text` in black, unshaped, centred by its ink, on white; made smaller where it would not fit."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(canvas)
    while True:
        font = ImageFont.truetype(str(face), size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font, spacing=0, align="center")
        if max(right - left, bottom - top) <= SIDE - 8:
            break
        size -= 2
    place = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    pen.text(place, text, font=font, fill="black", spacing=0, align="center")
    return canvas


def signs(folders: Folders) -> list[Picture]:
    """Road signs of many countries on a plain light ground; the item is the sign's meaning without its variants."""
    found = []
    for path in sorted((folders("signs") / "package/package_signs").glob("*.svg")):
        group = sign_group(re.sub(r"--g\d+$", "", path.stem))
        if group and (image := _render(path.read_text(encoding="utf-8"), (205, 213, 219), 6)):
            found.append(Picture(group, sign_item(path.stem), "signs", image))
    return found


def _render(svg: str, background: str | tuple[int, int, int], margin: int) -> Image.Image | None:
    """An SVG without text at `SIDE` pixels; None where it cannot be drawn or is empty."""
    import resvg_py

    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, skip_system_fonts=True))
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").getbbox()
    return squared(image.crop(box), background, margin) if box else None


GARDINER = {
    "A": "a person",
    "B": "a person",
    "C": "a god or goddess",
    "E": "a mammal",
    "F": "a part of a mammal",
    "G": "a bird",
    "I": "a reptile, fish or insect",
    "K": "a reptile, fish or insect",
    "L": "a reptile, fish or insect",
    "NL": "the standard of a province",
    "NU": "the standard of a province",
    "O": "a building",
    "S": "clothing or regalia",
}


def hieroglyphs(folders: Folders) -> list[Picture]:
    """Egyptian hieroglyphs by Gardiner's categories; variants (A17, A17A) are one item."""
    face = folders("noto") / "usr/share/fonts/truetype/noto/NotoSansEgyptianHieroglyphs-Regular.ttf"
    supported = set(_characters(face))
    found = []
    for code in range(0x13000, 0x1342F):
        match = re.match(r"EGYPTIAN HIEROGLYPH ([A-Z]+)(\d+)", unicodedata.name(chr(code), ""))
        if match and match[1] in GARDINER and code in supported:
            picture = _glyph(chr(code), face, 84)
            found.append(Picture(GARDINER[match[1]], f"{match[1]}{int(match[2])}".lower(), "noto", picture))
    return found


TABLER = {
    "Buildings": "a building",
    "Currencies": "a currency",
    "Document": "a document",
    "Food": "food or drink",
    "Letters": "a letter",
    "Mood": "a mood",
    "Numbers": "a number",
    "Vehicles": "a vehicle",
}
_MODIFIER = re.compile(
    r"-(off|filled|x|plus|minus|check|cancel|bolt|code|cog|dollar|down|up|left|right|exclamation|heart|pause|pin|question"
    r"|search|share|star|small|\d+)(?=-|$)"
)


def icons(folders: Folders) -> list[Picture]:
    """Line icons by subject; an icon's variants (crossed out, with a plus sign, numbered) are one item."""
    package = folders("tabler") / "package"
    found = []
    for name, entry in sorted(json.loads((package / "icons.json").read_text()).items()):
        group = TABLER.get(entry["category"])
        path = package / f"icons/outline/{name}.svg"
        if not group or not path.is_file():
            continue
        letter = re.search(r"(letter|number)-([a-z\d]+)", name)
        item = f"{letter[1]} {letter[2]}" if letter else _MODIFIER.sub("", name)
        image = _render(path.read_text(encoding="utf-8").replace("currentColor", "#111111"), "white", 10)
        if image:
            found.append(Picture(group, item, "tabler", image))
    return found


EMOJI = {
    "animal-bird": "a bird",
    "animal-bug": "an insect",
    "animal-mammal": "a mammal",
    "clothing": "clothing",
    "country-flag": "a flag",
    "drink": "a drink",
    "face-smiling": "a smiling face",
    "food-fruit": "a fruit",
    "food-sweet": "a dessert",
    "food-vegetable": "a vegetable",
    "heart": "a heart",
    "musical-instrument": "a musical instrument",
    "place-building": "a building",
    "plant-flower": "a flower",
    "time": "a clock",
    "tool": "a tool",
    "transport-ground": "a land vehicle",
}


def emoji(folders: Folders) -> list[Picture]:
    """Emoji by subcategory, each in one vendor's drawing that its name decides."""
    entries = json.loads((folders("emoji-google") / "package/emoji.json").read_text())
    found = []
    for entry in entries:
        group = EMOJI.get(entry["subcategory"])
        if group and entry["has_img_google"] and entry["has_img_twitter"]:
            vendor = ("google", "twitter")[draw(entry["short_name"]) % 2]
            path = folders(f"emoji-{vendor}") / f"package/img/{vendor}/64/{entry['image']}"
            if path.is_file():
                found.append(
                    Picture(group, entry["short_name"], f"emoji-{vendor}", squared(Image.open(path), margin=4))
                )
    return found


CLIPART = {
    "animals/birds": "a bird",
    "animals/mammals": "a mammal",
    "buildings": "a building",
    "food/beverages": "a drink",
    "food/fruit": "a fruit",
    "geography": "a map",
    "people/clothing": "clothing",
    "people/smilies": "a smiley",
    "plants/flowers": "a flower",
    "recreation/music": "a musical instrument",
    "recreation/games": "a game",
    "signs_and_symbols/clocks": "a clock",
    "signs_and_symbols/flags": "a flag",
    "signs_and_symbols/weather": "the weather",
    "tools": "a tool",
    "transportation/boating": "a boat",
    "transportation/vehicles": "a vehicle",
}


_BROKEN = {"tux_didier_fabert_01"}
"""Drawn as a notice that a linked picture was not found."""


def reserved(stem: str) -> bool:
    """Whether the alignment head's training leaves an openclipart item of this stem out."""
    return draw_head(stem.strip().lower()) % 10 < 4


def draw_head(stem: str) -> int:
    """The number by which the head's training set is chosen (its script uses the same)."""
    return int(hashlib.sha256(stem.encode()).hexdigest()[:8], 16)


def clipart(folders: Folders) -> list[Picture]:
    """Clip art that the alignment head never saw: under none of its names, symbolic links followed."""
    root = folders("openclipart") / "usr/share/openclipart/png"
    names: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        if path.exists():
            names.setdefault(path.resolve(), []).append(path)
    found = []
    for real, paths in names.items():
        if real.stem in _BROKEN or not all(reserved(path.stem) for path in [real, *paths]):
            continue
        groups = {CLIPART[g] for p in paths if (g := _clipart_group(p.relative_to(root)))}
        with real.open("rb") as handle:
            width, height = struct.unpack(">II", handle.read(24)[16:])  # before decoding: one has 623 million pixels
        if len(groups) != 1 or width * height > 16_000_000 or max(width, height) > 8 * min(width, height):
            continue
        with Image.open(real) as image:
            stem = real.stem.strip().lower()
            if ink := _ink(image):
                found.append(Picture(groups.pop(), stem, "openclipart", squared(ink, margin=4)))
    return found


def _ink(image: Image.Image) -> Image.Image | None:
    """The part of a picture that is not white once laid on white; None where nothing is left."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    box = ImageChops.difference(flat, white.convert("RGB")).convert("L").point(lambda v: 255 * (v > 12)).getbbox()
    return flat.crop(box) if box else None


def _clipart_group(path: Path) -> str:
    """The longest key of `CLIPART` that begins the path; "" for none. Plain "tools" is the folder itself, say."""
    folders = path.parent.parts
    for depth in range(len(folders), 0, -1):
        key = "/".join(folders[:depth])
        if key in CLIPART and (depth == len(folders) or "/" in key):
            return key
    return ""


TASKS = (
    PackSet("digits", digits, ("a handwritten digit {}.",), 36, 18),
    PackSet("scripts", scripts, ("letters of the {} script.",), 32, 16),
    PackSet("hieroglyphs", hieroglyphs, ("an Egyptian hieroglyph of {}.",), 56, 28),
    PackSet("road-signs", signs, ("a road sign about {}.",), 40, 20),
    PackSet("line-icons", icons, ("a line icon of {}.",), 44, 22),
)
PROBES = (
    PackSet("emoji", emoji, ("an emoji of {}.",), 0, 14),
    PackSet("clip-art", clipart, ("clip art of {}.",), 0, 15),
)
