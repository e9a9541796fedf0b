"""Pictures and videos as tensors: decoded once where memory allows, in a fixed order, with the family's own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from keeplora.data import PictureSet, TaskData
from keeplora.data.synthetic import dead_leaves, drifting
from keeplora.data.video import FrameCache, Sampling
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.order import BatchOrder, ShuffledBatches
from keeplora.experiment.several import shared
from keeplora.experiment.streams import StreamLoader, StreamOrder, StreamTensors
from keeplora.models.dual_encoder import DualEncoder, frames_present
from keeplora.tuner import ranks
from keeplora.tuner.shares import share


class TensorCache:
    """Preprocessed pictures in memory, up to a number of bytes over all sets; what does not fit is decoded again.

    Attributes:
        left: bytes that are free. full: whether something has not fitted.
    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        self.left = max_bytes
        self.full = False

    def admit(self, *tensors: Tensor) -> bool:
        """Whether ``tensors`` may be kept, all or none; counts them if so."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self.left:
            self.full = True
            return False
        self.left -= size
        return True


def worker_caches(config: ExperimentConfig) -> tuple[TensorCache, FrameCache]:
    """For tensors and for decoded frames; every loader worker has caches of its own, which share the bytes."""
    share = max(1, config.training.workers)
    return TensorCache((2 << 30) // share), FrameCache((config.video.cache_mib << 20) // share)


class PictureTensors(Dataset[dict[str, Any]]):
    """Items ``{"pixel_values": [3, H, W] float32, "labels": int, "index": int}`` of a `PictureSet`.

    ``labels`` is what the statistics passes stratify by. Of videos, "pixel_values" are [F, 3, H, W], and "frames": int is how
    many of the F places hold a frame.

    Args:
        cache: where preprocessed items are kept; None: nowhere.
        sampling: which frames of a video are read.
        frames: where decoded frames are kept that are no longer, or not yet, kept as tensors.
    """

    def __init__(
        self, pictures: PictureSet, family: DualEncoder, cache: TensorCache | None, *,
        sampling: Sampling | None = None, frames: FrameCache | None = None,
    ) -> None:  # fmt: skip
        self.pictures = pictures
        self.labels = pictures.labels
        self.sampling = sampling or Sampling()
        self._family = family
        self._cache = cache
        self._frames = frames
        self._kept: dict[int, Tensor] = {}

    @property
    def videos(self) -> bool:
        return self.pictures.medium == "video"

    @property
    def kept(self) -> bool:
        """Whether every item is in memory."""
        return len(self._kept) == len(self)

    def sampled(self, sampling: Sampling) -> PictureTensors:
        """The same items with other frames of their videos, kept in ``frames`` alone; itself where nothing would differ."""
        if sampling == self.sampling or not self.videos:
            return self
        return PictureTensors(self.pictures, self._family, None, sampling=sampling, frames=self._frames)

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, index: int) -> str:
        return self.pictures.where(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = self._clip(index) if self.videos else self._family.preprocess(self.pictures.picture(index))
            self._keep(index, pixels)
        item = {"pixel_values": pixels, "labels": self.labels[index], "index": index}
        return item | {"frames": int(frames_present(pixels.unsqueeze(0)).sum())} if self.videos else item

    def _clip(self, index: int) -> Tensor:
        # What will be kept as a tensor need not be kept as frames too.
        frames = self._frames if self._cache is None or self._cache.full else None
        clip = self.pictures.clip(index, self.sampling, frames)
        return self._family.preprocess_clip(clip.frames, self.sampling.frames)

    def _keep(self, index: int, pixels: Tensor) -> None:
        # A worker that loads pictures ends with the epoch, in which it sees each of them once: the main process keeps them.
        passing = not self.videos and get_worker_info() is not None
        if self._cache is not None and not passing and self._cache.admit(pixels):
            self._kept[index] = pixels

    def keep(self, batch: Mapping[str, Tensor]) -> None:
        """Keep what worker processes have decoded, where there is room."""
        for index, pixels in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
            if index not in self._kept:
                self._keep(index, pixels.clone())


class DrawnPictures(Dataset[dict[str, Any]]):
    """Items as those of `PictureTensors`, of pictures that belong to no task (`energy_general`); of a model of videos, clips."""

    COUNT: ClassVar[int] = 256

    def __init__(self, family: DualEncoder) -> None:
        self._family = family

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, frames = _drawn(index), self._family.clip_frames
        pixels = (
            self._family.preprocess(picture)
            if frames is None
            else self._family.preprocess_clip(drifting(picture, frames))
        )
        return {"pixel_values": pixels, "labels": 0, "index": index}


_drawn = lru_cache(maxsize=DrawnPictures.COUNT)(dead_leaves)
"""Drawn once for all tasks, and by each of several processes only its own: 50 ms and 77 KB each."""


class Collate:
    """Stacks items and adds what every batch of a task shares (its tokenised class prompts)."""

    def __init__(self, shared: Mapping[str, Tensor] | None = None) -> None:
        self.shared = dict(shared or {})

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
            "index": torch.tensor([item["index"] for item in items]),
            **({"frames": torch.tensor([item["frames"] for item in items])} if "frames" in items[0] else {}),
            **self.shared,
        }


def own_part(data: PictureTensors | StreamTensors) -> Dataset[dict[str, Any]]:
    """This process's part of a set; all of it where it is alone. A stream's loader divides by itself."""
    if isinstance(data, StreamTensors) or not ranks.active():
        return data
    return Subset(data, share(range(len(data))))


def loader(
    data: Dataset[dict[str, Any]], batch_size: int, collate: Collate, *, workers: int = 0, pin: bool = False
) -> DataLoader[Any] | StreamLoader:
    """A loader in the set's order; of a stream, in the one that its seed gives. ``pin``: into pinned memory.

    What is in memory already needs no ``workers``.
    """
    if isinstance(data, StreamTensors):
        return StreamLoader(data, batch_size, collate, workers=workers)
    workers = 0 if getattr(data, "kept", False) else workers
    return DataLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers, pin_memory=pin)


def shuffled_loader(
    data: PictureTensors, order: ShuffledBatches, collate: Collate, *, workers: int = 0, pin: bool = False
) -> DataLoader[Any]:
    """A loader of the batches of ``order``; ``pin``: into pinned memory."""
    return DataLoader(
        data, **shared(order, collate), num_workers=workers, pin_memory=pin,
        # The loader draws a seed for its workers whenever it is gone through, and not from torch's global state.
        generator=torch.Generator(),
        # They live as long as the training does: what they have decoded is there in the next epoch.
        persistent_workers=workers > 0 and data.videos,
    )  # fmt: skip


class Batches(Protocol):
    """What a training loop goes through, once per epoch. With several processes: this one's part of each batch, None where
    that is empty."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def where(self, batch: Mapping[str, Any]) -> list[str]:
        """Names of the pictures or videos of a batch, for a message to a person."""
        ...

    def split(self, batch: Mapping[str, Any], part: Mapping[str, Any], size: int) -> Sequence[Mapping[str, Any]]:
        """A part of a batch as parts of at most ``size`` samples."""
        ...

    def fast_forward(self, passes: int, batches: int, position: Any = None) -> None:
        """Before the first pass: go on as if so many passes had been made, and so many batches of the next.

        Args:
            position: what `position` gave at that moment; with it nothing is read that is behind.
        """
        ...

    def position(self, batches: int) -> Any:
        """JSON values by which a stream finds the place after so many batches of this pass; None where none is needed."""
        ...


