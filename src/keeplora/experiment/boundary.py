"""A run's data as a stream without task labels, and where `keeplora.tuner.task_detection` sees its tasks begin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Subset

from keeplora.data.streams import SampleStream
from keeplora.errors import KeepLoraError
from keeplora.experiment.config import load_config
from keeplora.experiment.pictures import Collate
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import prepare
from keeplora.files import expand
from keeplora.tuner.sampling import batch_size
from keeplora.tuner.task_detection import DEFAULT_RATE, TaskDetector, check_rate

KINDS = ("abrupt", "gradual", "shuffled")


@dataclass(frozen=True)
class FoundBoundary:
    """An alarm, in samples of the whole stream: given at ``at``, for a change that came after ``onset`` of them."""

    at: int
    onset: int
    up: bool


@dataclass(frozen=True)
class BoundaryTrace:
    """What a detector made of a stream.

    Attributes:
        kind: of `KINDS`. tasks: in order. boundaries: (samples before the task begins, its name), from the second task on; where
            the change is gradual, where it begins. samples: how many there are.
        warmups: (from, to) of the samples that each found task was told from; none is judged there.
        positions, values, statistics: of each judged sample its number (from 1), what was watched, and the CUSUM over its
            threshold. alarms: in order.
    """

    kind: str
    alarm_rate: float
    tasks: tuple[str, ...]
    boundaries: tuple[tuple[int, str], ...]
    samples: int
    warmups: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]
    values: tuple[float, ...]
    statistics: tuple[float, ...]
    alarms: tuple[FoundBoundary, ...]

    def delays(self) -> list[tuple[str, int | None]]:
        """Per boundary the samples from it to its notice, the first alarm before the next boundary.

        None where no alarm came, or where the boundary lies inside a warm-up: what comes later is not told from it.
        """
        ends = [at for at, _ in self.boundaries[1:]] + [self.samples]
        out: list[tuple[str, int | None]] = []
        for (at, name), end in zip(self.boundaries, ends, strict=False):  # no boundary: no delay
            first = None if self._swallowed(at) else next((a.at for a in self.alarms if at < a.at <= end), None)
            out.append((name, None if first is None else first - at))
        return out

    def false_alarms(self) -> int:
        """Alarms that are no boundary's notice."""
        return len(self.alarms) - sum(delay is not None for _, delay in self.delays())

    def _swallowed(self, at: int) -> bool:
        """Whether a boundary lies inside a warm-up that had begun before it, not by the alarm that noticed it."""
        begun = [0, *(alarm.at for alarm in self.alarms)]  # each warm-up but the first follows an alarm
        return any(start < at < end and told <= at for (start, end), told in zip(self.warmups, begun, strict=False))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "delays": [{"task": t, "delay": d} for t, d in self.delays()],
                "false_alarms": self.false_alarms()}  # fmt: skip


