"""What the video stand-in is taught on: reels of frames, and clips put together from them with what is true of them.

A reel is a set of frames of one scene in different states: places on a closed line, sizes, angles, one thing or another.
A clip is a sequence of eight of its frames, so a few hundred thousand different clips need only a few ten thousand
frames to go through the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image
from stand_in_mixture import Turn, article
from stand_in_pictures import Thing
from stand_in_scenes import COLOURS, NUMBERS, SHAPES, SIDE, ground, place_name, stamp
from video_clips import SAMPLED, Pose, decode, draw_frame, encode

KINDS = ("object", "colour", "start", "end", "place", "heading", "pace", "change", "size", "lanes", "scenes", "caption")
STEPS = 16
"""Places of a closed line across the frame, each seven pixels (ten, where it is slanting) from the next."""
COMPASS = {
    (1, 0): "east",
    (1, -1): "north east",
    (0, -1): "north",
    (-1, -1): "north west",
    (-1, 0): "west",
    (-1, 1): "south west",
    (0, 1): "south",
    (1, 1): "south east",
}
LINES = ((1, 0), (0, 1), (1, 1), (1, -1))
SIZES, ANGLES = (30, 38, 46, 54, 62, 70), tuple(range(0, 360, 60))
OPACITIES, OFFSETS = (1.0, 0.75, 0.5, 0.3, 0.15), (0, 9, 18, 26)


@dataclass
class Actor:
    """Something to be shown: `name` with its article, `colour` of shapes alone."""

    name: str
    cutout: Image.Image
    colour: str = ""
    item: str = ""
    source: str = "drawn"

    @property
    def the(self) -> str:
        return f"the {self.name.split(' ', 1)[1] if self.name.startswith(('a ', 'an ')) else self.name}"


@dataclass
class Reel:
    """Frames of one scene and its actors; `base` is the first frame's number in the bank."""

    kind: str
    actors: list[Actor]
    frames: list[Image.Image]
    facts: dict = field(default_factory=dict)
    base: int = 0


@dataclass
class Clip:
    """Eight numbers of a reel's frames, and what can be asked."""

    states: list[int]
    turns: list[Turn]


class Cast:
    """Draws actors: emoji of one pool, each group equally often, and coloured shapes."""

    def __init__(self, things: Sequence[Thing], side: str) -> None:
        self.groups: dict[str, list[Thing]] = {}
        for thing in things:
            if thing.pool == side and thing.cutout is not None:
                self.groups.setdefault(thing.group, []).append(thing)
        self.names = sorted(self.groups)

    def actors(self, rng: Random, count: int, shapes: float = 0.4) -> list[Actor]:
        """`count` actors of different names: all emoji, or (with chance `shapes`) all shapes of different colours."""
        if rng.random() < shapes:
            looks = [(rng.choice(SHAPES), colour) for colour in rng.sample(list(COLOURS), count)]
            return [
                Actor(article(f"{hue} {shape}"), stamp(shape, hue, 32, rng), hue, f"shape {hue} {shape}")
                for shape, hue in looks
            ]
        chosen = [rng.choice(self.groups[name]) for name in rng.sample(self.names, count)]
        return [Actor(t.group, t.cutout, "", t.item, t.source) for t in chosen if t.cutout is not None]


