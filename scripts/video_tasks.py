"""The video suite's five tasks and its general set: which clip is asked what.

Each task is new to what the video stand-in is taught: other pictures, other questions, other words of answer. Nothing is
readable from one frame: places, sizes, angles and strengths go round, so that every frame may be of every answer, and the
answers are equally frequent whatever is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi, sin
from random import Random

from PIL import Image
from stand_in_pictures import Thing
from stand_in_reels import KINDS, MAKERS, Actor, Cast, scene_order
from stand_in_scenes import SIDE, ground
from video_clips import Pose, draw_frame

SIZES = {"train": 300, "test": 100}
NAMED = (
    "a bird", "a building", "a clock", "a dish", "a face", "a flag", "a hand", "a mammal", "a person", "a tool", "a vehicle",
    "clothing", "the weather",
)  # fmt: skip
"""The groups of emoji that the tasks show: those with several items on both sides."""


@dataclass
class ClipRow:
    """One sample of a pack: `items` are the names that must stay on one side."""

    split: str
    id: str
    frames: list[Image.Image]
    question: str
    answer: str
    kind: str
    origins: list[str]
    items: list[str]


def _cast(things: Sequence[Thing], side: str) -> Cast:
    return Cast([t for t in things if t.group in NAMED], f"task-{side}")


def _row(
    side: str, task: str, number: int, frames: list[Image.Image], asked: str, answer: str, actors: Sequence[Actor]
):
    origins = sorted({a.source for a in actors})
    items = sorted({a.item for a in actors})
    return ClipRow(side, f"{task}-{side}-{number:03}", frames, asked, answer, task, origins, items)


def _noun(actor: Actor) -> str:
    return actor.the.removeprefix("the ")


def _slides(cast: Cast, rng: Random, order: Sequence[int], actors: Sequence[Actor], length: int) -> list[Image.Image]:
    """The actors one after another; every scene lasts long enough to be among eight frames of the clip."""
    plain, drawn = ground(rng, noisy=False), []
    for actor in actors:
        side = rng.randint(56, 80)
        slack = (SIDE - side) / 2
        drawn.append(Pose(actor.cutout, *(SIDE / 2 + rng.uniform(-slack, slack) for _ in range(2)), side))
    least = -(-(length - 1) // 7)
    spare = length - least * len(order)
    cuts = sorted(rng.randint(0, spare) for _ in range(len(order) - 1))
    extra = [b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]
    frames = []
    for which, more in zip(order, extra, strict=True):
        frames += [draw_frame(plain, [drawn[which]])] * (least + more)
    return frames


def counting(things: Sequence[Thing]) -> list[ClipRow]:
    """One to five different emoji one after another; some come back."""
    rows = []
    for side, size in SIZES.items():
        rng, cast = Random(f"video counting {side}"), _cast(things, side)
        for number in range(size):
            count = number % 5 + 1
            actors = cast.actors(rng, count, 0)
            scenes = 1 if count == 1 else rng.randint(count, min(6, count + 2))
            order = scene_order(rng, count, scenes)
            length = rng.choice((20, 22, 24)) if scenes > 5 else rng.randint(16, 24)
            asked = rng.choice(
                (
                    "Count the different things, each once.",
                    "How many different things take turns?",
                    "Count who appears.",
                )
            )
            frames = _slides(cast, rng, order, actors, length)
            rows.append(_row(side, "counting", number, frames, asked, f"{count} in all", actors))
    return rows


WAYS = {
    "to the right": (1, 0),
    "to the left": (-1, 0),
    "upwards": (0, -1),
    "downwards": (0, 1),
    "up and right": (1, -1),
    "up and left": (-1, -1),
    "down and right": (1, 1),
    "down and left": (-1, 1),
}


def motion(things: Sequence[Thing]) -> list[ClipRow]:
    """One emoji goes one of eight ways from anywhere; in two fifths of the clips another goes another way or stays."""
    rows = []
    for side, size in SIZES.items():
        rng, cast = Random(f"video motion {side}"), _cast(things, side)
        for number in range(size):
            answer = list(WAYS)[number % 8]
            actors = cast.actors(rng, 2 if rng.random() < 0.4 else 1, 0)
            length = rng.randint(16, 24)
            other = rng.choice([(0, 0), (0, 0), *(way for word, way in WAYS.items() if word != answer)])
            travel, plain = rng.uniform(60, 100), ground(rng, noisy=False)
            starts = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.randint(36, 50)) for _ in actors]
            frames = []
            for i in range(length):
                along = travel * i / (length - 1)
                poses = [
                    Pose(actor.cutout, x + way[0] * along, y + way[1] * along, big)
                    for actor, (x, y, big), way in zip(actors, starts, (WAYS[answer], other), strict=False)
                ]
                frames.append(draw_frame(plain, poses[::-1]))
            asked = rng.choice(("Which way does {} go?", "Where is {} off to?", "In which direction does {} move?"))
            rows.append(_row(side, "motion", number, frames, asked.format(actors[0].the), answer, actors))
    return rows


def order(things: Sequence[Thing]) -> list[ClipRow]:
    """Three or four emoji one after another: which was first, second, last, before or after another."""
    rows = []
    for side, size in SIZES.items():
        rng, cast = Random(f"video order {side}"), _cast(things, side)
        for number in range(size):
            count = rng.choice((3, 3, 4))
            actors = cast.actors(rng, count, 0)
            # The answer's group goes round, so that all are equally frequent where they can be drawn.
            wanted = cast.names[number % len(cast.names)]
            at = number // len(cast.names) % count
            if wanted not in (names := [a.name for a in actors]):
                found = rng.choice(cast.groups[wanted])
                assert found.cutout is not None
                actors[at] = Actor(found.group, found.cutout, "", found.item, found.source)
            else:
                there = names.index(wanted)
                actors[at], actors[there] = actors[there], actors[at]
            choices = [(0, "What came first?"), (1, "What came second?"), (count - 1, "What came last?")]
            choices += [(i, f"What came right after {actors[i - 1].the}?") for i in range(1, count)]
            choices += [(i, f"What came just before {actors[i + 1].the}?") for i in range(count - 1)]
            asked = rng.choice([text for place, text in choices if place == at])
            frames = _slides(cast, rng, range(count), actors, rng.randint(16, 24))
            rows.append(_row(side, "order", number, frames, asked, f"it was {_noun(actors[at])}", actors))
    return rows


PACES: dict[str, Callable[[float], float]] = {
    "faster and faster": lambda u: u * u,
    "slower and slower": lambda u: u * (2 - u),
    "at one pace": lambda u: u,
}


def speed(things: Sequence[Thing]) -> list[ClipRow]:
    """One emoji that speeds up, slows down or does neither; or two in lanes, one of which is quicker."""
    rows = []
    for side, size in SIZES.items():
        rng, cast = Random(f"video speed {side}"), _cast(things, side)
        for number in range(size):
            length, plain, race = rng.randint(16, 24), ground(rng, noisy=False), number % 2
            actors = cast.actors(rng, 2 if race else 1, 0)
            x, y, along = (rng.uniform(0, SIDE) for _ in range(3))
            way, level = rng.choice((-1, 1)), rng.random() < 0.5
            if race:
                quicker = number // 2 % 2
                travels = [rng.uniform(25, 50), rng.uniform(85, 120)]
                ways = [way, rng.choice((way, way, -way))]
                lanes, sides = [28, 84], [rng.randint(34, 44) for _ in actors]
                if not quicker:
                    travels.reverse()
                answer = (
                    ("the upper one", "the lower one")[quicker] if level else ("the left one", "the right one")[quicker]
                )
                asked = rng.choice(("Which of the two is quicker?", "Who would win the race?"))
            else:
                answer = list(PACES)[number // 2 % 3]
                sides, travel = [rng.randint(36, 50)], rng.uniform(75, 120)
                line = rng.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
                asked = rng.choice(("How does its speed develop?", f"At what pace does {actors[0].the} go?"))
            frames = []
            for i in range(length):
                u = i / (length - 1)
                if race:
                    spots = [(a + w * t * u, lane) for a, w, t, lane in zip((x, y), ways, travels, lanes, strict=True)]
                    spots = spots if level else [(b, a) for a, b in spots]
                else:
                    gone = way * travel * PACES[answer](u)
                    spots = [(x + line[0] * gone, along + line[1] * gone)]
                frames.append(
                    draw_frame(
                        plain, [Pose(a.cutout, *at, big) for a, at, big in zip(actors, spots, sides, strict=True)]
                    )
                )
            rows.append(_row(side, "speed", number, frames, asked, answer, actors))
    return rows


def _sawtooth(low: float, high: float, phase: float) -> float:
    return low + (high - low) * (phase % 1)


ACTIONS = ("grows", "shrinks", "turns", "bounces", "sways", "blinks", "fades", "rests")


def actions(things: Sequence[Thing]) -> list[ClipRow]:
    """One emoji does one of eight things, over and over, from a random point of its course."""
    rows = []
    for side, size in SIZES.items():
        rng, cast = Random(f"video actions {side}"), _cast(things, side)
        for number in range(size):
            act, actors = ACTIONS[number % 8], cast.actors(rng, 1, 0)
            length, plain = rng.randint(16, 24), ground(rng, noisy=False)
            pose = Pose(
                actors[0].cutout, rng.uniform(32, 80), rng.uniform(44, 84), rng.uniform(34, 66), rng.uniform(0, 360),
                rng.uniform(0.3, 1),
            )  # fmt: skip
            first, rounds, way = rng.random(), rng.uniform(0.9, 1.6), rng.choice((-1, 1))
            frames = []
            for i in range(length):
                phase = first + rounds * i / length
                changed = {
                    "grows": {"side": _sawtooth(30, 72, phase)},
                    "shrinks": {"side": _sawtooth(72, 30, phase)},
                    "turns": {"angle": pose.angle + 360 * way * phase},
                    "bounces": {"y": pose.y + 12 - 26 * abs(sin(pi * 1.5 * phase))},
                    "sways": {"x": pose.x + 18 * sin(2 * pi * 1.2 * phase)},
                    "blinks": {"opacity": pose.opacity if (phase * 2.2) % 1 < 0.5 else 0.0},
                    "fades": {"opacity": _sawtooth(1, 0.12, phase)},
                    "rests": {},
                }[act]
                frames.append(draw_frame(plain, [pose.at(**changed)]))
            it = rng.choice((actors[0].the, "it"))
            asked = rng.choice((f"What does {it} do?", f"What is {it} up to?"))
            rows.append(_row(side, "actions", number, frames, asked, f"it {act}", actors))
    return rows


def general(things: Sequence[Thing]) -> list[ClipRow]:
    """About seventeen questions of each kind that the stand-in is taught, on clips of the mixture's held-out pictures: stop
    motion, each of a clip's eight frames shown two or three times."""
    rng, cast = Random("video general"), Cast(things, "test")
    rows: list[ClipRow] = []
    counts = dict.fromkeys(KINDS, 0)
    kinds = list(MAKERS)
    number = 0
    while min(counts.values()) < 17:
        number += 1
        make, ask = MAKERS[kinds[number % len(kinds)]]
        reel = make(cast, rng)
        clip = ask(reel, rng)
        short = {kind: counts[kind] for kind, _, _ in clip.turns if counts.get(kind, 17) < 17}
        if not short:
            continue
        kind = min(short, key=lambda k: short[k])
        _, asked, answer = rng.choice([turn for turn in clip.turns if turn[0] == kind])
        counts[kind] += 1
        held = rng.choice((2, 3))
        frames = [reel.frames[state] for state in clip.states for _ in range(held)]
        row = _row("test", "general", len(rows), frames, asked, answer, reel.actors)
        row.kind = kind
        rows.append(row)
    return rows


TASKS: dict[str, Callable[[Sequence[Thing]], list[ClipRow]]] = {
    "counting": counting,
    "motion": motion,
    "order": order,
    "speed": speed,
    "actions": actions,
    "general": general,
}
