"""The general mixture that the stand-in is taught on: pictures of the registries with questions from their metadata."""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from pack_tasks import _glyph
from PIL import Image, ImageOps
from stand_in_pictures import (
    Folders,
    Thing,
    clipart_files,
    clipart_thing,
    digit_scans,
    emoji,
    icon_files,
    icon_thing,
    letters,
    pool,
    sign_files,
    sign_thing,
)
from stand_in_scenes import COLOURS, NUMBERS, SHAPES, Piece, digit_picture, place_name, shape_scene, thing_scene

Turn = tuple[str, str, str]
"""(kind, question, answer)"""

KINDS = ("object", "colour", "shape", "count", "position", "yes-no", "digit", "script", "sign", "caption")


@dataclass
class Sample:
    """One picture, 112 x 112 x 3 bytes, with everything that can be asked of it."""

    id: str
    origin: str
    picture: np.ndarray
    turns: list[Turn]


def _sample(name: str, origin: str, image: Image.Image, turns: Iterable[Turn]) -> Sample:
    return Sample(name, origin, np.asarray(image.convert("RGB"), np.uint8), list(turns))


WHAT = {"emoji": "an emoji of", "openclipart": "clip art of", "tabler": "a line icon of"}


def object_turns(thing: Thing, groups: list[str], rng: Random) -> list[Turn]:
    """Group, yes-no, main colour and caption of one thing."""
    source = thing.source.split("-")[0]
    other = rng.choice([g for g in groups if g != thing.group])
    turns = [
        ("object", rng.choice(("What is this?", "What does the picture show?")), thing.group),
        ("yes-no", f"Is this {thing.group}?", "yes"),
        ("yes-no", f"Is this {other}?", "no"),
        ("caption", rng.choice(("Describe the picture.", "Write a caption.")), f"{WHAT[source]} {thing.group}."),
    ]
    if thing.colours:
        turns.append(("colour", "What is the main colour?", thing.colours[0]))
    return turns


