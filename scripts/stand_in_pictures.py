"""Pictures with names for the stand-in and its task packs: which pool an item belongs to, and what is known of it.

An item is one name (an emoji in both vendors' drawings, a clip-art drawing, an icon with its variants, a sign's meaning,
a scanned digit, a letter). A hash of the name puts it into one pool for good: the general mixture's training, its test,
or the tasks' training or test.
"""

from __future__ import annotations

import colorsys
import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pack_pictures import draw, squared
from pack_signs import sign_group, sign_item
from pack_tasks import _MODIFIER, SCRIPTS, _characters, _ink, _letters, _render
from PIL import Image

Folders = Callable[[str], Path]
POOLS = ("train", "test", "task-train", "task-test")
"""The general mixture's two pools, then the tasks' two."""


def pool(item: str) -> str:
    """The pool that an item's name alone decides: 60, 7, 20 and 13 of a hundred."""
    number = draw(f"stand-in {item}") % 100
    return POOLS[(number >= 60) + (number >= 67) + (number >= 87)]


@dataclass
class Thing:
    """One picture (112 px, or cut out with transparency for scenes) of one item."""

    item: str
    source: str
    group: str
    image: Image.Image
    cutout: Image.Image | None = None
    colours: tuple[str, ...] = field(default=())

    @property
    def pool(self) -> str:
        return pool(self.item)


