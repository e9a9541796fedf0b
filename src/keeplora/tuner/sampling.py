"""Which samples the statistics are taken over, and the loader that brings them in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from keeplora.tuner import shares


def stratified_indices(labels: Sequence[int], samples: int | None, seed: int) -> list[int]:
    """Indices of at most ``samples`` items, classes as even as their sizes allow; sorted, fixed by ``seed``.

    Every class gets one sample before any class gets two. ``None`` returns all indices.

    >>> sorted(stratified_indices([0, 0, 0, 0, 1], 2, seed=0))[1]
    4
    """
    n = len(labels)
    if samples is None or samples >= n:
        return list(range(n))
    generator = torch.Generator().manual_seed(seed)
    queues: dict[int, list[int]] = {}
    for i in torch.randperm(n, generator=generator).tolist():
        queues.setdefault(int(labels[i]), []).append(i)
    order = sorted(queues)
    # Where there are fewer samples than classes, which classes go without is drawn, too.
    order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    chosen: list[int] = []
    while len(chosen) < samples:
        for label in order:
            if queues[label] and len(chosen) < samples:
                chosen.append(queues[label].pop())
    return sorted(chosen)


def find_labels(dataset: Any) -> Sequence[int] | None:
    """Labels of a map-style dataset, from its ``labels`` or ``targets`` attribute; None if it has neither."""
    for attribute in ("labels", "targets"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return [int(label) for label in labels]
    return None


def statistics_batches(
    batches: Iterable[Any], samples: int | None, seed: int, labels: Sequence[int] | None = None
) -> Iterable[Any]:
    """The batches for one pass of statistics.

    A `DataLoader` over a map-style dataset is rebuilt without shuffling and without ``drop_last``, so the pass draws
    no random number that training would have drawn, sees every sample once, and is cut by class where ``samples``
    caps it. Any other iterable is taken as it comes and cut after ``samples``.

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
        chosen = shares.share(stratified_indices(labels if labels is not None else [0] * n, samples, seed))
        # A loader without a generator of its own draws from torch's global state whenever it is gone through.
        return DataLoader(
            Subset(dataset, chosen), batch_size=loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1,
            shuffle=False, drop_last=False, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    return batches if samples is None else _first(batches, len(shares.share(range(samples))))


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
    """The batch with its tensors on ``device``; mappings, lists and tuples are followed."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return tuple(to_device(value, device) for value in batch)
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    return batch
