"""Conversations as tensors: encoded once where memory allows, batched by length, with the model family's own processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from keeplora.data.conversations import ConversationSet
from keeplora.data.video import FrameCache, Sampling
from keeplora.experiment.order import BatchOrder, LengthBatches, ShuffledBatches
from keeplora.experiment.pictures import TensorCache
from keeplora.experiment.several import shared
from keeplora.experiment.streams import StreamLoader, StreamTensors
from keeplora.models.generative import Generative

Item = Mapping[str, Any]


class ConversationTensors(Dataset[dict[str, Any]]):
    """Items of a `ConversationSet` as batches of one, with their ``index``.

    Args:
        answers: with the answers and their labels, to be trained on; else the prompt alone, to be answered.
        sampling: which frames of a video are read.
        frames: where decoded frames are kept.
    """

    def __init__(
        self, conversations: ConversationSet, family: Generative, cache: TensorCache, *, answers: bool,
        sampling: Sampling | None = None, frames: FrameCache | None = None,
    ) -> None:  # fmt: skip
        self.conversations = conversations
        self.labels = conversations.labels
        self.answers = answers
        self.sampling = sampling or Sampling()
        self._family, self._cache, self._frames = family, cache, frames
        self._kept: dict[int, dict[str, Tensor]] = {}

    def sampled(self, sampling: Sampling) -> ConversationTensors:
        """The same items with other frames of their videos; itself where that makes no difference."""
        if sampling == self.sampling or not self.conversations.has_videos:
            return self
        return ConversationTensors(
            self.conversations, self._family, self._cache, answers=self.answers, sampling=sampling, frames=self._frames
        )

    @property
    def pinned(self) -> bool:
        """Whether batches lie in pinned memory, from which they are copied to a GPU while it computes."""
        return self._family.device.type == "cuda"

    def __len__(self) -> int:
        return len(self.conversations)

    def where(self, index: int) -> str:
        return self.conversations.where(index)

    @property
    def lengths(self) -> list[int]:
        """Characters of each conversation: near enough to its tokens to bring like to like, without encoding it."""
        return [
            sum(len(turn.text) for turn in self.conversations.conversation(i).turns) for i in range(len(self))
        ]  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._kept.get(index)
        if item is None:
            conversation = self.conversations.conversation(index)
            turns = conversation.turns if self.answers else conversation.prompt_turns
            pictures = self.conversations.pictures(index)
            clips = self.conversations.clips(index, self.sampling, self._frames)
            item = dict(self._family.encode(turns, pictures, clips, where=conversation.where, answers=self.answers))
            if self._cache.admit(*item.values()):
                self._kept[index] = item
        return {**item, "index": torch.tensor([index])}


class Parts:
    """A collate function: the items of a step as joined parts of at most ``size``."""

    def __init__(self, join: Callable[[Sequence[Item]], dict[str, Tensor]], size: int | None) -> None:
        self._join, self._size = join, size

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        size = self._size or len(items)
        parts = [self._join(items[i : i + size]) for i in range(0, len(items), size)]
        return {"parts": parts, "index": torch.cat([part["index"] for part in parts])}


def ordered_loader(
    data: ConversationTensors | StreamTensors, batch_size: int, collate: Callable[[Any], Any], workers: int
) -> DataLoader[Any] | StreamLoader:
    """A loader in the set's order; of a stream, in the one that its seed gives."""
    if isinstance(data, StreamTensors):
        return StreamLoader(data, batch_size, collate, workers=workers)
    return DataLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers, pin_memory=data.pinned)


def chosen_loader(
    data: ConversationTensors, batches: list[list[int]], collate: Callable[[Any], Any], workers: int
) -> DataLoader[Any]:
    """A loader of exactly these batches."""
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=data.pinned)


def training_order(data: ConversationTensors, batch_size: int, *, seed: int, grouped: bool) -> BatchOrder:
    """A new random order every epoch; ``grouped`` brings items of like length together."""
    if grouped:
        return LengthBatches(data.lengths, batch_size, seed)
    return ShuffledBatches(len(data), batch_size, seed)


def training_loader(
    data: ConversationTensors, order: BatchOrder, collate: Callable[[Any], Any], *, workers: int
) -> DataLoader[Any]:
    """A loader of the batches of ``order``."""
    return DataLoader(
        data, **shared(order, collate), num_workers=workers, pin_memory=data.pinned,
        # The loader's own generator keeps it from drawing on torch's global one, which methods draw from.
        generator=torch.Generator(),
        # Workers live as long as the task: what they have decoded is there in the next epoch.
        persistent_workers=workers > 0,
    )  # fmt: skip


def split_conversations(
    data: ConversationTensors, join: Callable[[Sequence[Item]], dict[str, Tensor]], part: Item, size: int
) -> list[dict[str, Tensor]]:
    """The samples of a joined part, joined again as parts of at most ``size``."""
    indices = part["index"].tolist()
    return [join([data[i] for i in indices[start : start + size]]) for start in range(0, len(indices), size)]
