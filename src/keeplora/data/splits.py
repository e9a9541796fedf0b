"""Stratified splits and caps that depend on names and a seed alone: the same on every machine and in every order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar

from keeplora.errors import ConfigError, DataError


class Samples(Protocol):
    """A `PictureSet` or a `ConversationSet`."""

    labels: list[int]

    @property
    def keys(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def digest(self, index: int) -> str: ...
    def subset(self, indices: Sequence[int]) -> Any: ...


S = TypeVar("S", bound=Samples)


def _rank(seed: int, name: str) -> bytes:
    """A pseudo-random sort key. A hash, not a generator: adding one picture does not reshuffle all others."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _quotas(counts: dict[Hashable, int], fraction: float, at_least: int) -> dict[Hashable, int]:
    """How many to take of each class: largest remainders, total ``round(fraction * n)``, at most all but one."""
    exact = {c: fraction * n for c, n in counts.items()}
    quota = {c: min(max(int(exact[c]), at_least), counts[c] - 1) for c in counts}
    wanted = max(1, int(fraction * sum(counts.values()) + 0.5))
    rest = wanted - sum(quota.values())
    for c in sorted(counts, key=lambda c: (-(exact[c] - int(exact[c])), str(c))):
        if rest <= 0:
            break
        if quota[c] < counts[c] - 1 and exact[c] > quota[c]:
            quota[c] += 1
            rest -= 1
    return quota


def holdout(
    keys: Sequence[str],
    labels: Sequence[Hashable],
    fraction: float,
    seed: int,
    *,
    groups: Sequence[str] | None = None,
    at_least: int = 0,
) -> list[int]:
    """Indices of a stratified sample that leaves every class at least one group.

    Args:
        keys: stable names; the choice depends on them, not on their order.
        labels: class of each.
        fraction: share of each class, in (0, 1).
        seed: another seed, another sample.
        groups: pictures of one group stay together (identical pictures must not be torn apart).
        at_least: pictures taken of every class that can spare them.
    """
    names = list(groups) if groups is not None else list(keys)
    by_class: dict[Hashable, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, label in enumerate(labels):
        by_class[label][names[index]].append(index)
    counts: dict[Hashable, int] = {c: sum(map(len, g.values())) for c, g in by_class.items()}
    quota = _quotas(counts, fraction, at_least)
    taken: list[int] = []
    for label, members in by_class.items():
        # the smallest key names a group: the same split whatever the group's name is made of
        order = sorted(members.values(), key=lambda group: _rank(seed, min(keys[i] for i in group)))
        left = quota[label]  # less than the class has, so at least one group stays
        for group in order:
            if len(group) <= left:
                taken += group
                left -= len(group)
    return sorted(taken)


def cap_per_class(keys: Sequence[str], labels: Sequence[Hashable], limit: int | None, seed: int) -> list[int]:
    """Indices of at most ``limit`` pictures of each class, chosen by name and seed, in their old order."""
    if limit is None:
        return list(range(len(keys)))
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    return sorted(i for group in by_class.values() for i in sorted(group, key=lambda i: _rank(seed, keys[i]))[:limit])


def spread(pictures: S, limit: int | None, seed: int) -> S:
    """At most ``limit`` samples, the classes in turn, chosen by name and seed; in their old order.

    >>> from keeplora.data.sets import Entry, HeldBytes, PictureSet
    >>> entries = [Entry(f"{i}.png", "a", f"{i}.png", HeldBytes(bytes([i]))) for i in range(10)]
    >>> spread(PictureSet(entries, [0] * 8 + [1] * 2), 4, seed=0).labels
    [0, 0, 1, 1]
    """
    if limit is None or limit >= len(pictures):
        return pictures
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(pictures.labels):
        by_class[label].append(index)
    keys = pictures.keys
    turns = [
        (turn, _rank(seed, keys[i]), i)
        for group in by_class.values()
        for turn, i in enumerate(sorted(group, key=lambda i: _rank(seed, keys[i])))
    ]
    return pictures.subset(sorted(i for *_, i in sorted(turns)[:limit]))


def split_validation(pictures: S, fraction: float, seed: int) -> tuple[S, S]:
    """Split a training set into (train, validation), stratified by class; no class loses its last picture.

    Pictures of a class with the same bytes go to the same side, and so do conversations about the same pictures. The
    split depends on names and the seed, not on the order.

    Raises:
        ConfigError: ``fraction`` is not between 0 and 1.
        DataError: no class has two different pictures, so that nothing can be held out.

    >>> from keeplora.data.sets import Entry, HeldBytes, PictureSet
    >>> entries = [Entry(f"{i}.png", "a", f"{i}.png", HeldBytes(bytes([i]))) for i in range(10)]
    >>> train, validation = split_validation(PictureSet(entries, [0] * 10), 0.2, seed=0)
    >>> len(train), len(validation)
    (8, 2)
    """
    if isinstance(fraction, bool) or not 0.0 < fraction < 1.0:
        raise ConfigError(f"validation is {fraction!r}: give a fraction between 0 and 1")
    groups = [pictures.digest(i) for i in range(len(pictures))]
    held = holdout(pictures.keys, pictures.labels, fraction, seed, groups=groups)
    if not held:
        raise DataError(
            f"no picture can be held out for validation among {len(pictures)}: give every class more pictures, "
            "or a larger fraction"
        )
    chosen = set(held)
    return pictures.subset([i for i in range(len(pictures)) if i not in chosen]), pictures.subset(held)
