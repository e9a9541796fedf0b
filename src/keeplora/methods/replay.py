"""Experience replay on sequential LoRA: a few samples of the old tasks are kept, within a budget or as a share of them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.methods.samples import (
    chosen_samples,
    count_samples,
    is_generative,
    pack_samples,
    single_batches,
    unpack_sample,
)
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option
from keeplora.tuner.sampling import batch_size, statistics_batches, stratified_indices
from keeplora.tuner.task import TaskState

PREFIX, TEXT, SAMPLES = "replay/", "replay/text/", "replay/samples/"
"""Prefixes of what a record keeps: "replay/pixels" uint8 [K, ...], "replay/low" and "replay/high" per picture and channel,
"replay/labels" [K], and the task's tokenised prompts as "replay/text/<key>"; of a generative task, "replay/samples/..." as
`pack_samples` gives them."""


def quantise(picture: Tensor, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 picture, low, high): 256 even steps between the least and the largest value of every channel.

    Channels are the first dimension of [3, H, W], and the columns of a packed list of patches [P, D], whose last columns
    hold the grid: a column of one or two values comes back exactly. The frames of a clip are quantised each for itself, so
    that one that is absent (NaN) stays so.

    Args:
        picture: [3, H, W] or [P, D]; or a clip of them, [F, 3, H, W] or [F, P, D].
        clip: whether it is a clip.
    """
    dims = (-2,) if picture.ndim - clip == 2 else (-2, -1)
    low, high = picture.amin(dims, keepdim=True), picture.amax(dims, keepdim=True)
    levels = ((picture - low) / (high - low) * 255).nan_to_num(0.0)  # 0 / 0 where a channel is constant
    return levels.round().to(torch.uint8), low, high


