"""Training splits that are read while they are learned from: never downloaded as a whole, never all in memory.

A pass over a stream goes through its shards (files) in an order drawn by a seed, takes them as blocks of ``buffer`` samples,
and shuffles each block. So a position is small: the shard, the row, the state of the reader at the start of a block
(`datasets.IterableDataset.state_dict`), and how much of the block is behind. `datasets`' own shuffle buffer forgets what it holds
when it is resumed; a block is read again, and a resumed pass brings the very samples that an undisturbed one brings.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keeplora.data.conversations import Conversation
from keeplora.data.pictures import PictureError, check_picture
from keeplora.data.remote import retried, told
from keeplora.data.sets import ByteSource, Entry
from keeplora.data.spec import SourceSpec, StreamSpec
from keeplora.errors import ConfigError, DataError, KeepLoraError

Position = dict[str, Any]
"""Where a pass stands, as JSON values."""
ROWS = 1 << 32
"""A sample's number is shard · ROWS + row."""
LOOK_AFTER = 1_000
"""Samples of a pass before the share of unusable ones is judged."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it comes out of a stream, encoded: small enough to be sent to a loader process.

    Attributes:
        number: of the sample in the stream. item: a picture or a conversation. label: its class; 0 for conversations.
    """

    number: int
    item: Entry | Conversation
    label: int = 0


class SampleStream:
    """A split that is streamed.

    Args:
        dataset: a `datasets.IterableDataset`; it is taken shard by shard.
        make: ``make(row, key, where)`` turns a row into an `Entry` with its class, or a `Conversation`.
        spec: the task's description, with ``stream.samples`` known.
        name: for messages. origin: JSON values that tell this data from other data. videos: whether samples hold videos.

    Attributes:
        skipped: unusable samples that were left out so far (``on_error: skip``).
    """

    kind = "stream"
    medium = "picture"

    def __init__(
        self, dataset: Any, make: Callable[[Mapping[str, Any], str, str], tuple[Entry | Conversation, int]], spec: SourceSpec,
        *, name: str, origin: Any, videos: bool = False,
    ) -> None:  # fmt: skip
        assert spec.stream is not None
        if spec.stream.samples is None:
            raise ConfigError(
                f"{name}: does not tell how many samples it has, and a stream cannot be counted; set `streaming: {{samples: "
                f"N}}`, the number of samples of one epoch"
            )
        self.dataset, self.make, self.spec, self.name, self.has_videos = dataset, make, spec, name, videos
        self.settings: StreamSpec = spec.stream
        self.samples: int = spec.stream.samples
        self.shards = int(dataset.num_shards)
        self.skipped = 0
        self._origin = origin

    def __len__(self) -> int:
        """Samples of one pass, over all ranks."""
        return self.samples

    def __repr__(self) -> str:
        return f"SampleStream({self.samples} samples of {self.name}, {self.shards} shards)"

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what the stream is: its origin, columns and settings. The samples themselves are not read for it."""
        columns = {name: str(kind) for name, kind in (self.dataset.features or {}).items()}
        value = [self._origin, columns, self.shards, self.samples, self.settings.buffer]
        return hashlib.sha256(json.dumps(["stream", value], sort_keys=True).encode()).hexdigest()

    def where(self, number: int) -> str:
        """The name of a sample for a message to a person."""
        return f"{self.name}, shard {number // ROWS}, row {number % ROWS}"

    def reader(self, seed: int | None, position: Position | None = None, *, part: tuple[int, int] = (0, 1)) -> Reader:
        """A pass.

        Args:
            seed: of the order of the shards; None: their own order. position: what an earlier reader of the same pass gave.
            part: (rank, number of ranks), of which this reader goes through the shards of one.

        Raises:
            DataError: there are fewer shards than ranks.
        """
        order = list(range(self.shards))
        if seed is not None:
            order = torch.randperm(self.shards, generator=torch.Generator().manual_seed(seed)).tolist()
        rank, world = part
        if self.shards < world:
            raise DataError(
                f"{self.name}: has {self.shards} shard(s) for {world} ranks, so some would have none; set `split_by: "
                "samples`, or write the data as more files"
            )
        return Reader(self, order[rank::world], position)


class Reader:
    """One pass over a stream's shards, from its start or from a `position`."""

    def __init__(self, stream: SampleStream, order: Sequence[int], position: Position | None) -> None:
        self._stream, self._order = stream, order
        self._start: Position = {"place": 0, "row": 0, "state": None, **(position or {})}
        self._rows: Any = None
        self._open: Any = None

    @property
    def position(self) -> Position:
        """After what `take` has brought so far."""
        return dict(self._start)

    def take(self, n: int) -> list[Sample]:
        """The next samples, fewer than ``n`` at the end of the stream. Where the network fails, they are read again.

        Raises:
            DataError: the rows cannot be read, or too many of them are of no use.
        """
        try:
            found, skipped = retried(lambda: self._from_start(n))
        except KeepLoraError:
            raise
        except Exception as error:  # the library and what lies below it raise nearly anything
            at = self._start
            shard = self._order[min(at["place"], len(self._order) - 1)]
            raise DataError(
                f"{self._stream.name}, shard {shard}, after row {at['row']}: cannot be read on ({told(error)}); check the "
                "network; a run goes on from its checkpoint with `keeplora resume`"
            ) from error
        self._stream.skipped += skipped
        self._judge(len(found) + skipped)
        return found

    _seen = 0
    _lost = 0

    def _judge(self, read: int) -> None:
        self._seen += read
        spec = self._stream.spec
        if self._seen >= LOOK_AFTER and self._lost > spec.max_skipped * self._seen:
            raise DataError(
                f"{self._stream.name}: {self._lost} of {self._seen} samples cannot be used, more than the share of "
                f"{spec.max_skipped:g} that `max_skipped` lets pass; mend them, or raise `max_skipped`"
            )

    def _from_start(self, n: int) -> tuple[list[Sample], int]:
        """``n`` samples from where the last call ended; an error leaves that place as it was."""
        at = dict(self._start)
        found: list[Sample] = []
        skipped = 0
        try:
            while len(found) < n and at["place"] < len(self._order):
                shard = self._order[at["place"]]
                if self._rows is None:
                    self._open = self._stream.dataset.shard(num_shards=self._stream.shards, index=shard)
                    if at["state"] is not None:
                        self._open.load_state_dict(at["state"])
                    self._rows = iter(self._open)
                row = next(self._rows, None)
                if row is None:
                    self._rows = self._open = None
                    at = {"place": at["place"] + 1, "row": 0, "state": None}
                    continue
                number = shard * ROWS + at["row"]
                at["row"] += 1
                sample = self._made(row, number)
                if sample is None:
                    skipped += 1
                else:
                    found.append(sample)
            if self._open is not None:
                at["state"] = self._open.state_dict()
        except BaseException:
            self._rows = self._open = None
            raise
        self._start = at
        self._lost += skipped
        return found, skipped

    def _made(self, row: Mapping[str, Any], number: int) -> Sample | None:
        """The row as a sample; None where it is of no use and may be left out."""
        stream, where = self._stream, self._stream.where(number)
        try:
            item, label = stream.make(row, f"{number // ROWS}/{number % ROWS}", where)
            if stream.spec.on_error == "skip":
                sources = (item.source,) if isinstance(item, Entry) else item.pictures
                for source in sources:
                    check_picture(source.read(), where, max_pixels=stream.spec.max_pixels, full=True)
        except PictureError:
            if stream.spec.on_error != "skip":
                raise
            return None
        return Sample(number, item, label)


