"""A run in several processes (``torchrun``, ``accelerate launch``): every process goes through the same run, rank 0 writes.

Training is data-parallel: each process computes the gradient of its part of every batch (`SharedOrder`), and their weighted
sum is the gradient of the whole batch (`keeplora.experiment.training_step.add_up`). There is no wrapper around the model, since
what trains is small: one flat sum per step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from keeplora.errors import ConfigError, RankError
from keeplora.experiment.checkpoint import Checkpoints, Identity, Snapshot
from keeplora.experiment.order import BatchOrder
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.sharded import check_launcher
from keeplora.tuner import ranks
from keeplora.tuner.shares import share


def place() -> tuple[int, int]:
    """(rank, number of ranks) of this process, as the process group tells; without one, RANK and WORLD_SIZE; else (0, 1).

    Raises:
        ConfigError: the two do not fit each other.
    """
    if ranks.active():
        return ranks.rank(), ranks.size()
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, told)
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={told[0]} and WORLD_SIZE={told[1]} in the environment do not fit each other; unset both"
        )
    return rank, world


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Inside, the processes that a launcher has started are one run; does nothing in a process that is alone, or joined.

    Args:
        device: "cpu" joins them over gloo even where there are GPUs.

    Raises:
        ConfigError: the launcher asks for something that a run does not do.
        RankError: another process failed or is gone.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if launched:
        check_launcher()
    if not launched or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        with _leaving():
            yield
        return
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        with _leaving():
            yield
    finally:
        torch.distributed.destroy_process_group()
        PartialState._reset_state()


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """What leaves the block by itself is told to the ranks that will wait for this one; a lost rank becomes a sentence."""
    try:
        yield
    except BaseException as error:
        if (cause := ranks.blame(error)) is not error:
            raise cause from error
        raise


class Follower(RunDirectory):
    """The run directory as other ranks than the first have it: read, and never written."""

    def write_config(self, config: Mapping[str, Any]) -> None: ...

    def write_environment(self, environment: Mapping[str, Any]) -> None: ...

    def write_data(self, tasks: Sequence[Mapping[str, Any]]) -> None: ...

    def set_status(self, **changes: Any) -> None: ...

    def write_results(self, results: Mapping[str, Any]) -> None: ...

    def append_event(self, event: Mapping[str, Any]) -> None: ...

    def cut_events(self, tasks_done: int) -> None: ...

    def replace_evaluations(self, events: Sequence[Mapping[str, Any]]) -> None: ...


class NoCheckpoints(Checkpoints):
    """Rank 0 keeps the task under way; the others have the same state."""

    def write(self, identity: Identity, steps: int, snapshot: Snapshot) -> Path:
        return self.path

    def drop_finished(self, done: int) -> None: ...

    def clear(self) -> None: ...


def checkpoints(run: Path) -> Checkpoints:
    """The checkpoints of a run, as this rank has them."""
    return Checkpoints(run) if ranks.is_first() else NoCheckpoints(run)


def open_directory(
    opener: Callable[[str | os.PathLike[str]], RunDirectory], path: str | os.PathLike[str]
) -> RunDirectory:
    """What ``opener`` makes of ``path``, locked, on rank 0; on the others, when it is there, a `Follower`.

    Raises:
        KeepLoraError: what ``opener`` raises, on every rank. RankError: the folder is not on this rank's file system.
    """
    opened: list[RunDirectory] = []
    ranks.first("opening the run directory", lambda: opened.append(opener(path)))
    try:
        with ranks.together("opening the run directory"):
            if opened:
                return opened[0]
            follower = Follower(path)
            if not follower.path.is_dir():
                raise RankError(
                    f"{follower.path} is not there for rank {ranks.rank()}: the machines of a run share one file system"
                )
            return follower
    except BaseException:
        if opened:
            opened[0].close()
        raise


class SharedOrder(Sampler[list[int]]):
    """This rank's part of each batch of ``order``; the part of a small batch may be empty."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.order:
            yield list(share(batch))


class OrNothing:
    """A collate function that makes None of an empty part."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        return self.collate(items) if items else None


def shared(order: BatchOrder, collate: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """The `DataLoader` arguments that bring this rank's part of each batch; the batches as they are where it is alone."""
    if not ranks.active():
        return {"batch_sampler": order, "collate_fn": collate}
    return {"batch_sampler": SharedOrder(order), "collate_fn": OrNothing(collate)}