def dequantise(pixels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What `quantise` took apart, within half a step; lowest and highest values are exact."""
    return torch.lerp(low, high, pixels.to(low.dtype) / 255)


def shuffled_by_class(labels: Sequence[int], generator: torch.Generator) -> list[int]:
    """All indices in random order, arranged so that every beginning holds the classes as evenly as their sizes allow.

    >>> order = shuffled_by_class([0, 0, 0, 1], torch.Generator().manual_seed(0))
    >>> sorted([0, 0, 0, 1][i] for i in order[:2])
    [0, 1]
    """
    seen: Counter[int] = Counter()
    turn: dict[int, int] = {}
    order = torch.randperm(len(labels), generator=generator).tolist()
    for i in order:
        turn[i] = seen[int(labels[i])]
        seen[int(labels[i])] += 1
    return sorted(order, key=turn.__getitem__)


def narrow(values: Tensor) -> Tensor:
    """Whole numbers in the smallest of uint8 and int32 that holds them; others as they are."""
    if values.is_floating_point() or values.dtype == torch.bool or not values.numel():
        return values
    return values.to(torch.uint8 if 0 <= int(values.min()) and int(values.max()) <= 255 else torch.int32)


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass(frozen=True)
class Memory:
    """What is in force of an old task: its prompts and the first ``samples`` of its stored pictures."""

    tensors: Mapping[str, Tensor]
    samples: int

    @property
    def prompts(self) -> dict[str, Tensor]:
        """Tokenised prompts, whole numbers as int64, as tokenisers give them."""
        found = {key[len(TEXT) :]: value for key, value in self.tensors.items() if key.startswith(TEXT)}
        whole = (torch.uint8, torch.int32)
        return {key: value.to(torch.int64) if value.dtype in whole else value for key, value in found.items()}

    @property
    def bytes(self) -> int:
        if not self.samples:
            return 0
        return sum(
            t.element_size() * (t.numel() if key.startswith(TEXT) else t[: self.samples].numel())
            for key, t in self.tensors.items()
        )

    def batch(self, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``samples`` different pictures, or all where there are fewer, with their labels and prompts."""
        chosen = torch.randperm(self.samples, generator=generator)[:samples]
        pixels, low, high, labels = (self.tensors[PREFIX + key][chosen] for key in ("pixels", "low", "high", "labels"))
        return {"pixel_values": dequantise(pixels, low, high), "labels": labels.to(torch.int64), **self.prompts}


@dataclass(frozen=True)
class ReplayOptions:
    """Settings of ``replay``."""

    budget_mb: float = option(
        16.0, "classification: megabytes (10⁶ bytes) that all old tasks' samples and prompts may take together"
    )
    share: float = option(1.0, "generation: percent of a task's samples that are kept, at least one")
    batch: int = option(
        16, "old samples per optimiser step; a generative model sees no more than its batch holds itself"
    )
    weight: float = option(1.0, "weight of their cross-entropy beside the task's own loss")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget_mb) and self.budget_mb > 0):
            raise ConfigError(f"tuner.options.budget_mb must be a finite number above 0, got {self.budget_mb!r}")
        if not 0 < self.share <= 100:
            raise ConfigError(f"tuner.options.share must lie above 0 and up to 100 percent, got {self.share!r}")
        if self.batch < 1:
            raise ConfigError(f"tuner.options.batch must be at least 1, got {self.batch!r}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"tuner.options.weight must be a finite number of at least 0, got {self.weight!r}")


class Replay(SequentialLora):
    """Sequential LoRA whose every step also sees samples of one old task, against that task's own class prompts.

    Experience replay as in Chaudhry et al. (1902.10486), "tiny episodic memories". Ours differs: the memory is a budget
    of bytes, not a number of samples, and counts all that is kept (8-bit pixels with their ranges, labels, prompts); the
    old tasks share it equally, so at task t each holds at most budget / (t − 1) bytes, the beginning of a class-balanced
    random order drawn once; and a step draws one old task, since its classes are its candidates. Records keep what a task
    was allowed when it was stored, so that the state follows from them; what is beyond its present share is not used.

    Of a generative task, ``share`` percent of the conversations are kept whole, float32 pictures as float16; a step draws
    among the samples of all old tasks alike.
    """

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    Options = ReplayOptions
    _memories: Sequence[Memory] = ()
    _samples: Sequence[tuple[Mapping[str, Tensor], int]] = ()
    """Of the open generative task: every old sample, as its task's packed tensors and its place among them."""

    @property
    def budget(self) -> int:
        """Bytes."""
        return int(self.options.budget_mb * 1_000_000)

    def _stored(self) -> list[dict[str, Tensor]]:
        """What each old task left, those that left something."""
        found = [{key: value for key, value in r.tensors.items() if key.startswith(PREFIX)} for r in self.records]
        return [tensors for tensors in found if PREFIX + "labels" in tensors]

    def packed(self) -> list[dict[str, Tensor]]:
        """What each old generative task left, for `unpack_sample`."""
        n = len(SAMPLES)
        found = [{key[n:]: v for key, v in r.tensors.items() if key.startswith(SAMPLES)} for r in self.records]
        return [tensors for tensors in found if tensors]

    def memories(self) -> list[Memory]:
        """What is in force now, per old task that has room for a sample."""
        stored, found = self._stored(), []
        for tensors in stored:
            prompts = size({key: value for key, value in tensors.items() if key.startswith(TEXT)})
            kept = len(tensors[PREFIX + "labels"])
            each = (size(tensors) - prompts) // kept
            found.append(Memory(tensors, max(0, min(kept, (self.budget // len(stored) - prompts) // each))))
        return [memory for memory in found if memory.samples]

    def _attach(self, task: OpenTask) -> nn.Module:
        if task.objective is None:
            raise KeepLoraError(
                f"task {task.name!r}: replay compares old pictures with their own prompts and needs the task's "
                "objective: give start_task(objective=...)"
            )
        if is_generative(task):
            single_batches(task)  # asked for now, needed when the task ends
        self._memories = self.memories()
        self._samples = [(packed, i) for packed in self.packed() for i in range(count_samples(packed))]
        if missing := len(self._stored()) - len(self._memories):
            warnings.warn(
                f"task {task.name!r}: {missing} old tasks have no room for a picture in their share of the replay budget; "
                "raise tuner.options.budget_mb", stacklevel=3,
            )  # fmt: skip
        model = super()._attach(task)
        self._generator = torch.Generator().manual_seed(self._seed())
        return model

    def task_state(self) -> TaskState:
        state = super().task_state()
        return TaskState(state.tensors | {"replay/generator": self._generator.get_state()}, state.values)

    def load_task_state(self, task: OpenTask, saved: TaskState) -> None:
        super().load_task_state(task, saved)
        self._generator.set_state(saved.tensors["replay/generator"])

    def _seed(self) -> int:
        return self.config.seed * 1009 + len(self.history)

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        if self._samples:
            return self._penalty_of_samples(batch)
        if not self._memories:
            return None
        memory = self._memories[int(torch.randint(len(self._memories), (), generator=self._generator))]
        old = memory.batch(self.options.batch, self._generator)
        objective = self._require_open().objective
        assert objective is not None
        logits = objective.logits(old).float()
        return self.options.weight * nn.functional.cross_entropy(logits, old["labels"].to(logits.device))

    def _penalty_of_samples(self, batch: Any) -> Tensor:
        """weight · mean cross-entropy of the answer tokens of some old samples."""
        objective: Any = self._require_open().objective
        n = min(self.options.batch, batch_size(batch))
        chosen = torch.randperm(len(self._samples), generator=self._generator)[:n].tolist()
        old = objective.join([unpack_sample(*self._samples[i]) for i in chosen])
        return self.options.weight * objective.token_losses(old).mean()

    def _remember(self, task: OpenTask, record: TaskRecord) -> None:
        assert task.objective is not None
        if is_generative(task):
            samples = pack_samples(list(chosen_samples(task, self.options.share, self._seed())))
            record.tensors |= {SAMPLES + key: value for key, value in samples.items()}
            return
        prompts = {TEXT + key: narrow(value.cpu()) for key, value in task.objective.text_batch.items()}
        sharing = 1 + len(self._stored())
        share = self.budget // sharing - size(prompts)
        first = next(self._quantised(task, 1), None)
        if first is None:
            raise ValueError(f"task {task.name!r}: replay was given no sample: the loader is empty")
        samples = share // size(first)
        if samples < 1:
            warnings.warn(
                f"replay keeps nothing of task {task.name!r}: its share of the budget is {self.budget // sharing} bytes, "
                f"but its prompts and one picture take {size(prompts) + size(first)}; raise tuner.options.budget_mb",
                stacklevel=2,
            )
            return
        kept = list(self._quantised(task, samples))
        generator = torch.Generator().manual_seed(self._seed())
        order = shuffled_by_class([int(s[PREFIX + "labels"]) for s in kept], generator)
        record.tensors |= {key: torch.stack([kept[i][key] for i in order]) for key in first} | prompts

    def _quantised(self, task: OpenTask, samples: int) -> Iterator[dict[str, Tensor]]:
        """At most ``samples`` samples, classes as even as can be, fixed by the seed, ready to be stored."""
        wanted = None
        if isinstance(task.batches, DataLoader):  # chooses before it reads, in an order of its own
            batches = statistics_batches(task.batches, samples, self._seed(), task.labels)
        else:
            batches = task.batches
            labels = [int(label) for batch in batches for label in batch["labels"]]
            wanted = set(stratified_indices(labels, samples, self._seed()))
        position = 0
        for batch in batches:
            for i in range(batch_size(batch)):
                if wanted is None or position in wanted:
                    values = batch["pixel_values"][i].detach().to("cpu", torch.float32)
                    pixels, low, high = quantise(values, clip="frames" in batch)
                    label = batch["labels"][i].to("cpu", torch.int32)
                    yield {
                        PREFIX + "pixels": pixels, PREFIX + "low": low, PREFIX + "high": high, PREFIX + "labels": label,
                    }  # fmt: skip
                position += 1

    def state_bytes(self) -> int:
        return sum(memory.bytes for memory in self.memories()) + sum(map(size, self.packed()))


register(
    Method("replay", "Experience replay", Replay, "sequential LoRA with samples of old tasks, within a budget of bytes",
           config=ONE_SCALE, learns_from_batches=True,
           state="samples of old tasks: `budget_mb` of pictures, or `share` percent of conversations",
           paper="Chaudhry et al., arXiv 1902.10486",
           search={**LEARNING_RATE, "tuner.options.weight": ("log", 1e-1, 1e1)})
)  # fmt: skip
