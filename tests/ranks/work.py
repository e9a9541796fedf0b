"""What the processes of the tests do: each function runs on every rank, and alone in the single process it is compared with."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from keeplora import ContinualLearner
from keeplora.tuner import ranks
from tests.tuner.blocks import Samples, config, loss_fn, make_net, per_sample

SIZES = (11, 7)
"""Samples of the two tasks: no number of ranks divides them."""
BATCH = 4


class Shares:
    """Batches of this rank's part of a set, as a loop of one's own would divide it."""

    def __init__(self, data: Samples, indices: list[int]) -> None:
        self.data, self.indices = data, indices

    def __iter__(self):
        for i in range(0, len(self.indices), BATCH):
            chosen = self.indices[i : i + BATCH]
            yield torch.stack([self.data.x[j] for j in chosen]), torch.tensor([self.data.labels[j] for j in chosen])


def train_whole(model: nn.Module, data: Samples, steps: int = 6) -> None:
    """Full-batch training, each rank on its part, gradients averaged by DDP; the part's loss is weighted so that their mean
    over the ranks is the mean over the samples."""
    rank, size = ranks.rank(), ranks.size()
    model.eval()  # dropout draws other numbers in every process
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(
        parameters, lr=0.3, momentum=0.9
    )  # AdamW would blow rounding of a zero gradient up to a step
    x, labels = data.x[rank::size], torch.tensor(data.labels)[rank::size]
    for _ in range(steps):
        optimizer.zero_grad()
        (per_sample(wrapped, (x, labels)).sum() * size / len(data)).backward()
        optimizer.step()


def told(learner: ContinualLearner) -> dict[str, Any]:
    """What must be the same on all ranks and in one process."""
    return {
        "W": {name: learner.store.current(name).clone() for name in learner.store.names},
        "U": {name: learner.U[name].clone() for name in learner.U},
        "A": {f"{r.name}/{n}": f.A for r in learner.records for n, f in r.factors.items()},
        "B": {f"{r.name}/{n}": f.B for r in learner.records for n, f in r.factors.items()},
        "explained": {f"{r.name}/{n}": v for r in learner.records for n, v in r.explained.items()},
        "trace": {f"{r.name}/{n}": v for r in learner.records for n, v in r.trace.items()},
        "used": [r.used for r in learner.records],
        "time": [r.time for r in learner.records],
        "info": [dict(r.info) for r in learner.records],
    }


def two_tasks(folder: str, feed: str = "loader", **settings: Any) -> dict[str, Any]:
    """Two tasks with a ledger, the data given in one of the ways that a loop has them."""
    learner = ContinualLearner(make_net(), config(**settings), ledger=Path(folder, "ledger"))
    for task, n in enumerate(SIZES):
        data = Samples(n, seed=task)
        batches = feeding(feed, data)
        general = DataLoader(Samples(13, seed=9), batch_size=BATCH) if settings.get("energy_general") else None
        with learner.task(f"task {task}", batches, per_sample if task else loss_fn, general_batches=general) as model:
            train_whole(model, data)
    return told(learner)


def two_tasks_so(folder: str, feed: str, settings: dict[str, Any]) -> dict[str, Any]:
    return two_tasks(folder, feed, **settings)


def feeding(feed: str, data: Samples) -> Any:
    rank, size = ranks.rank(), ranks.size()
    if feed == "loader":
        return DataLoader(data, batch_size=BATCH, shuffle=True)
    if feed == "sampler":
        return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data) if size > 1 else None)
    if feed == "accelerate":
        from accelerate import Accelerator

        return Accelerator(cpu=True).prepare(DataLoader(data, batch_size=BATCH, shuffle=True))
    if feed == "uneven":  # rank 0 has one sample, the last rank all the others, those between none
        cut = {0: range(1) if size > 1 else range(len(data)), size - 1: range(1 if size > 1 else 0, len(data))}
        return Shares(data, list(cut.get(rank, [])))
    raise ValueError(feed)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def failing(what: str, folder: str) -> Any:
    """A first task in which rank 1 (or the disk of rank 0) fails in one way or another; then, where all lived, a second try."""
    learner = ContinualLearner(make_net(), config(), ledger=Path(folder, "ledger"))
    data = Samples(SIZES[0], seed=0)
    broken = ranks.rank() == 1

    def loss(model: nn.Module, batch: Any) -> Any:
        if broken and what == "statistics":
            raise ValueError("this picture cannot be read")
        if broken and what == "killed in the statistics":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)

    if what == "disk" and ranks.is_first():

        def full(record: Any, **_: Any) -> Any:
            raise OSError(28, "No space left on device", "ledger")

        assert learner._ledger is not None
        learner._ledger.append = full  # type: ignore[method-assign]
    said = ""
    try:
        with learner.task("first", DataLoader(data, batch_size=BATCH), loss) as model:
            if broken and what == "killed in training":
                os.kill(os.getpid(), signal.SIGKILL)
            if broken and what == "raises in training":
                raise ValueError("the loop has a fault")
            if what == "not wrapped":
                x, labels = data.x[ranks.rank() :: 2], torch.tensor(data.labels)[ranks.rank() :: 2]
                loss_fn(model, (x, labels)).backward()
                torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
            else:
                train_whole(model, data)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    untouched = all(torch.equal(a, b) for a, b in zip(learner.model.parameters(), make_net().parameters(), strict=True))
    if what in ("statistics", "not wrapped"):  # the group still stands: go on
        broken = False
        with learner.task("second", DataLoader(data, batch_size=BATCH), loss) as model:
            train_whole(model, data)
    return said, untouched, [r.name for r in learner.records]


def slow(folder: str) -> str:
    """Rank 1 hangs; rank 0 gives up after the time that the environment says."""
    os.environ[ranks.TIMEOUT] = "0.08"
    learner = ContinualLearner(make_net(), config())
    if ranks.rank() == 1:
        time.sleep(12)
        return ""
    try:
        learner.start_task("first", DataLoader(Samples(4), batch_size=BATCH), loss_fn)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(what: str) -> str:
    """The sentence that all ranks get for what they were given."""
    rank = ranks.rank()
    try:
        if what == "weights":
            ContinualLearner(make_net(seed=rank), config())
        elif what == "config":
            ContinualLearner(make_net(), config(r=2 + rank))
        else:
            learner = ContinualLearner(make_net(), config())
            data: Any = DataLoader(Samples(4, seed=rank), batch_size=BATCH)  # a part each, wrongly in a plain loader
            if what == "kinds" and rank:
                data = list(data)
            if what == "lengths":
                data = DataLoader(Samples(4 + rank), batch_size=BATCH)
            learner.start_task("first", data, loss_fn)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def history(folder: str) -> list[Any]:
    """Rollback, remove, restore, save and reopen, on all ranks."""
    two_tasks(folder)
    learner = ContinualLearner.from_pretrained(Path(folder), make_net(), append=True)
    out = [told(learner)["W"]]
    learner.remove("task 0")
    out.append(told(learner)["W"])
    learner.restore("task 0")
    learner.rollback("task 0")
    out.append(told(learner)["W"])
    data = Samples(9, seed=5)
    with learner.task("task 2", DataLoader(data, batch_size=BATCH), loss_fn) as model:
        train_whole(model, data)
    out.append(told(learner)["W"])
    learner.save_pretrained(Path(folder, "saved"))
    again = ContinualLearner.from_pretrained(Path(folder, "saved"), make_net())
    out.append(told(again)["W"])
    return out


def budgeted(folder: str) -> dict[str, Any]:
    """With a limit on the bases, gradients in place of features, and one method after the other's heart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return two_tasks(folder, max_basis_bytes=2400, keep_covariance=True)