def watch_run(
    path: str | os.PathLike[str], *, kind: str = "abrupt", alarm_rate: float = DEFAULT_RATE, warmup: int = 32, size: int = 8,
    ramp: int = 40, seed: int = 0, device: str = "cpu",
) -> BoundaryTrace:  # fmt: skip
    """Put a run's tasks one after another, hide where they begin, and watch them through the untouched base model.

    What is streamed is what a training run would see: every training sample once, those of a warm-up are not judged, and no
    held-out or test sample.

    Args:
        path: a run directory. kind: "abrupt"; "gradual": each task gives way to the next over ``ramp`` samples; "shuffled":
            all tasks mixed, so there is no boundary. warmup: samples that a task is told from. size: of a batch.

    Raises:
        KeepLoraError: no run directory, its data is a stream, or a number that cannot be.
    """
    check_rate(alarm_rate, "--alarm-rate")
    if kind not in KINDS:
        raise KeepLoraError(f"--stream is one of {', '.join(KINDS)}, not {kind!r}")
    if size < 1:
        raise KeepLoraError(f"--batch-size is 1 at least, got {size}")
    if warmup < 2 * size:
        raise KeepLoraError(f"--warmup is {2 * size} at least (two batches of --batch-size {size}), got {warmup}")
    if ramp < 1:
        raise KeepLoraError(f"--ramp is 1 at least, got {ramp}")
    folder = expand(path)
    if not (folder / "config.yaml").is_file():
        raise KeepLoraError(
            f"{folder} is not a run directory (no config.yaml); give the folder that `keeplora run` printed"
        )
    config = load_config(RunDirectory(folder).read_config(), {"device": device})
    setup = prepare(config)
    if odd := [task.name for task in setup.tasks if isinstance(task.train, SampleStream)]:
        raise KeepLoraError(
            f"task {odd[0]!r} is read as a stream and cannot be shuffled here; give a run with data at hand"
        )
    learner = setup.method.learner(setup.family.model, setup.tuner_config())
    parts = [setup.sets[t.name].train for t in setup.tasks]
    lengths, random = [len(part) for part in parts], Random(seed)
    if -(-warmup // size) * size >= sum(lengths):  # whole batches
        raise KeepLoraError(
            f"--warmup {warmup} takes the whole stream of {sum(lengths)} samples, so none would be judged; give fewer"
        )
    order, boundaries = _order(lengths, kind, ramp, random)
    first = setup.tasks[0]
    given = setup.kind.statistics(
        setup.kind.objective(first), setup.sets[first.name].train, config.training, learner.config, config.seed
    )
    collate = Collate() if setup.family.kind == "classification" else setup.family.join
    stream = DataLoader(Subset(ConcatDataset(parts), order), batch_size=size, collate_fn=collate)
    detector = TaskDetector(
        learner.model, learner.targets, learner.store, given["forward_fn"],
        subspace=learner.U.subspace if learner.protects else None, energy=learner.feature_energy, alarm_rate=alarm_rate,
        mask_fn=given["mask_fn"], seed=seed, trace=True,
    )  # fmt: skip
    names = tuple(task.name for task in setup.tasks)
    found = _watch(detector, iter(stream), warmup)
    starts = tuple((at, name) for at, name in zip(boundaries, names[1:], strict=False))
    return BoundaryTrace(kind, alarm_rate, names, starts, len(order), *found)


def _order(lengths: Sequence[int], kind: str, ramp: int, random: Random) -> tuple[list[int], list[int]]:
    """(indices into the tasks' sets laid end to end, where each task but the first begins)."""
    tasks, at = [], 0
    for n in lengths:
        tasks.append(random.sample(range(at, at + n), n))
        at += n
    flat = [i for task in tasks for i in task]
    if kind == "shuffled":
        random.shuffle(flat)
        return flat, []
    starts = [sum(lengths[:t]) for t in range(1, len(lengths))]
    if kind == "gradual":
        for at, before, after in zip(starts, lengths, lengths[1:], strict=False):
            half = min(ramp, before, after) // 2
            zone = range(at - half, at + half)
            # Within the zone the later task's share rises in a straight line: positions drawn by their weight.
            ours = [flat[i] for i in zone]
            old, new = ours[:half], ours[half:]
            for k, i in enumerate(zone):
                take_new = bool(new) and (not old or random.random() < (k + 0.5) / (2 * half))
                flat[i] = (new if take_new else old).pop()
        starts = [at - min(ramp, b, a) // 2 for at, b, a in zip(starts, lengths, lengths[1:], strict=False)]
    return flat, starts


def _watch(detector: TaskDetector, stream: Iterator[Any], warmup: int) -> tuple[Any, ...]:
    warmups, positions, values, statistics, alarms = [], [], [], [], []
    begun: list[Any] = []
    at = 0  # samples that are behind, those of ``begun`` not counted
    while True:
        first = begun
        while sum(map(batch_size, first)) < warmup or len(first) < 2:
            batch = next(stream, None)
            if batch is None:
                return tuple(warmups), tuple(positions), tuple(values), tuple(statistics), tuple(alarms)
            first.append(batch)
        detector.calibrate(first)
        warmups.append((at, at + sum(map(batch_size, first))))
        at, begun = warmups[-1][1], []
        pending: list[tuple[int, Any]] = []
        seen, alarm = 0, None
        for batch in stream:
            pending.append((seen, batch))
            seen += batch_size(batch)
            alarm = detector.update(batch)
            if alarm is not None:
                alarms.append(FoundBoundary(at + alarm.at, at + alarm.onset, alarm.up))
                begun = [b for start, b in pending if start >= alarm.onset]
                break
            pending = [(start, b) for start, b in pending if start + batch_size(b) > detector.watch.quiet_until]
        positions += range(at + 1, at + 1 + len(detector.values))
        values += detector.values
        statistics += detector.statistics
        at += seen - sum(map(batch_size, begun))
        if alarm is None:
            return tuple(warmups), tuple(positions), tuple(values), tuple(statistics), tuple(alarms)
