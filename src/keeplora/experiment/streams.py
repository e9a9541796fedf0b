"""A stream as batches: decoded by loader processes, shuffled block by block, gone on with at the very sample where it stopped.

The main process reads the encoded samples, in an order that no number of workers changes, and the loader sends each to a
worker in place of an index; what comes back is the batch. So workers decode, and none reads a shard that another reads too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from keeplora.data.conversations import Conversation, ConversationSet
from keeplora.data.sets import Entry, PictureSet
from keeplora.data.streams import Position, Sample, SampleStream
from keeplora.data.video import Sampling
from keeplora.errors import DataError
from keeplora.experiment.several import OrNothing, place
from keeplora.models.batching import length_grouped

KEPT_STARTS = 256
"""Blocks whose starts are remembered: more than loader processes run ahead."""


def _seed(*of: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, of)).encode()).digest()[:7], "big")


class StreamOrder(Sampler[list[Sample]]):
    """Batches of samples; every pass draws a new order of the shards, and of the samples within each block.

    With several ranks each takes its share of every batch, sample r, r + n, …, so that the batches of all together are those
    of one process; with ``split_by: shards`` each rank has files of its own and its share of the batch size.

    Args:
        samples: of a pass, if fewer than the stream's. block: samples of a block; None: the buffer, as whole batches.
        grouped: whether a batch holds conversations of like length. rank, world: None: as the process group, or without one the
            environment, tells. A rank's part of a small batch may be empty.
    """

    def __init__(
        self, stream: SampleStream, batch_size: int, seed: int, *, samples: int | None = None, block: int | None = None,
        grouped: bool = False, rank: int | None = None, world: int | None = None,
    ) -> None:  # fmt: skip
        found = place() if rank is None or world is None else (rank, world)
        self.stream, self.seed, self.grouped = stream, seed, grouped
        self.samples = min(samples or len(stream), len(stream))
        self._rank, self._world = found
        self.shards = stream.settings.shards and self._world > 1
        if self.shards:
            self.samples = -(-self.samples // self._world)
            batch_size = max(1, batch_size // self._world)
        self.batch_size = batch_size
        self.block = block or batch_size * max(1, -(-stream.settings.buffer // batch_size))
        self._pass = 0
        self._skip: tuple[int, Position | None] = (0, None)
        self._starts: dict[int, Position] = {}

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return -(-self.samples // self.batch_size)

    def fast_forward(self, passes: int, batches: int, position: Position | None = None) -> None:
        """Before the first pass: go on as if so many passes had been made, and so many batches of the next.

        Args:
            position: what `position` gave there; without it the samples that are behind are read again.
        """
        self._pass, self._skip = passes, (batches, position)

    def position(self, batches: int) -> Position | None:
        """The stream's place at the start of the block in which the pass under way stands after so many batches."""
        return None if not batches else self._starts.get(batches * self.batch_size // self.block)

    def __iter__(self) -> Iterator[list[Sample]]:
        # Drawn at the first batch and not before: a loader with workers begins a pass twice, and uses the second.
        number, (skip, position) = self._pass, self._skip
        self._pass, self._skip = number + 1, (0, None)
        yield from self._go(number, skip, position)

    def _go(self, number: int, skip: int, position: Position | None) -> Iterator[list[Sample]]:
        shuffled = self.stream.settings.buffer > 0
        part = (self._rank, self._world) if self.shards else (0, 1)
        reader = self.stream.reader(_seed(self.seed, number) if shuffled else None, position, part=part)
        block = skip * self.batch_size // self.block if position is not None else 0
        skip -= block * self.block // self.batch_size
        left = self.samples - block * self.block
        self._starts = {block: reader.position}
        if left <= 0:
            return
        pool = ThreadPoolExecutor(1, "keeplora-stream")  # reads a block ahead
        try:
            coming = pool.submit(reader.take, min(self.block, left))
            while left > 0:
                found, wanted = coming.result(), min(self.block, left)
                if len(found) < wanted:
                    had = self.samples - left + len(found)
                    raise DataError(
                        f"{self.stream.name}: ends after {had} samples, and one pass is to have {self.samples}"
                        + (" on each rank" if self.shards else "")
                        + f"; set `streaming: {{samples: {had * (self._world if self.shards else 1)}}}`"
                    )
                left -= len(found)
                self._starts[block + 1] = reader.position
                self._starts.pop(block - KEPT_STARTS, None)
                if left > 0:
                    coming = pool.submit(reader.take, min(self.block, left))
                for batch in self._cut(found, _seed(self.seed, number, block) if shuffled else None):
                    if skip > 0:
                        skip -= 1
                    else:  # a rank's part of a small batch may be empty: the others wait for it all the same
                        yield batch if self.shards else batch[self._rank :: self._world]
                block += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _cut(self, found: list[Sample], seed: int | None) -> Iterator[list[Sample]]:
        """A block as batches."""
        n = self.batch_size
        if seed is None:
            yield from (found[i : i + n] for i in range(0, len(found), n))
            return
        generator = torch.Generator().manual_seed(seed)
        if self.grouped:
            lengths = [_length(sample) for sample in found]
            batches = list(length_grouped(range(len(found)), lengths, n, generator))
        else:
            order = torch.randperm(len(found), generator=generator).tolist()
            batches = [order[i : i + n] for i in range(0, len(order), n)]
        yield from ([found[i] for i in batch] for batch in batches)


def _length(sample: Sample) -> int:
    item = sample.item
    return sum(len(turn.text) for turn in item.turns) if isinstance(item, Conversation) else 0


class StreamTensors(Dataset[dict[str, Any]]):
    """The samples of a stream as items for the model: ``data[sample]``, in a loader's worker.

    Attributes:
        seed: of the order in which statistics see them.
    """

    labels = None
    videos = False
    kept = False

    def __init__(
        self, stream: SampleStream, encode: Callable[[Sample, Sampling], dict[str, Any]], seed: int, sampling: Sampling
    ):
        self.stream, self.seed, self.sampling = stream, seed, sampling
        self._encode = encode

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        return self._encode(sample, self.sampling)

    def sampled(self, sampling: Sampling) -> StreamTensors:
        """The same samples with other frames of their videos."""
        if sampling == self.sampling or not self.stream.has_videos:
            return self
        return StreamTensors(self.stream, self._encode, self.seed, sampling)

    def where(self, number: int) -> str:
        return self.stream.where(number)

    def first(self, n: int) -> list[dict[str, Any]]:
        """The first samples of the stream's own order."""
        return [self[sample] for sample in self.stream.reader(None).take(n)]


class PictureItems:
    """A stream's picture as the item that `PictureTensors` makes of one."""

    def __init__(self, family: Any, max_pixels: int) -> None:
        self._family, self._max_pixels = family, max_pixels

    def __call__(self, sample: Sample, sampling: Sampling) -> dict[str, Any]:
        assert isinstance(sample.item, Entry)
        picture = PictureSet([sample.item], [sample.label], max_pixels=self._max_pixels).picture(0)
        return {"pixel_values": self._family.preprocess(picture), "labels": sample.label, "index": sample.number}


class ConversationItems:
    """A stream's conversation as the item that `ConversationTensors` makes of one, with its answers."""

    def __init__(self, family: Any, max_pixels: int) -> None:
        self._family, self._max_pixels = family, max_pixels

    def __call__(self, sample: Sample, sampling: Sampling) -> dict[str, Any]:
        item = sample.item
        assert isinstance(item, Conversation)
        held = ConversationSet([item], max_pixels=self._max_pixels)
        encoded = self._family.encode(
            item.turns, held.pictures(0), held.clips(0, sampling), where=item.where, answers=True
        )
        return {**encoded, "index": torch.tensor([sample.number])}


class StreamLoader:
    """The first samples of a stream's shuffled order in batches, the same ones whenever it is gone through: for statistics.

    `keeplora.tuner.sampling.statistics_batches` asks for `capped`, `keeplora.tuner.memory.halved` for `halved`.
    """

    def __init__(
        self, data: StreamTensors, batch_size: int, collate: Callable[[Any], Any], *, workers: int = 0,
        samples: int | None = None, block: int | None = None,
    ) -> None:  # fmt: skip
        self.data, self.batch_size, self.collate, self.workers = data, batch_size, collate, workers
        self.samples, self.block = samples, block

    def _with(self, **more: Any) -> StreamLoader:
        values = {"workers": self.workers, "samples": self.samples, "block": self.block, **more}
        size = values.pop("batch_size", self.batch_size)
        return StreamLoader(self.data, size, self.collate, **values)

    def capped(self, samples: int) -> StreamLoader:
        """Exactly so many samples, or all where there are fewer."""
        return self._with(samples=samples)

    def halved(self) -> StreamLoader | None:
        """The same samples in batches of half the size; None at one."""
        if self.batch_size == 1:
            return None
        return self._with(batch_size=self.batch_size // 2, block=self._order().block)

    def _order(self) -> StreamOrder:
        return StreamOrder(self.data.stream, self.batch_size, self.data.seed, samples=self.samples, block=self.block)

    def __len__(self) -> int:
        return len(self._order())

    def __iter__(self) -> Iterator[Any]:
        brought = DataLoader(
            self.data, batch_sampler=self._order(), collate_fn=OrNothing(self.collate), num_workers=self.workers,  # type: ignore[arg-type]
            generator=torch.Generator(),  # none of torch's global random numbers is drawn
        )  # fmt: skip
        return (batch for batch in brought if batch is not None)


def streamed_loader(
    data: StreamTensors, order: StreamOrder, collate: Callable[[Any], Any], *, workers: int = 0
) -> DataLoader[Any]:
    """A loader of the batches of ``order``, for training."""
    return DataLoader(
        data, batch_sampler=order, collate_fn=OrNothing(collate), num_workers=workers, generator=torch.Generator(),  # type: ignore[arg-type]
        persistent_workers=workers > 0,
    )  # fmt: skip


def split_joined(part: Mapping[str, Any], size: int) -> Sequence[Mapping[str, Tensor]]:
    """A joined part of streamed conversations cannot be taken apart, and its samples are not there to be joined anew.

    Raises:
        DataError: says what to do.
    """
    raise DataError(
        f"a part of {len(part['index'])} streamed conversations does not fit the memory, and a stream cannot be asked for them "
        "again; set training.micro_batch to a smaller number"
    )