class TaskBatches:
    """One task's samples, shuffled anew in every epoch.

    Args:
        data: the samples. order: which of them each batch holds. loader: brings them.
        splitter: ``splitter(part, size)``: a part as parts of at most ``size`` samples.
    """

    def __init__(
        self, data: Any, order: BatchOrder | StreamOrder, loader: DataLoader[Any],
        splitter: Callable[[Mapping[str, Any], int], Sequence[Mapping[str, Any]]],
    ) -> None:  # fmt: skip
        self._data, self._order, self._loader, self._splitter = data, order, loader, splitter

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        brought = self._loader
        # What workers decode of pictures is kept here, in the main process: the next epoch's workers start as copies of it and
        # find it. Once all pictures are here, no worker is needed.
        keep = brought.num_workers > 0 and isinstance(self._data, PictureTensors) and not self._data.videos
        if keep and self._data.kept:
            brought = DataLoader(
                self._data, batch_sampler=self._order, collate_fn=brought.collate_fn, pin_memory=brought.pin_memory,
                generator=brought.generator,
            )  # fmt: skip
            keep = False
        for batch in brought:
            if keep:
                self._data.keep(batch)
            yield batch

    def where(self, batch: Mapping[str, Any]) -> list[str]:
        return [self._data.where(int(i)) for i in batch["index"]]

    def split(self, batch: Mapping[str, Any], part: Mapping[str, Any], size: int) -> Sequence[Mapping[str, Any]]:
        return [part] if len(part["index"]) <= size else self._splitter(part, size)

    def fast_forward(self, passes: int, batches: int, position: Any = None) -> None:
        if isinstance(self._order, StreamOrder):
            self._order.fast_forward(passes, batches, position)
        else:
            self._order.fast_forward(passes, batches)

    def position(self, batches: int) -> Any:
        return self._order.position(batches) if isinstance(self._order, StreamOrder) else None