def _place(x: float, y: float) -> str:
    return place_name(int(y % SIDE * 3 // SIDE), int(x % SIDE * 3 // SIDE))


def line_reel(cast: Cast, rng: Random) -> Reel:
    """One actor at `STEPS` places of a closed line; with chance 0.4 another one that stays."""
    actors = cast.actors(rng, 2 if rng.random() < 0.4 else 1)
    line, side = rng.choice(LINES), rng.randint(34, 56)
    x, y = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
    if line == (1, 0):
        y = rng.uniform(18, SIDE - 18)
    elif line == (0, 1):
        x = rng.uniform(18, SIDE - 18)
    spots = [(x + line[0] * i * SIDE / STEPS, y + line[1] * i * SIDE / STEPS) for i in range(STEPS)]
    plain = ground(rng)
    still = [Pose(a.cutout, rng.uniform(22, 90), rng.uniform(22, 90), rng.randint(30, 44)) for a in actors[1:]]
    frames = [draw_frame(plain, [*still, Pose(actors[0].cutout, *spot, side)]) for spot in spots]
    return Reel("line", actors, frames, {"line": line, "spots": spots})


PACES = {
    "steady": ((1,) * 7, (2,) * 7),
    "faster": ((0, 1, 1, 2, 2, 3, 3), (1, 1, 1, 2, 2, 3, 3), (0, 0, 1, 1, 2, 2, 3)),
    "slower": ((3, 3, 2, 2, 1, 1, 0), (3, 3, 2, 2, 1, 1, 1), (3, 2, 2, 1, 1, 0, 0)),
    "still": ((0,) * 7,),
}
SPEEDS = ("at rest", "slow", "brisk", "fast")
HALVES = {"steady": "both halves", "faster": "the second half", "slower": "the first half", "still": "neither half"}


def line_clip(reel: Reel, rng: Random) -> Clip:
    pace = rng.choice(("steady", "steady", "faster", "slower", "still"))
    steps, way = rng.choice(PACES[pace]), rng.choice((-1, 1))
    at = [rng.randrange(STEPS)]
    for step in steps:
        at.append(at[-1] + way * step)
    states = [i % STEPS for i in at]
    one, line, spots = reel.actors[0], reel.facts["line"], reel.facts["spots"]
    going = COMPASS[(line[0] * way, line[1] * way)]
    start, end = (_place(*spots[states[i]]) for i in (0, -1))
    many = len(reel.actors) > 1
    it = one.the if many else rng.choice((one.the, "it"))
    turns = [
        ("start", f"Where is {it} at the start?", start),
        ("end", f"Where is {it} at the end?", end),
        ("heading", f"On the compass, where is {it} heading?", "nowhere" if pace == "still" else going),
        ("pace", f"In which half does {it} cover more ground?", HALVES[pace]),
    ]
    if pace != "still":
        for axis, (less, more) in enumerate((("west", "east"), ("north", "south"))):
            along = line[axis] * way
            said = more if along > 0 else less if along < 0 else "neither"
            turns.append(("heading", f"Is {it} heading {less} or {more}?", said))
    when, step = rng.choice((("start", steps[0]), ("end", steps[-1])))
    turns.append(("pace", f"How brisk is {it} at the {when}?", SPEEDS[step]))
    turns.append(("trace", f"Trace {it}.", ", ".join(_place(*spots[states[i]]) for i in (1, 3, 5, 7))))
    if many and pace != "still":
        turns.append(("object", "What is in motion?", one.name))
        turns.append(("object", "What stays in its place?", reel.actors[1].name))
    if not many:
        turns.append(("object", rng.choice(("What is this?", "What does the video show?")), one.name))
        turns.append(("change", "What changes?", "nothing" if pace == "still" else "the place"))
        if one.colour:
            turns.append(("colour", "What colour is it?", one.colour))
    if rng.random() < 0.5:
        drift = {"steady": "", "faster": ", gaining speed", "slower": ", losing speed", "still": ""}[pace]
        end_of = "at rest" if pace == "still" else f"heading {going}{drift}"
        turns.append(("caption", rng.choice(("Describe the video.", "Write a caption.")), f"{one.name} {end_of}."))
    return Clip(states, turns)


LANES = ((0, 1), (1, 0), (1, 2), (2, 1), (1, 3), (3, 1), (1, 1), (0, 2), (2, 0), (1, -2), (-2, 1), (1, -1))


def lane_reel(cast: Cast, rng: Random) -> Reel:
    """Two actors on two parallel closed lines, at speeds that stand to each other as one of `LANES`."""
    actors, speeds, level = cast.actors(rng, 2), rng.choice(LANES), rng.random() < 0.5
    plain, a, b = ground(rng), rng.uniform(0, SIDE), rng.uniform(0, SIDE)
    lanes = [28 + rng.uniform(-5, 5), 84 + rng.uniform(-5, 5)]
    sides = [rng.randint(32, 46) for _ in actors]
    frames = []
    for i in range(STEPS):
        poses = []
        for actor, first, lane, speed, side in zip(actors, (a, b), lanes, speeds, sides, strict=True):
            along = first + i * speed * SIDE / STEPS
            poses.append(Pose(actor.cutout, *((along, lane) if level else (lane, along)), side))
        frames.append(draw_frame(plain, poses))
    return Reel("lane", actors, frames, {"speeds": speeds, "level": level})


def lane_clip(reel: Reel, rng: Random) -> Clip:
    at, way = rng.randrange(STEPS), rng.choice((-1, 1))
    states = [(at + way * i) % STEPS for i in range(SAMPLED)]
    places = ("top", "bottom") if reel.facts["level"] else ("left", "right")
    a, b = reel.facts["speeds"]
    one, other = reel.actors
    behind = places[0] if abs(a) < abs(b) else places[1] if abs(b) < abs(a) else "none"
    number = rng.randrange(2)
    moving = "both" if a and b else places[0] if a else places[1]
    turns = [
        ("lanes", "Which one covers less ground?", behind),
        ("lanes", "Which one moves at all?", moving),
        ("place", f"Where is {reel.actors[number].the}?", places[number]),
        ("object", f"What is at the {places[1 - number]}?", reel.actors[1 - number].name),
    ]
    if speed := (a, b)[number]:
        words = ("west", "east") if reel.facts["level"] else ("north", "south")
        asked = f"Is {reel.actors[number].the} heading {words[0]} or {words[1]}?"
        turns.append(("heading", asked, words[speed * way > 0]))
    if a and b:
        turns.append(("lanes", "Are their ways the same or opposite?", "the same" if a * b > 0 else "opposite"))
    elif rng.random() < 0.7:
        turns.append(("object", "What stays in its place?", (one if not a else other).name))
        turns.append(("object", "What is in motion?", (one if a else other).name))
    over = "above" if reel.facts["level"] else "left of"
    turns.append(
        ("caption", rng.choice(("Describe the video.", "Write a caption.")), f"{one.name} {over} {other.name}.")
    )
    return Clip(states, turns)


def slide_reel(cast: Cast, rng: Random) -> Reel:
    """Six actors, one at a time, on one ground."""
    actors, plain = cast.actors(rng, 6, 0.35), ground(rng)
    frames = []
    for actor in actors:
        side = rng.randint(56, 84)
        slack = (SIDE - side) / 2
        x, y = (SIDE / 2 + rng.uniform(-slack, slack) for _ in range(2))
        frames.append(draw_frame(plain, [Pose(actor.cutout, x, y, side)]))
    return Reel("slide", actors, frames)


def scene_order(rng: Random, kinds: int, scenes: int) -> list[int]:
    """Which of `kinds` things each of `scenes` scenes shows: all occur, none twice running.

    >>> scene_order(Random(0), 2, 3) in ([0, 1, 0], [1, 0, 1])
    True
    """
    if kinds == 1:
        return [0]
    while True:
        order = rng.sample(range(kinds), kinds) + [rng.randrange(kinds) for _ in range(scenes - kinds)]
        rng.shuffle(order)
        if all(a != b for a, b in pairwise(order)):
            return order


def slide_clip(reel: Reel, rng: Random) -> Clip:
    kinds = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5))
    scenes = 1 if kinds == 1 else rng.randint(kinds, min(6, kinds + 2))
    chosen = rng.sample(range(6), kinds)
    order = [chosen[i] for i in scene_order(rng, kinds, scenes)]
    cuts = sorted(rng.sample(range(1, SAMPLED), scenes - 1))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, SAMPLED], strict=True)]
    states = [state for state, length in zip(order, lengths, strict=True) for _ in range(length)]
    names = [reel.actors[i].name for i in order]
    shapes = bool(reel.actors[0].colour)
    turns = [
        ("start", "What is shown at the start?", names[0]),
        ("end", "What is shown at the end?", names[-1]),
        ("scenes", "How many scenes are there?", NUMBERS[scenes]),
        ("change", "What changes?", "nothing" if scenes == 1 else "the thing shown"),
    ]
    again = {n for n in names if names.count(n) > 1}
    if len(again) < 2 and scenes > 1:
        turns.append(("scenes", "What is shown again?", next(iter(again), "nothing")))
    if shapes:
        turns.append(("scenes", "How many colours come by?", NUMBERS[kinds]))
    else:
        turns.append(("scenes", "How many kinds of things come by?", NUMBERS[kinds]))
    follow = [i for i in range(scenes - 1) if names.count(names[i]) == 1]
    if follow:
        i = rng.choice(follow)
        turns.append(("scenes", f"When {reel.actors[order[i]].the} is gone, what is there?", names[i + 1]))
    if scenes == 3:
        turns.append(("scenes", "What is between the first scene and the last?", names[1]))
    if scenes > 1 and lengths.count(max(lengths)) == 1 and max(lengths) > 2:
        turns.append(("scenes", "What is shown the longest?", names[lengths.index(max(lengths))]))
    if scenes <= 4:
        text = ", then ".join(names)
        turns.append(("caption", rng.choice(("Describe the video.", "Write a caption.")), f"{text}."))
    return Clip(states, turns)


