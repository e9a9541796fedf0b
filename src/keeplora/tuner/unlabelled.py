"""A stream of batches without task labels, cut into tasks where `keeplora.tuner.task_detection` sees a new one begin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from torch import nn

from keeplora.errors import KeepLoraError
from keeplora.tuner import ranks
from keeplora.tuner.observers import LossFn, MaskFn, attention_masks
from keeplora.tuner.sampling import batch_size
from keeplora.tuner.task_detection import DEFAULT_RATE, TaskDetector, check_rate

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner


class KeptBatches:
    """What stays of a task's batches for its statistics: at most ``most``, each as likely to stay as any other (reservoir)."""

    def __init__(self, most: int, seed: int) -> None:
        self.most = most
        self.offered = 0
        self._batches: list[Any] = []
        self._random = Random(seed)

    def add(self, batch: Any) -> None:
        self.offered += 1
        if len(self._batches) < self.most:
            self._batches.append(batch)
        elif (i := self._random.randrange(self.offered)) < self.most:
            self._batches[i] = batch

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


class StreamTask:
    """One task of a `TaskStream`. ``with task as peft_model:`` starts and finishes it, as `ContinualLearner.task` does.

    Going through it gives its batches once, as they come, and ends where the next task begins. Whoever stops earlier has
    the rest read, watched and kept for the statistics, without training on it.

    Attributes:
        name: as it is in the ledger. kept: the batches that the statistics are taken over, for whoever trains on them again.
        alarm: what ended it, counted in samples since the warm-up; None at the end of the stream.
    """

    def __init__(self, stream: TaskStream, name: str, first: list[Any], more: bool) -> None:
        self.stream, self.name = stream, name
        self.kept = KeptBatches(max(stream.keep, len(first)), seed=stream.learner.config.seed)
        self.alarm = None
        self.entered = False
        self.samples = 0
        self._first, self._more = first, more
        self._coming: Iterator[Any] = iter(())
        self._pending: list[tuple[int, int, Any]] = []
        self._detector: TaskDetector | None = None
        for batch in first:
            self.kept.add(batch)

    def __enter__(self) -> nn.Module:
        stream, learner = self.stream, self.stream.learner
        self.entered = True
        if self._more:
            self._detector = TaskDetector(
                learner.model, learner.targets, learner.store, stream.watch_fn,
                subspace=learner.U.subspace if learner.protects and stream.outside == "seen" else None,
                energy=learner.feature_energy, alarm_rate=stream.alarm_rate, shift=stream.shift,
                mask_fn=stream.mask_fn, frozen=self._without_adapter,
                seed=learner.config.seed,
            )  # fmt: skip
            self._detector.calibrate(self._first)
        model = learner.start_task(
            self.name, self.kept, stream.loss_fn, forward_fn=stream.forward_fn, mask_fn=stream.mask_fn, **stream.options
        )
        if learner._open is None or learner._open.adapter is None:
            learner.abort_task()
            raise KeepLoraError(
                "a stream without task labels needs a method that trains an adapter: the features are watched with the adapter "
                "off, and of this method's weights nothing is kept apart"
            )
        self._coming = self._batches()
        return model

    def __iter__(self) -> Iterator[Any]:
        if not self.entered:
            raise KeepLoraError(
                f"task {self.name!r} has not begun: write `with task as peft_model:` around its batches"
            )
        return self._coming

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        learner = self.stream.learner
        if kind is not None:
            learner.abort_task()
            return
        try:
            for _ in self._coming:
                pass
            self._settle(self._pending)
        except BaseException:
            learner.abort_task()
            raise
        learner.finish_task(info={"unlabelled": self._told()})

    def _batches(self) -> Iterator[Any]:
        for batch in self._first:
            self.samples += batch_size(batch)
            yield batch
        self._first, seen = [], 0
        if self._detector is None:
            return
        for batch in self.stream.source:
            n = batch_size(batch)
            self._pending.append((seen, seen + n, batch))
            seen += n
            self.alarm = self._detector.update(batch)
            if self.alarm is not None:
                onset = self.alarm.onset
                # The batch in which the change falls is of two tasks: neither takes its statistics from it.
                self.stream.begun = [b for start, _, b in self._pending if start >= onset]
                self._pending = [item for item in self._pending if item[1] <= onset]
                return
            quiet = self._detector.watch.quiet_until
            self._settle([item for item in self._pending if item[1] <= quiet])
            self._pending = [item for item in self._pending if item[1] > quiet]
            if len(self._pending) > self.kept.most:
                self._settle([self._pending.pop(0)])
            self.samples += n
            yield batch

    def _settle(self, items: list[tuple[int, int, Any]]) -> None:
        for _, _, batch in items:
            self.kept.add(batch)

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """The model as it was before the task: training must not look like a change of the data."""
        task = self.stream.learner._open
        if task is None or task.adapter is None:
            yield
            return
        with task.adapter.peft_model.disable_adapter():
            yield
        # PEFT has thawed A; `quiet_model`, around this, puts every flag back.

    def _told(self) -> dict[str, Any]:
        alarm = self.alarm
        found = None if alarm is None else {"at": alarm.at, "onset": alarm.onset, "up": alarm.up}
        return {"trained_samples": self.samples, "alarm": found, "alarm_rate": self.stream.alarm_rate,
                "warmup": self.stream.warmup, "batches": len(self.kept)}  # fmt: skip


