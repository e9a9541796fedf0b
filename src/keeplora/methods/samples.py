"""Samples of a generative task as tensors of a record: batches of one, of whatever shapes, kept compactly and given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from keeplora.tuner.learner import OpenTask
from keeplora.tuner.sampling import statistics_batches, stratified_indices

VALUES, SHAPES, KIND = "values/", "shapes/", "kind/"
"""Per key of a sample: all samples' values in one row, their shapes [n, dimensions] (−1: the sample has no such key), and an
empty tensor of the type that the values had."""

Sample = Mapping[str, Tensor]


def is_generative(task: OpenTask) -> bool:
    """Whether the task's batches are conversations, which cannot be cut into samples as pictures can."""
    return getattr(task.objective, "kind", "classification") == "generation"


def compact(values: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them, exactly; float32 and float64 in float16, unless it overflows."""
    if values.dtype == torch.bool or not values.numel():
        return values
    if values.is_floating_point():
        half = values.to(torch.float16) if values.dtype in (torch.float32, torch.float64) else values
        return half if bool(torch.isfinite(half).all()) else values
    low, high = int(values.min()), int(values.max())
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return values.to(dtype)
    return values


def pack_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """All tensors of the samples, ragged ones too, as few flat ones; what is no tensor is left out.

    >>> packed = pack_samples([{"ids": torch.tensor([[7, 300]])}, {"ids": torch.tensor([[5]])}])
    >>> packed["values/ids"], packed["shapes/ids"].tolist()
    (tensor([  7, 300,   5], dtype=torch.int16), [[1, 2], [1, 1]])
    >>> unpack_sample(packed, 1)
    {'ids': tensor([[5]])}
    """
    packed: dict[str, Tensor] = {}
    keys = {key: value.ndim for sample in samples for key, value in sample.items() if isinstance(value, Tensor)}
    for key, dimensions in keys.items():
        found = [sample.get(key) for sample in samples]
        values = [value.detach().cpu() for value in found if value is not None]
        if any(value.ndim != dimensions for value in values):
            raise ValueError(f"the samples' {key!r} have different numbers of dimensions")
        packed[VALUES + key] = compact(torch.cat([value.reshape(-1) for value in values]))
        shapes = [[-1] * dimensions if value is None else list(value.shape) for value in found]
        packed[SHAPES + key] = torch.tensor(shapes, dtype=torch.int32).reshape(len(samples), dimensions)
        packed[KIND + key] = values[0].new_empty(0)
    return packed


def count_samples(packed: Mapping[str, Tensor]) -> int:
    """How many samples `pack_samples` was given."""
    return next((len(shapes) for key, shapes in packed.items() if key.startswith(SHAPES)), 0)


def unpack_sample(packed: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Sample ``i`` as it was, its float32 values rounded to float16."""
    sample = {}
    for name, shapes in packed.items():
        if not name.startswith(SHAPES):
            continue
        key = name[len(SHAPES) :]
        present = (shapes >= 0).all(1)
        if not present[i]:
            continue
        sizes = shapes.long().prod(1) * present
        start, n = int(sizes[:i].sum()), int(sizes[i])
        values = packed[VALUES + key][start : start + n].to(packed[KIND + key].dtype)
        sample[key] = values.reshape(shapes[i].tolist())
    return sample


def single_batches(task: OpenTask) -> Iterable[Any]:
    """The task's batches of one sample; `ValueError` where `start_task` was given none."""
    if task.single_batches is None:
        raise ValueError(
            f"task {task.name!r}: this method takes a generative model's samples one by one: give "
            "start_task(single_batches=...), batches of one sample that can be gone through more than once"
        )
    return task.single_batches


def chosen_samples(task: OpenTask, percent: float, seed: int) -> Iterator[Sample]:
    """``percent`` of the task's samples, at least one, kinds of question as even as can be, fixed by the seed."""
    batches = single_batches(task)
    if isinstance(batches, DataLoader):  # chooses before it reads
        total = len(batches.dataset)  # type: ignore[arg-type]
        yield from statistics_batches(batches, _share(total, percent), seed, task.labels)
        return
    total = sum(1 for _ in batches)
    labels = task.labels if task.labels is not None else [0] * total
    wanted = set(stratified_indices(labels, _share(total, percent), seed))
    yield from (sample for i, sample in enumerate(batches) if i in wanted)


def _share(total: int, percent: float) -> int:
    return max(1, round(total * percent / 100))
