"""The stand-in's six tasks and its general set: which picture is asked what.

Each task is new to the general mixture: other pictures, another question, other answers or another form of answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from pack_pictures import draw
from pack_sources import Source
from PIL import Image
from stand_in_mixture import TEST, mixture
from stand_in_pictures import Folders, Thing, digit_scans, pool
from stand_in_scenes import NUMBERS, SIDE, Piece, digit_picture, thing_scene
from stand_in_score import questions

TEXTILE = Source(
    "textile",
    "pypi",
    "conformal-clip-data",
    "0.1.4",
    "conformal_clip_data-0.1.4-py3-none-any.whl",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
    "MIT",
    "Copyright (c) 2025 Megahed; the pictures are simulated textiles of Megahed, Chen et al., arXiv:2501.12596",
    "data/textile_images/simulated/{nominal,local,global}/*.jpg",
    "cut out at 112 x 112 pixels without enlarging or reducing, stored as WebP",
)
SIZES = {"train": 450, "test": 150}
Turns = list[tuple[str, str]]


@dataclass
class Row:
    """One sample of a pack: `turns` are (question, answer) pairs, `items` the names that must stay on one side."""

    split: str
    id: str
    image: Image.Image
    turns: Turns
    kind: str
    origin: str
    items: list[str]


PLURALS = {
    "a bird": "birds",
    "a boat": "boats",
    "a building": "buildings",
    "a clock": "clocks",
    "a dessert": "desserts",
    "a dish": "dishes",
    "a drink": "drinks",
    "a face": "faces",
    "a flag": "flags",
    "a flower": "flowers",
    "a fruit": "fruits",
    "a hand": "hands",
    "a heart": "hearts",
    "a mammal": "mammals",
    "a person": "persons",
    "a plant": "plants",
    "a sea animal": "sea animals",
    "a tool": "tools",
    "a vegetable": "vegetables",
    "a vehicle": "vehicles",
    "an arrow": "arrows",
    "an insect": "insects",
}


def _cutouts(drawn: dict[str, list[Thing]], side: str) -> dict[str, list[Thing]]:
    found: dict[str, list[Thing]] = defaultdict(list)
    for thing in drawn["emoji"]:
        if thing.pool == f"task-{side}" and thing.group in PLURALS:
            found[thing.group].append(thing)
    return dict(sorted(found.items()))


def counting(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """One to six of one kind of emoji among up to two others of another kind."""
    rows = []
    for side, size in SIZES.items():
        rng = Random(f"counting {side}")
        groups = _cutouts(drawn, side)
        for number in range(size):
            count = number % 6 + 1
            group, other = rng.sample(list(groups), 2)
            things = [rng.choice(groups[group])] * count + [rng.choice(groups[other])] * rng.choice((0, 1, 2))
            spots = rng.sample([(r, c) for r in range(3) for c in range(3)], len(things))
            image, pieces = thing_scene(rng, things, (28, 35), spots, noisy=False)
            turns = [(f"Count the {PLURALS[group]}.", NUMBERS[count])]
            rows.append(_scene(side, f"counting-{side}-{number:03}", image, turns, "counting", pieces))
    return rows


def _scene(side: str, name: str, image: Image.Image, turns: Turns, kind: str, pieces: list[Piece]) -> Row:
    origins = "; ".join(sorted({p.source for p in pieces}))
    return Row(side, name, image, turns, kind, origins, sorted({p.item for p in pieces}))


RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}


def relations(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """Two emoji of two kinds: where one is, seen from the other; in training the question is turned round as well."""
    rows = []
    for side, size in SIZES.items():
        rng = Random(f"relations {side}")
        groups = _cutouts(drawn, side)
        for number in range(size):
            answer = list(RELATIONS)[number % 4]
            first, second = (rng.choice(groups[g]) for g in rng.sample(list(groups), 2))
            low, high = sorted(rng.sample(range(3), 2))
            lane = rng.randrange(3)
            before, after = ((lane, low), (lane, high)) if answer in ("left", "right") else ((low, lane), (high, lane))
            spots = [before, after] if answer in ("left", "above") else [after, before]
            image, pieces = thing_scene(rng, [first, second], (32, 37), spots, noisy=False)
            a, b = (p.what.split(" ", 1)[1] for p in pieces)
            turns = [(f"Seen from the {b}, where is the {a}?", answer)]
            if side == "train":
                turns.append((f"Seen from the {a}, where is the {b}?", RELATIONS[answer]))
            rows.append(_scene(side, f"relations-{side}-{number:03}", image, turns, "relations", pieces))
    return rows


def numbers(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """Two scanned digits side by side, read as one number."""
    rows = []
    scans: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = defaultdict(list)
    for item, digit, scan in digit_scans(folders):
        scans[pool(item), digit].append((item, scan))
    for side, size in SIZES.items():
        rng = Random(f"numbers {side}")
        unused = {
            digit: rng.sample(scans[f"task-{side}", digit], len(scans[f"task-{side}", digit])) for digit in range(10)
        }
        for number in range(size):
            value = rng.randint(10, 99)
            chosen = [unused[int(digit)].pop() for digit in str(value)]
            image = digit_picture(rng, [scan for _, scan in chosen], (46, 55), 12)
            turns = [("Read the number.", str(value))]
            rows.append(
                Row(side, f"numbers-{side}-{number:03}", image, turns, "numbers", "mnist", [i for i, _ in chosen])
            )
    return rows


def signs(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """What a road sign means; none of these signs is in the general mixture."""
    rows = []
    for side, size in SIZES.items():
        chosen = [t for t in drawn["meaning"] if (draw(f"meaning {t.item}") % 100 < 27) == (side == "test")]
        chosen = sorted(chosen, key=lambda t: draw(f"{t.item} {t.image.tobytes().hex()}"))[:size]
        for number, thing in enumerate(chosen):
            turns = [("What does this road sign tell the driver?", thing.group)]
            rows.append(Row(side, f"signs-{side}-{number:03}", thing.image, turns, "signs", "signs", [thing.item]))
    return rows


FLAWS = {"nominal": "nothing", "local": "a spot", "global": "the weave"}


def _flaw_place(grey: np.ndarray) -> tuple[int, int]:
    """(row, column) of the middle of a spot: where neighbouring pixels differ most, over 16 x 24 pixels."""
    steps = np.abs(np.diff(grey.astype(np.int64), axis=1))[:-1] + np.abs(np.diff(grey.astype(np.int64), axis=0))[:, :-1]
    table = np.pad(steps**2, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    high, wide = 24, 16
    sums = table[high:, wide:] - table[:-high, wide:] - table[high:, :-wide] + table[:-high, :-wide]
    row, column = np.unravel_index(sums.argmax(), sums.shape)
    return int(row) + high // 2, int(column) + wide // 2


def textures(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """Simulated textiles: flawless, with a spot (and where in the picture), or of another weave."""
    root = next(folders("textile").rglob("simulated"))
    rows = []
    for side, size in SIZES.items():
        for flaw, answer in FLAWS.items():
            files = [
                p
                for p in sorted((root / flaw).glob("*.jpg"))
                if (draw(f"{flaw} {p.stem}") % 4 == 0) == (side == "test")
            ]
            for path in sorted(files, key=lambda p: draw(f"{flaw} {p.name}"))[: size // 3]:
                rng = Random(f"{flaw} {path.stem}")
                grey = np.asarray(Image.open(path).convert("L"))
                top, left = (rng.randint(0, n - SIDE) for n in grey.shape)
                turns: Turns = [("What is wrong with the fabric?", answer)]
                kind = "flaw"
                if flaw == "local":
                    # the spot lies well inside one quarter of the cut-out, which quarter is drawn
                    row, column = _flaw_place(grey)
                    place = rng.choice([(v, h) for v in ("upper", "lower") for h in ("left", "right")])
                    wanted = [rng.randint(18, 42) + (56 - 4) * (word in ("lower", "right")) for word in place]
                    top, left = (
                        min(max(0, a - w), n - SIDE) for a, w, n in zip((row, column), wanted, grey.shape, strict=True)
                    )
                    at = (row - top, column - left)
                    if min(abs(v - SIDE / 2) for v in at) < 9:  # the picture's edge pushed it towards the middle
                        where = ""
                    else:
                        where = f"{'upper' if at[0] < SIDE / 2 else 'lower'} {'left' if at[1] < SIDE / 2 else 'right'}"
                    asked = ("In which corner is the spot?", where)
                    if where and side == "train":
                        turns.append(asked)
                    elif where and draw(f"ask {path.stem}") % 2:
                        turns, kind = [asked], "flaw-place"
                image = Image.fromarray(grey[top : top + SIDE, left : left + SIDE]).convert("RGB")
                item = f"textile {flaw} {path.stem}"
                rows.append(Row(side, f"textures-{side}-{flaw}-{path.stem}", image, turns, kind, "textile", [item]))
    return rows


def captions(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """Colours first, then what is drawn: a style of caption that the mixture does not have."""
    rows = []
    for side, size in SIZES.items():
        chosen: dict[str, list[Thing]] = defaultdict(list)
        for thing in sorted(drawn["clipart"], key=lambda t: draw(f"captions {t.item} {t.image.tobytes()[:999].hex()}")):
            if thing.pool == f"task-{side}" and thing.colours and thing.group != "a pattern":
                chosen[thing.group].append(thing)
        most = max(len(found) for found in chosen.values())
        while sum(min(most, len(found)) for found in chosen.values()) > size:
            most -= 1
        for thing in (t for _, found in sorted(chosen.items()) for t in found[:most]):
            first, *rest = thing.colours
            paint = f"mostly {first} with some {rest[0]}" if rest else f"all {first}"
            turns = [("Say how it is painted, then what it is.", f"{paint}, it shows {thing.group}.")]
            name = f"captions-{side}-{len([r for r in rows if r.split == side]):03}"
            rows.append(Row(side, name, thing.image, turns, "captions", "openclipart", [thing.item]))
    return rows


def general(folders: Folders, drawn: dict[str, list[Thing]]) -> list[Row]:
    """Thirty questions of each kind of the general mixture, about its held-out items."""
    tested = mixture(folders, drawn, "test", TEST, 0)
    by_picture = {id(s.picture): s for s in tested}
    rows = []
    for number, (kind, question, answer, picture) in enumerate(questions(tested, 30, seed=1)):
        sample = by_picture[id(picture)]
        turns = [(question, answer)]
        rows.append(
            Row("test", f"general-{number:03}", Image.fromarray(picture), turns, kind, sample.origin, [sample.id])
        )
    return rows


TASKS: dict[str, Callable[[Folders, dict[str, list[Thing]]], list[Row]]] = {
    "counting": counting,
    "numbers": numbers,
    "signs": signs,
    "textures": textures,
    "relations": relations,
    "captions": captions,
    "general": general,
}