class TaskStream:
    """The tasks of a stream, one after another, each found where the features change (`ContinualLearner.unlabelled`).

    Args:
        learner: of a method that trains an adapter. batches: gone through once. loss_fn: as in `start_task`.
        alarm_rate: false alarms per sample while nothing changes, above 0 and below 0.5.
        warmup: samples, in two batches at least, that a task is told from before it is watched.
        shift: the smallest change worth finding quickly, in standard deviations of a sample's number.
        keep: most batches of a task that stay in memory for its statistics (never fewer than its warm-up).
        outside: of what the energy is watched: "seen", the protected subspace and the task's own; or "task", its own alone, which
            sees a task that comes back sooner.
        name: the n-th task's name in the ledger, n from 1; by default "task-n".
        forward_fn, mask_fn, options: as in `start_task`. watch_fn: ``watch_fn(model, batch)``, the forward pass that is watched;
            by default ``forward_fn``, else ``loss_fn``.

    Raises:
        KeepLoraError: an argument that cannot be; several processes; ``free_modules``; a method without an adapter.

    >>> import torch
    >>> from keeplora import ContinualLearner, KeepLoraConfig
    >>> _ = torch.manual_seed(0)
    >>> learner = ContinualLearner(torch.nn.Sequential(torch.nn.Linear(8, 3)), KeepLoraConfig(
    ...     r=1, target_modules=["0"], energy_weights=0.1, energy_features=0.9))
    >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> inputs = [torch.eye(8)[4 * task] + 0.1 * torch.randn(8, 8) for task in (0, 1) for _ in range(20)]
    >>> for task in learner.unlabelled([(x, torch.randint(3, (8,))) for x in inputs], loss, warmup=64):
    ...     with task as peft_model:
    ...         for batch in task:
    ...             loss(peft_model, batch).backward()  # and an optimiser's step
    >>> [record.name for record in learner.records]
    ['task-1', 'task-2']
    """

    def __init__(
        self,
        learner: ContinualLearner,
        batches: Iterable[Any],
        loss_fn: LossFn,
        *,
        alarm_rate: float = DEFAULT_RATE,
        warmup: int = 128,
        shift: float = 1.0,
        keep: int = 64,
        outside: str = "seen",
        name: Callable[[int], str] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        watch_fn: Callable[[nn.Module, Any], Any] | None = None,
        mask_fn: MaskFn | None = None,
        **options: Any,
    ) -> None:
        check_rate(alarm_rate)
        for what, value in (("warmup", warmup), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise KeepLoraError(f"{what} must be an integer of at least 2, got {value!r}")
        if outside not in ("seen", "task"):
            raise KeepLoraError(f"outside is 'seen' (all that is protected, and the task) or 'task', got {outside!r}")
        if ranks.active():
            raise KeepLoraError(
                "a stream without task labels is learned in one process: several would see a new task begin at different batches"
            )
        if learner.free.parameters:
            raise KeepLoraError(
                "free_modules train in full beside the adapter, and what they change would look like a new task: leave them out "
                "for a stream without task labels"
            )
        self.learner, self.loss_fn, self.options = learner, loss_fn, options
        self.alarm_rate, self.warmup, self.shift, self.keep = alarm_rate, warmup, shift, keep
        self.outside = outside
        self.forward_fn, self.mask_fn = forward_fn, mask_fn or attention_masks
        self.watch_fn = watch_fn or forward_fn or loss_fn
        self.source: Iterator[Any] = iter(batches)
        self.begun: list[Any] = []
        """Batches that already belong to the next task."""
        self._name = name or (lambda i: f"task-{i}")

    def __iter__(self) -> Iterator[StreamTask]:
        while True:
            first, more = self.begun, True
            self.begun = []
            while more and (sum(map(batch_size, first)) < self.warmup or len(first) < 2):
                batch = next(self.source, None)
                more = batch is not None
                first += [batch] if more else []
            if not first:
                return
            task = StreamTask(self, self._name(len(self.learner._chain.tasks()) + 1), first, more)
            yield task
            if not task.entered:
                raise KeepLoraError(
                    f"task {task.name!r} was left out: write `with task as peft_model:` in the loop over the tasks"
                )
