"""The classic class-incremental split: the classes of one dataset, cut into tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keeplora.data.classes import in_order
from keeplora.data.spec import RawTask
from keeplora.errors import DataError


def part_of(raw: RawTask, index: int, of: int, seed: int | None) -> RawTask:
    """Keep group ``index`` (from 1) of the classes cut into ``of`` consecutive groups, in every split.

    Sizes differ by one at most, the first groups being the larger. The classes come in the source's order, or where
    there is a ``seed`` in ``numpy.random.RandomState(seed).permutation`` of it, as in iCaRL's and later code (which
    use 1993); within the task they are numbered in that order.

    Raises:
        DataError: a group would have fewer than two classes.

    >>> from keeplora.data.sets import Entry, HeldBytes
    >>> raw = RawTask({"train": [Entry(c, c, c, HeldBytes(b"")) for c in "abcde"]}, class_order=list("abcde"))
    >>> [part_of(raw, index, 2, None).class_order for index in (1, 2)]
    [['a', 'b', 'c'], ['d', 'e']]
    """
    order = raw.class_order
    if order is None:
        order = in_order(entry.label for entries in raw.splits.values() for entry in entries)
    count = len(order)
    if 2 * of > count:
        most = f"set the number of tasks to {count // 2} or less" if count > 1 else "name a dataset with more classes"
        raise DataError(f"{count} classes cannot be cut into {of} tasks of two classes or more; {most}")
    if not 1 <= index <= of:
        raise ValueError(f"part {index} of {of}")
    if seed is not None:
        order = [order[i] for i in np.random.RandomState(seed).permutation(count)]
    size, larger = divmod(count, of)
    start = (index - 1) * size + min(index - 1, larger)
    kept = order[start : start + size + (index <= larger)]
    names = set(kept)
    splits = {split: [entry for entry in entries if entry.label in names] for split, entries in raw.splits.items()}
    return replace(raw, splits=splits, class_order=kept)