class MixedBatches:
    """The batches of several tasks in one shuffled order: joint training. Each batch is of one task, with its prompts."""

    def __init__(self, tasks: Sequence[Batches], *, seed: int) -> None:
        self._tasks = tasks
        self._generator = torch.Generator().manual_seed(seed)
        self._skip = 0
        self._turns: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._tasks))

    def _draw(self) -> list[int]:
        """Whose turn it is, batch by batch."""
        owner = [i for i, task in enumerate(self._tasks) for _ in range(len(task))]
        return [owner[place] for place in torch.randperm(len(owner), generator=self._generator).tolist()]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skip, self._skip = self._skip, 0
        streams = [iter(task) for task in self._tasks]
        self._turns = self._draw()
        turns = self._turns[skip:]
        for i, stream in enumerate(streams):
            if i not in turns:  # nothing of this pass is left of it: its order is passed over all the same
                next(stream, None)
        for task in turns:
            batch = next(streams[task])
            yield batch if batch is None else {**batch, "task": task}

    def where(self, batch: Mapping[str, Any]) -> list[str]:
        return self._tasks[batch["task"]].where(batch)

    def split(self, batch: Mapping[str, Any], part: Mapping[str, Any], size: int) -> Sequence[Mapping[str, Any]]:
        return self._tasks[batch["task"]].split(batch, part, size)

    def fast_forward(self, passes: int, batches: int, position: Any = None) -> None:
        for _ in range(passes):
            self._draw()
        state = self._generator.get_state()
        gone = self._draw()[:batches]
        self._generator.set_state(state)
        for i, task in enumerate(self._tasks):
            task.fast_forward(passes, gone.count(i), position[i] if position is not None else None)
        self._skip = batches

    def position(self, batches: int) -> Any:
        gone = self._turns[:batches]
        found = [task.position(gone.count(i)) for i, task in enumerate(self._tasks)]
        return None if all(place is None for place in found) else found


class ReferenceBatches:
    """Pictures of a reference set, each batch with the prompts of its own pictures' classes; another order every pass."""

    def __init__(self, family: DualEncoder, task: TaskData, data: PictureTensors, batch_size: int, seed: int) -> None:
        self._family, self._task, self._data = family, task, data
        self._order = ShuffledBatches(len(data), batch_size, seed)
        self._loader = shuffled_loader(data, self._order, Collate())

    def __len__(self) -> int:
        return len(self._loader)

    def fast_forward(self, passes: int, batches: int) -> None:
        """As of `Batches`."""
        self._order.fast_forward(passes, batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            present, own = batch["labels"].unique(return_inverse=True)
            names = [self._task.classes[i] for i in present.tolist()]
            prompts = self._family.class_prompts(names, self._task.templates[:1])
            texts = {key: value.cpu() for key, value in self._family.tokenize(prompts, names).items()}
            yield {**batch, "labels": own, **texts}
