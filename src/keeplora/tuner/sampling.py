"""Which samples the statistics are taken over, and the loader that brings them in a fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from keeplora.errors import KeepLoraError
from keeplora.tuner import shares
from keeplora.tuner.memory import halved


def stratified_indices(labels: Sequence[int], samples: int | None, seed: int) -> list[int]:
    """Indices of at most ``samples`` items, classes as even as their sizes allow; sorted, fixed by ``seed``.

    Every class gets one sample before any class gets two. ``None`` returns all indices.

    >>> sorted(stratified_indices([0, 0, 0, 0, 1], 2, seed=0))[1]
    4
    """
    n = len(labels)
    if samples is None or samples >= n:
        return list(range(n))
    return sorted(stratified_order(labels, seed)[:samples])


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """All indices in a random order, fixed by ``seed``, of which every beginning holds the classes as evenly as it can.

    >>> [[0, 0, 0, 0, 1][i] for i in stratified_order([0, 0, 0, 0, 1], seed=0)[:2]]
    [1, 0]
    """
    n = len(labels)
    generator = torch.Generator().manual_seed(seed)
    queues: dict[int, list[int]] = {}
    for i in torch.randperm(n, generator=generator).tolist():
        queues.setdefault(int(labels[i]), []).append(i)
    order = sorted(queues)
    # Where there are fewer samples than classes, which classes go without is drawn, too.
    order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    chosen: list[int] = []
    while order:
        chosen += [queues[label].pop() for label in order]
        order = [label for label in order if queues[label]]
    return chosen


def find_labels(dataset: Any) -> Sequence[int] | None:
    """Labels of a map-style dataset, from its ``labels`` or ``targets`` attribute; None if it has neither."""
    for attribute in ("labels", "targets"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return [int(label) for label in labels]
    return None


class EndableBatches:
    """Batches that whoever goes through them may end before the last: `end` takes hold at the next one.

    Attributes:
        samples: how many there are in all; None where that is not known. classes: how many of them differ in class, 1 if unknown.
        open: whether batches of it are under way.
    """

    def __init__(self, batches: Iterable[Any], samples: int | None = None, classes: int = 1) -> None:
        self._batches = batches
        self.samples, self.classes = samples, classes
        self.open = False

    def __iter__(self) -> Iterator[Any]:
        self.open = True
        for batch in self._batches:
            yield batch
            if not self.open:
                return
        self.open = False

    def end(self) -> None:
        """No further batch."""
        self.open = False

    def halved(self) -> EndableBatches | None:
        """The same samples in batches of half the size, or None (`keeplora.tuner.memory.halved`)."""
        smaller = halved(self._batches)
        return None if smaller is None else EndableBatches(smaller, self.samples, self.classes)


def statistics_batches(
    batches: Iterable[Any],
    samples: int | None,
    seed: int,
    labels: Sequence[int] | None = None,
    *,
    endable: bool = False,
) -> Iterable[Any]:
    """The batches for one pass of statistics.

    A `DataLoader` over a map-style dataset is rebuilt without shuffling and without ``drop_last``, so the pass draws
    no random number that training would have drawn, sees every sample once, and is cut by class where ``samples``
    caps it. One over an `IterableDataset` is rebuilt too: the first ``samples`` of the stream, read by one worker at
    most, since a stream that does not share itself out would come once from each. Of any other iterable, ``capped(samples)``
    is asked for where it has that; else it is taken as it comes and cut after the batch that reaches ``samples``.

    ``endable``: the pass may end early (`EndableBatches`), so the samples come in `stratified_order`, where every beginning
    stands for the whole. Of an iterable that is no such loader the order is its own, and should be a shuffled one.

    With several processes a loader's dataset is the whole set in each of them, and each gets its own part of it, none twice
    (a `DistributedSampler` would fill up with repeats); any other iterable is that process's own part already.

    Raises:
        DataError: the processes were given different sets.
    """
    loader = batches if isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset) else None
    shares.check(loader, labels)
    if loader is not None:
        dataset: Any = loader.dataset
        labels = labels if labels is not None else find_labels(dataset)
        n = len(dataset)
        if labels is not None and len(labels) != n:
            raise ValueError(f"labels has {len(labels)} entries but the loader's dataset has {n}")
        known = labels if labels is not None else [0] * n
        order = stratified_order(known, seed)[:samples] if endable else stratified_indices(known, samples, seed)
        chosen = shares.share(order)
        # A loader without a generator of its own draws from torch's global state whenever it is gone through.
        rebuilt = DataLoader(
            Subset(dataset, chosen), batch_size=loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1,
            shuffle=False, drop_last=False, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn, pin_memory=loader.pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return EndableBatches(rebuilt, len(chosen), len({int(label) for label in known})) if endable else rebuilt
    samples_here = None if samples is None else len(shares.share(range(samples)))
    if isinstance(batches, DataLoader):
        stream: Any = batches.dataset
        found: Iterable[Any] = _stream_loader(batches, stream, samples_here, seed)
    elif samples is None:
        found = batches
    else:
        capped = getattr(batches, "capped", None)
        found = capped(samples) if capped is not None else _first(batches, samples_here or 0)
    return EndableBatches(found) if endable else found


class Head(IterableDataset[Any]):
    """The first ``samples`` of a stream (None: all), from its start whenever it is gone through."""

    def __init__(self, stream: Iterable[Any], samples: int | None) -> None:
        self.stream, self.samples = stream, samples

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.stream), self.samples)


def _stream_loader(batches: DataLoader[Any], stream: Iterable[Any], samples: int | None, seed: int) -> Iterable[Any]:
    whole = batches.batch_size is None  # the stream brings batches of its own, which are counted when they come
    rebuilt: DataLoader[Any] = DataLoader(
        Head(stream, None if whole else samples), batch_size=batches.batch_size, collate_fn=batches.collate_fn,
        num_workers=min(1, batches.num_workers), worker_init_fn=batches.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return _first(rebuilt, samples) if whole and samples is not None else rebuilt


def check_repeatable(batches: Iterable[Any], what: str) -> None:
    """Refuse what can be gone through only once: the gradient pass, training and the feature pass each begin anew.

    Raises:
        KeepLoraError: an iterator or generator.
    """
    if isinstance(batches, Iterator):
        raise KeepLoraError(
            f"{what} is a {type(batches).__name__}, which can be gone through only once, and a task goes through its data "
            "several times; give a DataLoader, a list, or an object whose __iter__ begins anew"
        )


def _first(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        if seen >= samples:
            return
        yield batch
        seen += batch_size(batch)


def batch_size(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of its first tensor.

    A mapping's ``labels`` come first: a dual encoder's batch also holds class prompts, which are not samples.
    """
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "pixel_values"):
            if isinstance(batch.get(key), Tensor):
                return batch_size(batch[key])
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for item in batch:
            if isinstance(item, Tensor) and item.ndim:
                return int(item.shape[0])
        return len(batch)
    raise TypeError(f"cannot tell the number of samples in a batch of type {type(batch).__name__}")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; mappings, lists and tuples are followed.

    From pinned memory to a GPU the copies run beside the GPU's work; what reads them on it waits for them.
    """
    if isinstance(batch, Tensor):
        # The other way round, nobody waits: the host could read what has not arrived.
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return tuple(to_device(value, device) for value in batch)
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    return batch