def colour_name(red: float, green: float, blue: float) -> str:
    """An everyday word for an RGB colour of 0..1."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    hue *= 360
    if value < 0.22:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.88 else "black" if value < 0.3 else "grey"
    if hue < 14 or hue >= 340:
        return "pink" if saturation < 0.5 and value > 0.75 else "brown" if value < 0.45 else "red"
    if hue < 42:
        return "brown" if value < 0.72 or saturation < 0.35 else "orange"
    if hue < 68:
        return "brown" if value < 0.5 else "yellow"
    if hue < 168:
        return "green"
    if hue < 256:
        return "blue"
    return "purple" if hue < 300 else "pink"


def colours(image: Image.Image) -> tuple[str, ...]:
    """Names of the colours that cover at least a sixth of what is not the white ground, the most common first."""
    pixels = np.asarray(image.resize((28, 28), Image.Resampling.BOX).convert("RGB"), np.float32).reshape(-1, 3) / 255
    ink = pixels[(1 - pixels).max(axis=1) > 0.06]
    if len(ink) < 20:
        return ()
    counts = Counter(colour_name(*map(float, p)) for p in ink)
    return tuple(name for name, count in counts.most_common(3) if count >= len(ink) / 6)


EMOJI = {
    "animal-bird": "a bird",
    "animal-bug": "an insect",
    "animal-mammal": "a mammal",
    "animal-marine": "a sea animal",
    "arrow": "an arrow",
    "body-parts": "a part of the body",
    "book-paper": "paper",
    "clothing": "clothing",
    "computer": "a computer",
    "country-flag": "a flag",
    "drink": "a drink",
    "face-concerned": "a face",
    "face-neutral-skeptical": "a face",
    "face-smiling": "a face",
    "face-unwell": "a face",
    "food-asian": "a dish",
    "food-prepared": "a dish",
    "food-fruit": "a fruit",
    "food-sweet": "a dessert",
    "food-vegetable": "a vegetable",
    "hand-fingers-open": "a hand",
    "hand-fingers-partial": "a hand",
    "hand-single-finger": "a hand",
    "hands": "a hand",
    "heart": "a heart",
    "musical-instrument": "a musical instrument",
    "person": "a person",
    "person-fantasy": "a person",
    "person-role": "a person",
    "person-sport": "a person",
    "place-building": "a building",
    "place-religious": "a building",
    "plant-flower": "a flower",
    "plant-other": "a plant",
    "sky & weather": "the weather",
    "sport": "sport",
    "time": "a clock",
    "tool": "a tool",
    "transport-air": "an aircraft",
    "transport-ground": "a vehicle",
    "transport-water": "a boat",
}
MOST_FLAGS = 60


def emoji(folders: Folders) -> list[Thing]:
    """Both vendors' drawings; a woman's, a man's and a person's version of one emoji are one item."""
    entries = json.loads((folders("emoji-google") / "package/emoji.json").read_text())
    found = []
    for entry in entries:
        group = EMOJI.get(entry["subcategory"])
        name = entry["short_name"]
        if not group or (group == "a flag" and draw(f"flag {name}") % 258 >= MOST_FLAGS):
            continue
        item = "emoji " + re.sub(r"^(fe)?male-|^(wo)?man-|_(wo)?man$|-with-.*$", "", name)
        for vendor in ("google", "twitter"):
            path = folders(f"emoji-{vendor}") / f"package/img/{vendor}/64/{entry['image']}"
            if entry[f"has_img_{vendor}"] and path.is_file():
                cutout = Image.open(path).convert("RGBA")
                picture = squared(cutout, margin=4)
                found.append(Thing(item, f"emoji-{vendor}", group, picture, cutout, colours(picture)))
    return found


CLIPART = {
    "animals/birds": "a bird",
    "animals/mammals": "a mammal",
    "animals/bugs": "an insect",
    "animals/marine": "a sea animal",
    "buildings": "a building",
    "computer": "a computer",
    "electronics": "electronics",
    "food": "food",
    "food/beverages": "a drink",
    "food/fruit": "a fruit",
    "geography": "a map",
    "office": "an office thing",
    "people": "a person",
    "people/clothing": "clothing",
    "people/smilies": "a face",
    "plants": "a plant",
    "plants/flowers": "a flower",
    "recreation/music": "a musical instrument",
    "recreation/games": "a game",
    "recreation/sports": "sport",
    "shapes": "a pattern",
    "decorations": "a pattern",
    "signs_and_symbols/clocks": "a clock",
    "signs_and_symbols/flags": "a flag",
    "signs_and_symbols/weather": "the weather",
    "tools": "a tool",
    "transportation": "a vehicle",
    "transportation/boating": "a boat",
    "transportation/aircraft": "an aircraft",
    "transportation/vehicles": "a vehicle",
}
MOST_CLIPART, MOST_PIXELS = 260, 1_500_000


def _clipart_group(folders: tuple[str, ...]) -> str:
    keys = ("/".join(folders[:depth]) for depth in range(len(folders), 0, -1))
    return next((CLIPART[key] for key in keys if key in CLIPART), "")


def clipart_files(folders: Folders) -> list[tuple[str, str, Path]]:
    """(item, group, file) of openclipart drawings that stand in folders of one group only."""
    root = folders("openclipart") / "usr/share/openclipart/png"
    places: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        if path.exists():
            places.setdefault(path.resolve(), []).append(path)
    chosen: dict[str, tuple[str, str, Path]] = {}
    counts: Counter[str] = Counter()
    for real in sorted(places, key=lambda p: draw(p.stem)):
        groups = {_clipart_group(p.relative_to(root).parent.parts) for p in places[real]} - {""}
        with real.open("rb") as handle:
            width, height = struct.unpack(">II", handle.read(24)[16:])
        item = "clip art " + re.sub(r"[_\d]+$", "", real.stem.strip().lower())
        if len(groups) != 1 or width * height > MOST_PIXELS or max(width, height) > 4 * min(width, height):
            continue
        group = groups.pop()
        counts[group] += 1
        if counts[group] <= MOST_CLIPART:
            chosen[str(real)] = (item, group, real)
    return sorted(chosen.values(), key=lambda entry: str(entry[2]))


def clipart_thing(entry: tuple[str, str, Path]) -> Thing | None:
    """The drawing, trimmed to its ink, at 112 px; None where nothing is drawn."""
    item, group, path = entry
    with Image.open(path) as image:
        ink = _ink(image)
    if ink is None:
        return None
    picture = squared(ink, margin=4)
    return Thing(item, "openclipart", group, picture, colours=colours(picture))


ICONS = {
    "Animals": "an animal",
    "Arrows": "an arrow",
    "Brand": "a brand",
    "Buildings": "a building",
    "Charts": "a chart",
    "Currencies": "money",
    "Database": "a database",
    "Devices": "a device",
    "Document": "paper",
    "Food": "food",
    "Gestures": "a hand",
    "Health": "health",
    "Laundry": "laundry",
    "Letters": "a letter",
    "Math": "mathematics",
    "Mood": "a face",
    "Nature": "a plant",
    "Numbers": "a number",
    "Shapes": "a pattern",
    "Sport": "sport",
    "Vehicles": "a vehicle",
    "Weather": "the weather",
    "Zodiac": "a zodiac sign",
}


def icon_files(folders: Folders) -> list[tuple[str, str, Path]]:
    """(item, group, file) of line icons; an icon's variants are one item."""
    package = folders("tabler") / "package"
    found = []
    for name, entry in sorted(json.loads((package / "icons.json").read_text()).items()):
        path = package / f"icons/outline/{name}.svg"
        if entry["category"] in ICONS and path.is_file():
            letter = re.search(r"(letter|number)-([a-z\d]+)", name)
            item = f"{letter[1]} {letter[2]}" if letter else _MODIFIER.sub("", name)
            found.append((f"icon {item}", ICONS[entry["category"]], path))
    return found


