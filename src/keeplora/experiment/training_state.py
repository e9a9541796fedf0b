"""What a training loop knows at a moment, as tensors and JSON values that bring it back to that moment bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keeplora.experiment.checkpoint import CheckpointError, Snapshot
from keeplora.experiment.zero import moments


@dataclass
class TrainingLog:
    """What happened: one entry per epoch, and the epoch that was kept (from 1)."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    seconds: float = 0.0

    @property
    def data_wait(self) -> float | None:
        """Share of the epochs' time in which the model waited for its data, 0 to 1; None without an epoch."""
        seconds = sum(entry["seconds"] for entry in self.epochs)
        known = [entry["data_wait"] * entry["seconds"] for entry in self.epochs if "data_wait" in entry]
        return round(sum(known) / seconds, 4) if known and seconds else None


@dataclass
class Sums:
    """The epoch under way: Σ loss and Σ penalty over samples, samples seen, how many of them right, the last rate, its time
    and the part of it spent waiting for data."""

    loss: float = 0.0
    penalty: float = 0.0
    seen: int = 0
    right: int | None = None
    lr: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time so far in which the model waited for its data, 0 to 1."""
        return round(self.waited / self.seconds, 4) if self.seconds > 0 else 0.0


@dataclass
class LoopState:
    """Where a training loop is.

    Attributes:
        epoch: the one under way, from 1. step: steps of it that are done. done: nothing is left to train.
        best, best_score: parameters of the best epoch so far, and its validation accuracy. since_best: epochs after it.
        limit: most samples that go through the model at once. told_large: an update's size was warned of. learning_rate:
            the configured one. position: what `Batches.position` gave, where the data is a stream.
    """

    epoch: int = 1
    step: int = 0
    done: bool = False
    sums: Sums = field(default_factory=Sums)
    log: TrainingLog = field(default_factory=TrainingLog)
    best: list[Tensor] | None = None
    best_score: float | None = None
    since_best: int = 0
    limit: int | None = None
    told_large: bool = False
    learning_rate: float = 0.0
    position: Any = None

    def values(self) -> dict[str, Any]:
        """JSON values: all but `best`."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sums", "log", "best")}
        if self.position is None:  # of streams alone
            del found["position"]
        return {**found, "sums": asdict(self.sums), "log": asdict(self.log)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], best: list[Tensor] | None) -> LoopState:
        rest = {k: v for k, v in values.items() if k not in ("sums", "log")}
        return cls(**rest, sums=Sums(**values["sums"]), log=TrainingLog(**values["log"]), best=best)


Rng = tuple[dict[str, Tensor], dict[str, Any]]


def rng_state() -> Rng:
    """The random states of Python, numpy, torch and every GPU."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {"rng/torch": torch.get_rng_state(), "rng/numpy": torch.from_numpy(keys.astype(np.int64))}  # type: ignore[union-attr]
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],  # type: ignore[arg-type]
    }  # fmt: skip
    return tensors, values


def set_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Bring all random states back; a GPU that was not there then keeps its own."""
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng/torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (state := tensors.get(f"rng/cuda/{i}")) is not None:
            torch.cuda.set_rng_state(state, i)


def take_snapshot(
    state: LoopState, names: Sequence[str], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer,
    rng: Rng | None = None,
) -> Snapshot:  # fmt: skip
    """Everything that the loop needs to go on from here; the tensors are the live ones.

    The schedule has no state of its own: its rate follows from the number of steps (`resume_schedule`).
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in zip(names, parameters, strict=True)}
    if state.best is not None:
        tensors |= {f"best/{name}": value for name, value in zip(names, state.best, strict=True)}
    held = moments(optimizer)
    for name, p in zip(names, parameters, strict=True):
        tensors |= {f"optimizer/{name}/{key}": torch.as_tensor(v) for key, v in held.get(p, {}).items()}
    rng_tensors, rng_values = rng if rng is not None else rng_state()
    return {**tensors, **rng_tensors}, {"loop": state.values(), "rng": rng_values}


def restore(
    saved: Snapshot, names: Sequence[str], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> LoopState:  # fmt: skip
    """Put a snapshot into live parameters, optimiser and random states.

    Raises:
        CheckpointError: its tensors are not those of this training; nothing has been changed then.
    """
    tensors, values = saved
    try:
        has_best = any(key.startswith("best/") for key in tensors)
        for name, p in zip(names, parameters, strict=True):
            for group in ("parameter", "best") if has_best else ("parameter",):
                found = tensors[f"{group}/{name}"]
                if found.shape != p.shape or found.dtype != p.dtype:
                    raise CheckpointError(f"{name} has shape {tuple(found.shape)}, and not {tuple(p.shape)}")
        known = {f"parameter/{name}" for name in names}
        if len([key for key in tensors if key.startswith("parameter/")]) != len(known):
            raise CheckpointError("it holds other parameters")
        best = [tensors[f"best/{n}"].to(p.device) for n, p in zip(names, parameters, strict=True)] if has_best else None
        state = LoopState.from_values(values["loop"], best)
        prefix = "optimizer/"
        state_of: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(names):
            of = f"{prefix}{name}/"
            if own := {
                key[len(of) :]: t for key, t in tensors.items() if key.startswith(of) and "/" not in key[len(of) :]
            }:
                state_of[i] = own
        groups = optimizer.state_dict()["param_groups"]
        with torch.no_grad():
            for name, p in zip(names, parameters, strict=True):
                p.copy_(tensors[f"parameter/{name}"])
        optimizer.load_state_dict({"state": state_of, "param_groups": groups})
        set_rng_state(tensors, values["rng"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"it is not complete ({error})") from None
    return state


def resume_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Set the rate as after ``steps`` steps; every schedule of `make_scheduler` is a function of their number."""
    if steps:
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": steps - 1, "_step_count": steps + 1})
        scheduler.step()
