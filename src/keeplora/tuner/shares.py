"""Each process's part of a set: exact, without the repeats that a `DistributedSampler` fills the last round with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from keeplora.errors import DataError
from keeplora.tuner import ranks

T = TypeVar("T")


def share(items: Sequence[T], rank: int | None = None, size: int | None = None) -> Sequence[T]:
    """Every ``size``-th item from ``rank`` on: the parts of all ranks are disjoint and together everything.

    Args:
        rank, size: of this process, unless given. A rank beyond the number of items gets none.

    >>> [share(range(5), rank, 3) for rank in range(3)]
    [range(0, 5, 3), range(1, 5, 3), range(2, 5, 3)]
    """
    return items[ranks.rank() if rank is None else rank :: ranks.size() if size is None else size]


def check(loader: DataLoader[Any] | None, labels: Sequence[int] | None) -> None:
    """Refuse what could not be divided exactly; does nothing where there is one process.

    Args:
        loader: over the whole set, or None where the data is no such loader.

    Raises:
        DataError: a set that is not the same on every rank, by its length, its labels or its first item.
    """
    if not ranks.active():
        return
    what = "dividing the data"
    with ranks.together(what):
        told = None if loader is None else _describe(loader.dataset, labels)
    found = ranks.exchange(what, told)
    if (odd := next((r for r, other in enumerate(found) if (other is None) != (found[0] is None)), None)) is not None:
        raise DataError(
            f"rank 0 was given {_kind(found[0])} and rank {odd} {_kind(found[odd])}: give every rank the same kind"
        )
    if found[0] is None:
        return
    for i, word in enumerate(("length", "labels", "first sample")):
        values = [other[i] for other in found if other is not None]
        if None in values:  # items that are drawn anew each time tell nothing
            continue
        if (bad := next((r for r, value in enumerate(values) if value != values[0]), None)) is not None:
            raise DataError(
                f"the set of rank {bad} is not that of rank 0 (another {word}): a DataLoader's dataset must be the whole set "
                "on every rank, and is divided here; data that is divided already goes in as an iterable of batches, or as "
                "an IterableDataset"
            )


def _kind(told: object) -> str:
    return "an iterable of batches" if told is None else "a DataLoader over a set"


def _describe(dataset: Any, labels: Sequence[int] | None) -> tuple[int, str | None, str | None]:
    """(length, digest of the labels, digest of the first item), None for what is not there or not the same twice."""
    n = len(dataset)
    told = None if labels is None else hashlib.sha256(np.asarray(list(labels), dtype=np.int64).tobytes()).hexdigest()
    if n == 0:
        return 0, told, None
    with torch.random.fork_rng(devices=[]):  # what it draws is not taken from the training
        once, again = _digest(dataset[0]), _digest(dataset[0])
    return n, told, once if once == again else None


def _digest(item: Any) -> str | None:
    """SHA-256 of an item's values; None where it holds something else than numbers, text and tensors."""
    total = hashlib.sha256()

    def add(value: Any) -> bool:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            total.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, str | int | float | bool | bytes | None):
            total.update(repr(value).encode())
        elif isinstance(value, Mapping):
            return all(add(str(key)) and add(value[key]) for key in value)
        elif isinstance(value, list | tuple):
            return all(add(one) for one in value)
        else:
            return False
        return True

    return total.hexdigest() if add(item) else None