def icon_thing(entry: tuple[str, str, Path]) -> Thing | None:
    """The icon in near black on white."""
    svg = entry[2].read_text(encoding="utf-8").replace("currentColor", "#111111")
    image = _render(svg, "white", 10)
    return Thing(entry[0], "tabler", entry[1], image) if image else None


SIGN_KINDS = {
    "complementary": "an additional plate",
    "information": "information",
    "regulatory": "a rule",
    "warning": "a warning",
}


def sign_files(folders: Folders, grouped: bool) -> list[tuple[str, str, Path]]:
    """(item, what it says, file) of road signs: those whose meaning is one of the groups (`grouped`: the group), or
    the others (their kind)."""
    found = []
    for path in sorted((folders("signs") / "package/package_signs").glob("*.svg")):
        group = sign_group(re.sub(r"--g\d+$", "", path.stem))
        kind = SIGN_KINDS.get(path.stem.split("--")[0], "")
        if kind and bool(group) == grouped:
            found.append((f"sign {sign_item(path.stem)}", group or kind, path))
    return found


def sign_thing(entry: tuple[str, str, Path]) -> Thing | None:
    """The sign on a plain light ground."""
    image = _render(entry[2].read_text(encoding="utf-8"), (205, 213, 219), 6)
    return Thing(entry[0], "signs", entry[1], image) if image else None


def digit_scans(folders: Folders) -> list[tuple[str, int, np.ndarray]]:
    """(item, digit, 28 x 28 grey levels) of every scan; each scan is its own item."""
    found = []
    for digit in range(10):
        data = json.loads((folders("mnist") / f"package/src/digits/{digit}.json").read_text())["data"]
        scans = (255 * np.asarray(data).reshape(-1, 28, 28)).round().astype(np.uint8)
        found += [(f"scan {digit} {i}", digit, scan) for i, scan in enumerate(scans)]
    return found


def letters(folders: Folders) -> dict[str, tuple[list[Path], list[str]]]:
    """Per script: the faces, and the letters that all of them have."""
    fonts = folders("noto") / "usr/share/fonts/truetype/noto"
    found = {}
    for script, chars in _letters().items():
        stem = "" if script == "Cyrillic" else script
        faces = [f for f in (fonts / f"Noto{style}{stem}-Regular.ttf" for style in ("Sans", "Serif")) if f.is_file()]
        supported = set.intersection(*(set(_characters(face)) for face in faces))
        found[script] = (faces, sorted(c for c in chars if ord(c) in supported))
    assert set(found) == set(SCRIPTS)
    return found
