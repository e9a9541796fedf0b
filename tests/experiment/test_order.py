"""The order of samples: torch's own, and the same from any place in it."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from keeplora.experiment.order import BatchOrder, LengthBatches, ShuffledBatches
from keeplora.experiment.pictures import MixedBatches, TaskBatches

LENGTHS = [3, 9, 4, 4, 1, 7, 12, 5, 5, 2, 8]
N = len(LENGTHS)


def made(kind: str) -> BatchOrder:
    return ShuffledBatches(N, 3, seed=5) if kind == "shuffled" else LengthBatches(LENGTHS, 3, seed=5)


class Seen(torch.utils.data.Dataset):
    """Says which samples were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> int:
        self.read.append(i)
        return i


def brought(data: Seen, order: BatchOrder, workers: int = 0) -> TaskBatches:
    loader = DataLoader(
        data, batch_sampler=order, collate_fn=lambda items: {"index": torch.tensor(items)}, num_workers=workers,
        generator=torch.Generator(),
    )  # fmt: skip
    return TaskBatches(data, order, loader, lambda part, size: [part])


def passes(batches, count: int = 3) -> list[list[list[int]]]:
    return [[batch["index"].tolist() for batch in batches] for _ in range(count)]


def test_the_orders_are_those_of_torch_s_shuffling_loader():
    loader = DataLoader(list(range(N)), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))
    expected = [[batch.tolist() for batch in loader] for _ in range(3)]
    order = made("shuffled")
    assert [list(order) for _ in range(3)] == expected


@pytest.mark.parametrize("kind", ["shuffled", "by length"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_has_every_sample_once_with_and_without_workers(kind, workers):
    found = passes(brought(Seen(), made(kind), workers))
    assert [sorted(chain.from_iterable(each)) for each in found] == [list(range(N))] * 3
    assert found[0] != found[1] != found[2]
    again = made(kind)
    assert found == [list(again) for _ in range(3)]


@pytest.mark.parametrize("kind", ["shuffled", "by length"])
@pytest.mark.parametrize(("gone", "batches"), [(0, 0), (0, 2), (0, 4), (1, 0), (1, 3), (2, 1), (2, 4)])
def test_it_goes_on_from_any_place_and_reads_nothing_that_it_skips(kind, gone, batches):
    whole = passes(brought(Seen(), made(kind)))
    data, order = Seen(), made(kind)
    later = brought(data, order)
    later.fast_forward(gone, batches)
    assert data.read == []
    left = passes(later, 3 - gone)
    assert left == [whole[gone][batches:], *whole[gone + 1 :]]
    assert data.read == list(chain.from_iterable(chain.from_iterable(left)))
    assert len(later) == 4  # of a whole pass: the schedule counts with it


@pytest.mark.parametrize(("gone", "batches"), [(0, 5), (1, 0), (1, 8), (2, 3)])
def test_mixed_batches_go_on_with_every_task_at_its_own_place(gone, batches):
    def mixed() -> MixedBatches:
        return MixedBatches([brought(Seen(), made("shuffled")), brought(Seen(), made("by length"))], seed=1)

    def told(batches, count):
        return [[(batch["task"], batch["index"].tolist()) for batch in batches] for _ in range(count)]

    whole = told(mixed(), 3)
    assert len({str(each) for each in whole}) == 3
    later = mixed()
    later.fast_forward(gone, batches)
    assert told(later, 3 - gone) == [whole[gone][batches:], *whole[gone + 1 :]]