TURNABLE = ("triangle", "star", "cross", "heart", "diamond", "square")


def act_reel(cast: Cast, rng: Random) -> Reel:
    """One actor in different sizes, angles, strengths and small displacements, and the ground alone.

    Every frame's other properties are those of one random state, so that no frame tells which property is changing.
    """
    while True:
        (actor,) = cast.actors(rng, 1)
        if not actor.colour or actor.name.endswith(TURNABLE):
            break
    plain = ground(rng)
    pose = Pose(
        actor.cutout, rng.uniform(30, 82), rng.uniform(40, 86), rng.choice(SIZES[1:5]), rng.choice(ANGLES[:6]),
        rng.choice(OPACITIES[:3]),
    )  # fmt: skip
    turn = rng.uniform(0, 60)
    poses = [pose.at(side=s) for s in SIZES]
    poses += [pose.at(angle=a + turn) for a in ANGLES]
    poses += [pose.at(opacity=o) for o in OPACITIES]
    poses += [pose.at(y=pose.y - d) for d in OFFSETS]
    poses += [pose.at(x=pose.x + d) for d in (-18, -6, 6, 18)]
    poses += [pose.at(opacity=0.0)]
    return Reel("act", [actor], [draw_frame(plain, [p]) for p in poses], {"place": _place(pose.x, pose.y)})


