"""From candidate pictures to train and test: no duplicate, near-duplicate or item on two sides."""

from __future__ import annotations

from collections import defaultdict

from pack_pictures import Picture, draw, near_pairs
from pack_tasks import PackSet

SLACK = 1.3
"""Chosen with wider limits than the tests', so that encoding cannot bring two pictures back under them."""

Split = dict[str, list[Picture]]


def unlike(candidates: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
    """One picture of each cluster of near-duplicates over all sets: the first that its set's order gives.

    Two that look alike and bear different classes of one set are both left out: no one could tell them apart.
    """
    flat = [(name, picture) for name, pictures in candidates.items() for picture in pictures]
    earlier: dict[int, list[int]] = defaultdict(list)
    doubtful: set[int] = set()
    for i, j in near_pairs([picture.image for _, picture in flat], SLACK):
        earlier[j].append(i)
        if flat[i][0] == flat[j][0] and flat[i][1].class_name != flat[j][1].class_name:
            doubtful |= {i, j}
    kept: dict[str, list[Picture]] = {name: [] for name in candidates}
    alive: set[int] = set()
    for index, (name, picture) in enumerate(flat):
        if index not in doubtful and not alive.intersection(earlier[index]):
            alive.add(index)
            kept[name].append(picture)
    return kept


def split(task: PackSet, pictures: list[Picture]) -> Split:
    """Whole items go to test until it has a third of the class (or its most), the others to train."""
    sides: Split = {"train": [], "test": []}
    by_class: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        by_class[picture.class_name][picture.item].append(picture)
    for class_name, items in sorted(by_class.items()):
        total = sum(len(group) for group in items.values())
        wanted = task.test if not task.train else min(task.test, round(total / 3))
        test: list[Picture] = []
        train: list[Picture] = []
        for item in sorted(items, key=lambda name: draw(f"{task.name} {class_name} {name}")):
            group = sorted(items[item], key=lambda p: draw(f"{p.origin} {p.item} {p.image.tobytes().hex()}"))
            room = wanted - len(test)
            # an item of many pictures would fill a test set alone
            if group[0].side:
                (test if group[0].side == "test" else train).extend(group)
                continue
            (test if room > 0 and len(group) <= max(room, 2) else train).extend(group)
        if not task.train:
            train = []
        for side, found, most in (("train", train, task.train), ("test", test, task.test)):
            sides[side] += found[:most]
    return sides
