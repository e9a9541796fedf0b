"""The training loop of one task: the same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keeplora.experiment.config import TrainingConfig
from keeplora.experiment.kinds.base import TrainingObjective
from keeplora.experiment.optim import make_optimizer, make_scheduler
from keeplora.experiment.pictures import Batches
from keeplora.experiment.progress import Progress


@dataclass
class TrainingLog:
    """What happened: one entry per epoch, and the epoch that was kept (from 1)."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Selection:
    """Validation during training: how to measure, and what to do with it."""

    validate: Callable[[], float | None]
    best_epoch: bool
    patience: int | None


class Hooks(Protocol):
    """What a method adds to the loop (`ContinualLearner`)."""

    def penalty(self, batch: Any, logits: Any) -> Tensor | None: ...

    def after_step(self) -> None: ...


def train_task(
    model: nn.Module, objective: TrainingObjective, batches: Batches, config: TrainingConfig, *, hooks: Hooks,
    progress: Progress, on_epoch: Callable[[dict[str, Any]], None], selection: Selection | None = None,
) -> TrainingLog:  # fmt: skip
    """Train whatever in ``model`` (and the objective's head) requires a gradient.

    The towers stay in evaluation mode: their dropout is off, as in the reference, whose CLIP has none.

    Raises:
        FloatingPointError: a loss that is not finite; names epoch, step and the first pictures of the batch.
    """
    log = TrainingLog()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if objective.head is not None:
        parameters.append(objective.head)
    if not parameters:
        return log
    epochs = int(config.epochs)  # type: ignore[arg-type]  # for_task() has chosen this task's own
    optimizer = make_optimizer(parameters, config)
    scheduler = make_scheduler(optimizer, config, epochs * len(batches))
    best: tuple[float, list[Tensor]] | None = None
    since_best = 0
    started = time.perf_counter()
    model.eval()
    for epoch in range(1, epochs + 1):
        progress.phase(f"epoch {epoch}/{epochs}", len(batches))
        epoch_started = time.perf_counter()
        total, added, seen, lr = 0.0, 0.0, 0, 0.0
        right: int | None = None
        for step, batch in enumerate(batches, 1):
            optimizer.zero_grad(set_to_none=True)
            parts = objective.parts(batch)
            n = sum(map(objective.count, parts))
            for i, part in enumerate(parts):
                loss, logits = objective.part_loss(part, n)
                # A penalty belongs to the step and not to each part of its batch.
                extra = hooks.penalty(part, logits) if i == 0 else None
                total_loss = loss if extra is None else loss + extra
                if not torch.isfinite(total_loss):
                    names = ", ".join(batches.where(batch)[:3])
                    raise FloatingPointError(
                        f"task {objective.task.name!r}, epoch {epoch}, step {step}: the loss is {total_loss.item()} (samples "
                        f"{names}, …); nothing of this task is kept; lower training.learning_rate or set training.grad_clip"
                    )
                total_loss.backward()
                total += loss.item() * n
                added += extra.item() * n if extra is not None else 0.0
                if logits is not None:
                    right = (right or 0) + objective.right(logits, part)
            if config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            hooks.after_step()
            lr = float(
                optimizer.param_groups[0]["lr"]
            )  # the rate of this step, not of the one that the schedule sets next
            scheduler.step()
            seen += n
            accuracy = None if right is None else 100.0 * right / seen
            progress.advance(loss=total / seen, accuracy=accuracy)
        entry: dict[str, Any] = {"epoch": epoch, "loss": total / seen}
        if right is not None:
            entry["train_accuracy"] = 100.0 * right / seen
        entry |= {"lr": lr, "seconds": round(time.perf_counter() - epoch_started, 3)}
        if added:
            entry["penalty"] = added / seen
        if selection is not None:
            entry["validation_accuracy"] = score = selection.validate()
            progress.advance(0, validation_accuracy=score)
            if score is not None and (best is None or score > best[0]):
                best, since_best = (score, [p.detach().clone() for p in parameters]), 0
                log.best_epoch = epoch
            else:
                since_best += 1
        log.epochs.append(entry)
        on_epoch(entry)
        if selection is not None and selection.patience is not None and since_best >= selection.patience:
            progress.line(f"stopped early: no better validation accuracy for {since_best} epochs")
            break
    if selection is not None and selection.best_epoch and best is not None:
        with torch.no_grad():
            for p, value in zip(parameters, best[1], strict=True):
                p.copy_(value)
    elif selection is None or not selection.best_epoch:
        log.best_epoch = None
    log.seconds = time.perf_counter() - started
    return log
