"""One training step: the gradient of a whole batch, in as many parts as the memory holds, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError, TrainingError
from keeplora.experiment.kinds.base import TrainingObjective
from keeplora.experiment.pictures import Batches
from keeplora.tuner import ranks
from keeplora.tuner.memory import first_line, release_cached


class Hooks(Protocol):
    """What a method adds to the loop (`ContinualLearner`)."""

    penalty_of_batch: ClassVar[bool]

    def penalty(self, batch: Any, logits: Any) -> Tensor | None: ...

    def after_step(self) -> None: ...

    def largest_update(self) -> tuple[str, float] | None: ...


@dataclass
class Tally:
    """What a step adds to its epoch's sums, part by part, each times the samples of the batch."""

    samples: int
    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    right: int | None = None


def add_up(
    parameters: Sequence[nn.Parameter], tally: Tally | None, error: Exception | None, stop: bool
) -> tuple[Tally, bool]:
    """With several processes: the gradients of their parts become that of the batch, and their tallies its tally.

    Each rank's gradient is of the mean over its own part; weighted by the parts' sizes they add up to that of the mean over
    the batch. The weights add up to 1, so a penalty that every part has taken in once counts once.

    Args:
        tally: of this rank's part; None where that is empty or failed. error: why it failed. stop: this rank is to stop.

    Returns:
        The batch's tally, and whether any rank is to stop.

    Raises:
        Exception: ``error`` where it was given; on the other ranks RankError, which tells of it.
    """
    what, own = "a training step", tally or Tally(0)
    numbers = [own.samples, sum(own.losses), sum(own.penalties), own.right or 0]
    flags = [error is not None, stop, bool(own.penalties), own.right is not None]
    *sums, failed, stopped, penalised, counted = ranks.totals(what, *numbers, *map(float, flags))
    if failed:
        with ranks.together(what):
            if error is not None:
                raise error
    n = int(sums[0])
    held = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    flat = [held] + [
        (torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1).to(torch.float32) for p in parameters
    ]
    flat[1:] = [g * own.samples for g in flat[1:]]
    device = parameters[0].device
    total = ranks.total(what, torch.cat([part.to(device) for part in flat]))
    there, rest = total[: len(parameters)].tolist(), total[len(parameters) :]
    for p, found, g in zip(parameters, there, rest.split([p.numel() for p in parameters]), strict=True):
        p.grad = (g / max(n, 1)).reshape(p.shape).to(p.device, p.dtype) if found else None
    whole = Tally(n, [sums[1]], [sums[2]] if penalised else [], int(sums[3]) if counted else None)
    return whole, bool(stopped)


class Gradients:
    """Forward and backward passes of batches.

    Where the GPU's memory does not suffice, the parts of a batch are halved, and stay so for the rest of the task; the
    gradient is still that of the whole batch, since every part's losses are divided by the batch's number.

    Args:
        limit: most samples of a part; None: as the objective gives them.
        tell: gets a sentence where the limit has changed.
        in_step: several processes hold the model together: all go through it equally often, whatever their parts, and none
            cuts its parts smaller.
    """

    def __init__(
        self, objective: TrainingObjective, batches: Batches, hooks: Hooks, *, limit: int | None = None,
        tell: Callable[[str], None], in_step: bool = False,
    ) -> None:  # fmt: skip
        self.limit, self.in_step = limit, in_step
        self._objective, self._batches, self._hooks, self._tell = objective, batches, hooks, tell

    def add(self, batch: Mapping[str, Any] | None, where: str, forget: Callable[[], None]) -> Tally:
        """Leave the batch's gradient in the parameters.

        Args:
            batch: None where this process has no part of it, which may be where processes go `in_step`.
            where: task, epoch and step, for a message. forget: takes all gradients away.

        Raises:
            TrainingError: a loss that is not finite. KeepLoraError: not even one sample fits the memory.
        """
        if self.in_step:
            forget()
            return self._add_in_step(batch, where)
        assert batch is not None
        while True:
            parts = self._parts(batch)
            forget()
            try:
                return self._add(batch, parts, where)
            except torch.OutOfMemoryError as error:
                told = first_line(error)
            # Out here nothing holds the graph any more, so that its memory can be used again.
            forget()
            release_cached()
            largest = max(len(part["index"]) for part in parts)
            if largest <= 1:
                raise KeepLoraError(
                    f"{where}: not even one sample fits the memory ({told}); use smaller pictures, a lower tuner.r, "
                    "training.gradient_checkpointing or a larger GPU"
                )
            self.limit = -(-largest // 2)
            self._tell(
                f"{where}: the memory did not hold {largest} samples at once; from here on the task's batches go through "
                f"the model in parts of at most {self.limit}, and their gradients add up to those of the batch"
            )

    def _add_in_step(self, batch: Mapping[str, Any] | None, where: str) -> Tally:
        parts = [] if batch is None else self._objective.parts(batch)
        numbers = ranks.exchange("a training step", len(parts))
        spare = parts[-1] if parts else None
        if min(numbers) == 0:
            lent = ranks.agreed("a training step", spare, max(range(len(numbers)), key=numbers.__getitem__))
            spare = spare if parts else lent
        tally = Tally(0) if batch is None else self._add(batch, parts, where)
        for _ in range(max(numbers) - len(parts)):  # along with those that have more; it adds nothing
            assert spare is not None
            loss, _logits = self._objective.part_loss(spare, 1)
            (loss * 0.0).backward()
        return tally

    def _parts(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        parts = self._objective.parts(batch)
        if self.limit is None:
            return parts
        return [small for part in parts for small in self._batches.split(batch, part, self.limit)]

    def _add(self, batch: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], where: str) -> Tally:
        objective = self._objective
        counts = [objective.count(part) for part in parts]
        n = sum(counts)
        tally = Tally(n)
        shared = self._hooks.penalty_of_batch and self.limit is not None
        for i, part in enumerate(parts):
            loss, logits = objective.part_loss(part, n)
            # A penalty belongs to the step and not to each part of its batch, unless it is made of the batch itself.
            extra = self._hooks.penalty(part, logits) if i == 0 or shared else None
            if extra is not None and shared:
                extra = extra * (counts[i] / n)
            total = loss if extra is None else loss + extra
            total.backward()
            # Read only now: a number read before would have a GPU wait, after the forward pass, for this process.
            if not torch.isfinite(total):
                names = ", ".join(self._batches.where(batch)[:3])
                raise TrainingError(f"{where}: the loss is {total.item()} (samples {names}, …)")
            tally.losses.append(loss.item() * n)
            if extra is not None:
                tally.penalties.append(extra.item() * n)
            if logits is not None:
                tally.right = (tally.right or 0) + objective.right(logits, part)
        return tally


def check_gradients(
    names: Sequence[str], parameters: Sequence[nn.Parameter], clip: float | None, where: str, samples: Sequence[str]
) -> float:
    """Clip the gradients to the norm ``clip``, and refuse them before a weight moves where they are not finite.

    Returns:
        Their norm, before it was clipped. One number is read from the device, whatever the number of parameters.

    Raises:
        TrainingError: NaN or infinity; names the parameter.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    value = float(norm)
    if not math.isfinite(value):
        held = [(name, p.grad) for name, p in zip(names, parameters, strict=True) if p.grad is not None]
        bad = [name for name, g in held if not bool(torch.isfinite(g).all())]
        what = f"the gradient of {bad[0]} holds NaN or infinity" if bad else "the gradients' norm is beyond float32"
        raise TrainingError(f"{where}: {what} (samples {', '.join(samples[:3])}, …)")
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return value