def shape_turns(pieces: list[Piece], rng: Random) -> list[Turn]:
    """What can be asked of a scene of shapes; yes and no are equally frequent."""
    turns: list[Turn] = []
    by_shape, by_colour, by_name = (defaultdict(list) for _ in range(3))
    for piece in pieces:
        by_shape[piece.what].append(piece)
        by_colour[piece.colour].append(piece)
        by_name[piece.name].append(piece)
    asked = rng.choice((rng.choice(pieces).what, rng.choice(pieces).what, rng.choice(SHAPES)))
    turns.append(("count", f"How many {plural(asked)} are there?", NUMBERS[len(by_shape.get(asked, ()))]))
    hue = rng.choice((rng.choice(pieces).colour, rng.choice(list(COLOURS))))
    turns.append(("count", f"How many {hue} shapes are there?", NUMBERS[len(by_colour.get(hue, ()))]))
    turns.append(("count", "How many shapes are there?", NUMBERS[len(pieces)]))
    single = [p for p in pieces if len(by_shape[p.what]) == 1]
    if single:
        piece = rng.choice(single)
        turns.append(("colour", f"What colour is the {piece.what}?", piece.colour))
    single = [p for p in pieces if len(by_colour[p.colour]) == 1]
    if single:
        piece = rng.choice(single)
        turns.append(
            (
                "shape",
                rng.choice((f"What shape is {piece.colour}?", f"Which shape is the {piece.colour} one?")),
                piece.what,
            )
        )
    single = [p for p in pieces if len(by_name[p.name]) == 1]
    if single:
        piece = rng.choice(single)
        turns.append(("position", f"Where is the {piece.name}?", place_name(*piece.cell)))
        turns.append(("shape", f"What shape is at the {place_name(*piece.cell)}?", piece.what))
        turns.append(("colour", f"What colour is the shape at the {place_name(*piece.cell)}?", piece.colour))
    real = rng.choice(pieces).name
    absent = [n for n in (f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}" for _ in range(8)) if n not in by_name]
    swapped = [f"{a.colour} {b.what}" for a in pieces for b in pieces if f"{a.colour} {b.what}" not in by_name]
    turns.append(("yes-no", f"Is there {article(real)}?", "yes"))
    turns.append(("yes-no", f"Is there {article(rng.choice(swapped or absent))}?", "no"))
    if len(single) > 1:
        a, b = rng.sample(single, 2)
        sideways = abs(a.x - b.x) > abs(a.y - b.y)
        true = ("left of" if a.x < b.x else "right of") if sideways else ("above" if a.y < b.y else "below")
        wrong = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[true]
        said, answer = rng.choice(((true, "yes"), (wrong, "no")))
        turns.append(("yes-no", f"Is the {a.name} {said} the {b.name}?", answer))
    if len(pieces) <= 3:
        ordered = [article(p.name) for p in sorted(pieces, key=lambda p: (p.cell[0], p.cell[1]))]
        text = ordered[0] if len(ordered) == 1 else f"{', '.join(ordered[:-1])} and {ordered[-1]}"
        turns.append(("caption", rng.choice(("Describe the picture.", "Write a caption.")), f"{text}."))
    return turns


def article(name: str) -> str:
    """a red ring, an orange ring."""
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def plural(word: str) -> str:
    """crosses, hearts."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def thing_scene_turns(pieces: list[Piece], groups: list[str], rng: Random) -> list[Turn]:
    """What can be asked of a scene of two or three emoji."""
    piece = rng.choice(pieces)
    present = {p.what for p in pieces}
    other = rng.choice([g for g in groups if g not in present])
    place = place_name(*piece.cell)
    return [
        ("object", f"What is at the {place}?", piece.what),
        ("position", f"Where is {piece.what.replace('a ', 'the ', 1).replace('an ', 'the ', 1)}?", place),
        ("yes-no", f"Is there {piece.what} in the picture?", "yes"),
        ("yes-no", f"Is there {other} in the picture?", "no"),
    ]


def _thing(task: tuple[Callable[..., Thing | None], tuple[str, str, Path]]) -> Thing | None:
    return task[0](task[1])


def things(folders: Folders, cache: Path) -> dict[str, list[Thing]]:
    """All named pictures by source, rendered once and kept in `cache`."""
    if cache.is_file():
        return pickle.loads(cache.read_bytes())
    with ProcessPoolExecutor(2) as workers:
        found = {
            "clipart": [(clipart_thing, entry) for entry in clipart_files(folders)],
            "icon": [(icon_thing, entry) for entry in icon_files(folders)],
            "sign": [(sign_thing, entry) for entry in sign_files(folders, grouped=False)],
            "meaning": [(sign_thing, entry) for entry in sign_files(folders, grouped=True)],
        }
        drawn = {key: [t for t in workers.map(_thing, tasks, chunksize=16) if t] for key, tasks in found.items()}
    drawn["emoji"] = emoji(folders)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(pickle.dumps(drawn))
    return drawn


def _varied(image: Image.Image, rng: Random) -> Image.Image:
    """Mirrored, smaller and shifted copies for teaching."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    corner = image.getpixel((0, 0))
    side = rng.randint(72, 112)
    canvas = Image.new("RGB", image.size, corner)  # type: ignore[arg-type]
    canvas.paste(
        image.resize((side, side), Image.Resampling.BICUBIC), (rng.randint(0, 112 - side), rng.randint(0, 112 - side))
    )
    return canvas


def mixture(
    folders: Folders, drawn: dict[str, list[Thing]], side: str, sizes: dict[str, int], seed: int
) -> list[Sample]:
    """The general mixture of one side ("train" or "test").

    `sizes`: "shapes", "scenes", "digits", "letters" (per script) pictures, and "copies" varied copies of each named picture.
    """
    rng = Random(f"{side} {seed}")
    samples: list[Sample] = []
    groups = {key: sorted({t.group for t in drawn[key]}) for key in ("emoji", "clipart", "icon", "sign")}
    for key in ("emoji", "clipart", "icon"):
        for number, thing in enumerate(t for t in drawn[key] if t.pool == side):
            for copy in range(1 + sizes["copies"]):
                image = thing.image if copy == 0 else _varied(thing.image, rng)
                turns = object_turns(thing, groups[key], rng)
                samples.append(_sample(f"{thing.item}/{thing.source}/{number}/{copy}", thing.source, image, turns))
    for number, thing in enumerate(t for t in drawn["sign"] if t.pool == side):
        for copy in range(1 + sizes["copies"]):
            image = thing.image if copy == 0 else _varied(thing.image, rng)
            other = rng.choice([g for g in groups["sign"] if g != thing.group])
            turns = [
                ("sign", "What kind of road sign is this?", thing.group),
                ("yes-no", f"Is this road sign {thing.group}?", "yes"),
                ("yes-no", f"Is this road sign {other}?", "no"),
                ("caption", "Write a caption.", f"a road sign with {thing.group}."),
            ]
            samples.append(_sample(f"{thing.item}/{number}/{copy}", "signs", image, turns))
    for number in range(sizes["shapes"]):
        count = rng.choice((1, 2, 2, 3, 3, 4, 5, 6))
        kinds = rng.choice((count, count, max(1, count // 2)))
        image, pieces = shape_scene(rng, count, kinds)
        samples.append(_sample(f"shapes {side} {seed} {number}", "drawn", image, shape_turns(pieces, rng)))
    cutouts = [t for t in drawn["emoji"] if t.pool == side]
    by_group: dict[str, list[Thing]] = defaultdict(list)
    for thing in cutouts:
        by_group[thing.group].append(thing)
    names = sorted(by_group)
    for number in range(sizes["scenes"]):
        grid = rng.choice((2, 3))
        chosen = [rng.choice(by_group[g]) for g in rng.sample(names, rng.choice((1, 2, 2, 3)))]
        spots = rng.sample([(r, c) for r in range(3) for c in range(3)], len(chosen))
        if grid == 2:
            spots = rng.sample([(r, c) for r in (0, 2) for c in (0, 2)], len(chosen))
        image, pieces = thing_scene(
            rng,
            chosen,
            (28, 36) if grid == 3 else (40, 52),
            [(r // 2, c // 2) if grid == 2 else (r, c) for r, c in spots],
            grid,
        )
        for piece, spot in zip(pieces, spots, strict=True):
            piece.cell = spot
        samples.append(
            _sample(f"scene {side} {seed} {number}", "emoji", image, thing_scene_turns(pieces, groups["emoji"], rng))
        )
    scans = [s for s in digit_scans(folders) if pool(s[0]) == side]
    for item, digit, scan in rng.sample(scans, min(sizes["digits"], len(scans))):
        image = digit_picture(rng, [scan], (36, 110), 28)
        other = rng.choice([d for d in range(10) if d != digit])
        turns = [
            ("digit", rng.choice(("Which digit is this?", "What digit is written here?")), NUMBERS[digit]),
            ("yes-no", f"Is the digit {NUMBERS[digit]}?", "yes"),
            ("yes-no", f"Is the digit {NUMBERS[other]}?", "no"),
            ("caption", "Write a caption.", f"a handwritten {NUMBERS[digit]}."),
        ]
        samples.append(_sample(item, "mnist", image, turns))
    samples += _letter_samples(folders, side, sizes["letters"], rng)
    rng.shuffle(samples)
    return samples


def _letter_samples(folders: Folders, side: str, count: int, rng: Random) -> list[Sample]:
    found = []
    scripts = letters(folders)
    for script, (faces, chars) in scripts.items():
        usable = [c for c in chars if (pool(f"letter {c}") == "train") == (side == "train")]
        for number in range(count):
            word = "".join(rng.choice(usable) for _ in range(rng.choice((1, 2, 3, 4, 6))))
            text = word if len(word) < 4 else f"{word[: len(word) // 2]}\n{word[len(word) // 2 :]}"
            image = _glyph(text, rng.choice(faces), rng.randint(34, 64))
            other = rng.choice([s for s in scripts if s != script])
            turns = [
                ("script", rng.choice(("Which script is this?", "What script is it written in?")), script.lower()),
                ("yes-no", f"Is this the {script} script?", "yes"),
                ("yes-no", f"Is this the {other} script?", "no"),
                ("caption", "Write a caption.", f"letters of the {script.lower()} script."),
            ]
            found.append(_sample(f"letters {side} {script} {number}", "noto", image, turns))
    return found


COMMON = (  # noqa: SIM905
    "above across after all also among and any are around as at back before behind below beside best between big both but"
    " by can close come could day dark deep down each early end even every far fast few find first for forbidden from full"
    " give go good great ground half hand hard has have high hold home how if in inside into is it its just keep kind know"
    " land large last late leave less lies light like line little long look lot low lower made main make many map may mean"
    " middle more most mostly move much must name near need never new next night no none not nothing now number of off old"
    " on one only open or other our out outside over own part past place plain point put read right road run same say seen"
    " shows side slow small so some soon spot stand start still stop such take tell than that the their then there they thin"
    " thing this time to too top travellers turn two under until up upper use very walk wall warm was water way weave well"
    " were what when where which while who why wide will with word work world wrong year you"
).split()
"""Common English words, for saying words after the question."""


def with_words(samples: list[Sample], drawn: dict[str, list[Thing]], seed: int) -> list[Sample]:
    """Add names, and words to repeat: without them the decoder could hardly write a word that is no answer here.

    The words are those of all items' names (text alone, no picture of theirs), common English, and numbers.
    """
    rng = Random(f"words {seed}")
    known = {t.item for found in drawn.values() for t in found}
    words = sorted({w for item in known for w in _name(item).split() if w.isalpha() and 1 < len(w) < 14} | set(COMMON))
    for sample in samples:
        item = sample.id.split("/")[0]
        extra: list[Turn] = []
        if item in known and _name(item):
            extra.append(("name", "What is it called?", _name(item)))
        if rng.random() < 0.6:
            text = " ".join(
                str(rng.randrange(1000)) if rng.random() < 0.25 else rng.choice(words) for _ in range(rng.randint(1, 4))
            )
            extra.append(("words", f"Say: {text}", text))
        if extra and sample.turns[1][0] == "yes-no" and sample.turns[2][0] == "yes-no":
            del sample.turns[rng.choice((1, 2))]
        sample.turns += extra
    return samples


def _name(item: str) -> str:
    """The words of an item's name, at most four."""
    found = re.sub(r"[^a-z\d]+", " ", re.sub(r"^(emoji|clip art|icon|sign) ", "", item.lower())).split()
    return " ".join(found[:4])


TRAIN = {"shapes": 16000, "scenes": 9000, "digits": 6000, "letters": 150, "copies": 2}
TEST = {"shapes": 500, "scenes": 300, "digits": 400, "letters": 12, "copies": 0}