@dataclass(frozen=True, slots=True)
class SpanBytes:
    """A stretch of a file: one of the pictures that `Spool` keeps."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as handle:
            handle.seek(self.start)
            return handle.read(self.size)


class Spool:
    """Encoded pictures of a streamed test split in one local file, for they are gone through after every task.

    The file lies where the system keeps temporary ones (``TMPDIR``), and goes with this process.
    """

    def __init__(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="keeplora-stream-")
        self._file = Path(folder.name, "pictures").open("xb")  # noqa: SIM115
        weakref.finalize(self, folder.cleanup)
        _spools.append(self)

    def keep(self, source: ByteSource) -> SpanBytes:
        data = source.read()
        start = self._file.tell()
        self._file.write(data)
        return SpanBytes(Path(self._file.name), start, len(data))

    def done(self) -> None:
        self._file.close()


_spools: list[Spool] = []  # they live as long as the process


def spooled(samples: Iterable[Sample]) -> list[Sample]:
    """The samples with their pictures and videos in one local file."""
    spool = Spool()
    kept = []
    for sample in samples:
        item = sample.item
        if isinstance(item, Entry):
            item = replace(item, source=spool.keep(item.source))
        else:
            item = replace(
                item, pictures=tuple(map(spool.keep, item.pictures)), videos=tuple(map(spool.keep, item.videos))
            )
        kept.append(replace(sample, item=item))
    spool.done()
    return kept


def read_split(
    dataset: Any,
    make: Callable[[Mapping[str, Any], str, str], tuple[Entry | Conversation, int]],
    spec: SourceSpec,
    name: str,
) -> list[Sample]:
    """A streamed test or validation split, read once onto the local disk, at most ``test_samples`` of it."""
    assert spec.stream is not None
    most = spec.stream.most_test
    whole = replace(spec, stream=replace(spec.stream, samples=most or 1 << 62), on_error="raise")
    reader = SampleStream(dataset, make, whole, name=name, origin=None).reader(None)

    def samples() -> Iterable[Sample]:
        left = most or 1 << 62
        while left and (found := reader.take(min(256, left))):
            left -= len(found)
            yield from found

    kept = spooled(samples())
    if not kept:
        raise DataError(f"{name}: holds no samples; name another split")
    return kept


__all__ = ["Position", "Reader", "Sample", "SampleStream", "SpanBytes", "Spool", "read_split", "spooled"]
