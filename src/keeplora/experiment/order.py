"""The order in which samples come: another one every pass, fixed by a seed, and entered at any place without reading a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import RandomSampler, Sampler

from keeplora.models.batching import length_grouped


class BatchOrder(Sampler[list[int]]):
    """Batches of indices; every pass draws a new order when it begins.

    Args:
        n: how many samples there are. seed: of the orders.

    >>> order = ShuffledBatches(5, 2, seed=0)
    >>> first, second = list(order), list(order)
    >>> again = ShuffledBatches(5, 2, seed=0)
    >>> again.fast_forward(passes=1, batches=2)
    >>> list(again) == second[2:]
    True
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size = n, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._skip = 0

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Drawn at the first batch and not before: a loader with workers begins a pass twice, and uses the second.
        skip, self._skip = self._skip, 0
        yield from self._draw()[skip:]

    def _draw(self) -> Sequence[list[int]]:
        raise NotImplementedError

    def fast_forward(self, passes: int, batches: int) -> None:
        """Before the first pass: go on as if so many passes had been made, and so many batches of the next."""
        for _ in range(passes):
            self._draw()
        self._skip = batches


class ShuffledBatches(BatchOrder):
    """All samples in a random order, cut into batches; the last may be smaller.

    The orders are those of torch's own shuffling loader with a generator of its own and no persistent workers.
    """

    def _draw(self) -> Sequence[list[int]]:
        # Torch's loader draws a seed for its workers from the same generator, every time it is gone through.
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        order = list(RandomSampler(range(self.n), generator=self._generator)) if self.n else []
        return [order[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)]


class LengthBatches(BatchOrder):
    """Batches of items of like length."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), batch_size, seed)
        self._lengths = list(lengths)

    def _draw(self) -> Sequence[list[int]]:
        return list(length_grouped(range(self.n), self._lengths, self.batch_size, self._generator))