def _loop(first: int, count: int, way: int, rng: Random) -> list[int]:
    """A sawtooth through `count` states, one or (with chance a quarter) two frames each."""
    start, hold = rng.randrange(count), rng.choice((1, 1, 1, 2))
    return [first + (start + way * (i // hold)) % count for i in range(SAMPLED)]


def _swing(first: int, rng: Random) -> list[int]:
    wave = [0, 1, 2, 3, 2, 1] if rng.random() < 0.6 else [0, 2, 3, 2]
    start = rng.randrange(len(wave))
    return [first + wave[(start + i) % len(wave)] for i in range(SAMPLED)]


def _blink(rng: Random) -> list[int]:
    period, start, shown = rng.choice((2, 3, 4)), rng.randrange(4), rng.randrange(12)
    return [shown if (i + start) % period < (period + 1) // 2 else 25 for i in range(SAMPLED)]


ACTS: dict[str, Callable[[Random], list[int]]] = {
    "bigger": lambda rng: _loop(0, 6, 1, rng),
    "smaller": lambda rng: _loop(0, 6, -1, rng),
    "round": lambda rng: _loop(6, 6, rng.choice((-1, 1)), rng),
    "paler": lambda rng: _loop(12, 5, 1, rng),
    "stronger": lambda rng: _loop(12, 5, -1, rng),
    "up": lambda rng: _swing(17, rng),
    "aside": lambda rng: _swing(21, rng),
    "gone": _blink,
    "still": lambda rng: [rng.randrange(25)] * SAMPLED,
}
CHANGES = {
    "bigger": "the size",
    "smaller": "the size",
    "round": "the angle",
    "paler": "the strength",
    "stronger": "the strength",
    "up": "the height",
    "aside": "the place",
    "gone": "the presence",
    "still": "nothing",
}
TOLD = {
    "bigger": "getting bigger",
    "smaller": "getting smaller",
    "round": "going round",
    "paler": "getting paler",
    "stronger": "getting stronger",
    "up": "going up and down",
    "aside": "going from side to side",
    "gone": "coming and going",
    "still": "at rest",
}


def act_clip(reel: Reel, rng: Random) -> Clip:
    act = rng.choice(list(ACTS))
    (one,) = reel.actors
    size, strength = (act if act in pair else "neither" for pair in (("bigger", "smaller"), ("paler", "stronger")))
    turns = [
        ("change", "What changes?", CHANGES[act]),
        ("object", rng.choice(("What is this?", "What does the video show?")), one.name),
        ("caption", rng.choice(("Describe the video.", "Write a caption.")), f"{one.name} {TOLD[act]}."),
    ]
    if act not in ("up", "aside"):
        turns.append(("place", f"Where is {rng.choice((one.the, 'it'))}?", reel.facts["place"]))
    if act in ("bigger", "smaller") or rng.random() < 0.2:
        turns.append(("size", "Does it get bigger or smaller?", size))
    if act in ("paler", "stronger") or rng.random() < 0.2:
        turns.append(("change", "Does it get paler or stronger?", strength))
    if one.colour:
        turns.append(("colour", "What colour is it?", one.colour))
    return Clip(ACTS[act](rng), turns)


MAKERS: dict[str, tuple[Callable[[Cast, Random], Reel], Callable[[Reel, Random], Clip]]] = {
    "line": (line_reel, line_clip),
    "lane": (lane_reel, lane_clip),
    "slide": (slide_reel, slide_clip),
    "act": (act_reel, act_clip),
}


def make_reel(task: tuple[str, Cast, str]) -> tuple[Reel, np.ndarray]:
    """A reel and its frames as uint8 [N, 112, 112, 3] after H.264, as the frames of real clips are; the reel's own
    pictures are dropped."""
    kind, cast, seed = task
    rng = Random(seed)
    reel = MAKERS[kind][0](cast, rng)
    frames = np.stack(decode(encode(reel.frames, rng.randint(20, 33), "superfast")))
    reel.frames = []
    for actor in reel.actors:
        actor.cutout = None  # type: ignore[assignment]
    return reel, frames
