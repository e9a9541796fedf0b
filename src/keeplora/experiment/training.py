"""The training loop of one task: the same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from keeplora.errors import TrainingError
from keeplora.experiment.checkpoint import CheckpointError, Keeper, Snapshot
from keeplora.experiment.config import TrainingConfig
from keeplora.experiment.interrupt import STOP
from keeplora.experiment.kinds.base import TrainingObjective
from keeplora.experiment.optim import make_optimizer, make_scheduler
from keeplora.experiment.pictures import Batches
from keeplora.experiment.progress import Progress
from keeplora.experiment.training_state import (
    LoopState,
    Rng,
    Sums,
    TrainingLog,
    restore,
    resume_schedule,
    rng_state,
    take_snapshot,
)
from keeplora.experiment.training_step import Gradients, Hooks, Tally, add_up, check_gradients
from keeplora.experiment.zero import ZeroOptimizer, stage
from keeplora.tuner import ranks
from keeplora.tuner.sharding import is_sharded

LARGE_UPDATE = 1.0
"""‖s B A‖_F / ‖W₀‖_F beyond which a warning is due: the update outweighs the weights that it is added to."""
LOOK_EVERY = 50
"""Steps between two looks at the size of the update; the end of an epoch is looked at as well."""


@dataclass(frozen=True)
class Selection:
    """Validation during training: how to measure, and what to do with it."""

    validate: Callable[[], float | None]
    best_epoch: bool
    patience: int | None


def train_task(
    model: nn.Module, objective: TrainingObjective, batches: Batches, config: TrainingConfig, *, hooks: Hooks,
    progress: Progress, on_epoch: Callable[[dict[str, Any]], None], selection: Selection | None = None,
    keeper: Keeper | None = None, warn: Callable[[str], None] | None = None,
) -> TrainingLog:  # fmt: skip
    """Train whatever in ``model`` (and the objective's head) requires a gradient.

    The towers stay in evaluation mode: their dropout is off, as in the reference, whose CLIP has none.

    Args:
        keeper: saves the loop's state, and may hold a saved one: then the loop goes on from there, and ends with the same
            bits as if it had never stopped.
        warn: gets what a person should know of the training; None: a line of the progress.

    Raises:
        TrainingError: a loss or gradient that is not finite, before it reaches a weight; names epoch, step and the first
            samples of the batch.
        CheckpointError: the saved state is not of this training.
    """
    loop = _Loop(model, objective, batches, config, hooks, progress, on_epoch, selection, keeper, warn or progress.line)
    return loop.run() if loop.parameters else TrainingLog()


class _Loop:
    def __init__(
        self, model: nn.Module, objective: TrainingObjective, batches: Batches, config: TrainingConfig, hooks: Hooks,
        progress: Progress, on_epoch: Callable[[dict[str, Any]], None], selection: Selection | None,
        keeper: Keeper | None, warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.model, self.objective, self.batches, self.config, self.hooks = model, objective, batches, config, hooks
        self.progress, self.on_epoch, self.selection, self.keeper, self.warn = (
            progress,
            on_epoch,
            selection,
            keeper,
            warn,
        )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if objective.head is not None:
            named.append(("head", objective.head))
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.epochs = int(config.epochs)  # type: ignore[arg-type]  # for_task() has chosen this task's own
        self.rate = float(config.learning_rate)  # type: ignore[arg-type]
        self.state = LoopState(learning_rate=self.rate)
        self.divided: ZeroOptimizer | None = None

    # ---- the whole ----------------------------------------------------------------------------------------------

    def run(self) -> TrainingLog:
        if not stage():
            self.optimizer = self._make_optimizer(self.parameters)
            return self._run()
        self.optimizer = self.divided = divided = ZeroOptimizer(self.parameters, self._make_optimizer)
        if self.keeper is not None:  # a clock of each process would have one of them wait for the others' parts
            self.keeper.late = partial(ranks.agreed, "whether to keep a checkpoint")
        try:
            return self._run()
        finally:
            divided.close()

    def _make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(parameters, self.config)

    def _run(self) -> TrainingLog:
        self.scheduler = make_scheduler(self.optimizer, self.config, self.epochs * len(self.batches))
        if self.keeper is not None and self.keeper.saved is not None:
            self._go_on(self.keeper.saved)
            self.keeper.saved[0].clear()  # its tensors need not be held any longer
            self.keeper.saved = None
        self.gradients = Gradients(
            self.objective, self.batches, self.hooks, limit=self.state.limit, tell=self._tell_limit,
            in_step=ranks.active() and is_sharded(self.model),
        )  # fmt: skip
        self.started = time.perf_counter() - self.state.log.seconds
        self.model.eval()
        while not self.state.done:
            self._epoch()
        if self.keeper is not None:
            self.keeper.at_end(self._steps(), self._snapshot)
        state, selection = self.state, self.selection
        if selection is not None and selection.best_epoch and state.best is not None:
            with torch.no_grad():
                for p, value in zip(self.parameters, state.best, strict=True):
                    p.copy_(value)
        elif selection is None or not selection.best_epoch:
            state.log.best_epoch = None
        state.log.seconds = time.perf_counter() - self.started
        return state.log

    def _go_on(self, saved: Snapshot) -> None:
        state = self.state = restore(saved, self.names, self.parameters, self.optimizer)
        if not (1 <= state.epoch <= self.epochs + 1 and 0 <= state.step <= len(self.batches)):
            raise CheckpointError(f"it stands at epoch {state.epoch}, step {state.step}, which this task does not have")
        resume_schedule(self.scheduler, self._steps())
        self.batches.fast_forward(state.epoch - 1, state.step, state.position)
        self.progress.line(
            f"goes on from its checkpoint, after step {self._steps()} of {self.epochs * len(self.batches)}"
        )
        for entry in state.log.epochs:
            self.on_epoch(entry)
        if state.learning_rate != self.rate and not state.done:
            self.warn(
                f"task {self.objective.task.name!r} goes on from step {self._steps()} with the learning rate {self.rate:g} in "
                f"place of {state.learning_rate:g}"
            )
            state.learning_rate = self.rate

    def _epoch(self) -> None:
        state, n = self.state, len(self.batches)
        self.progress.phase(f"epoch {state.epoch}/{self.epochs}", n)
        if state.step:
            self.progress.advance(state.step)
        self.epoch_started = time.perf_counter() - state.sums.seconds
        with STOP.held():
            for batch in self._fetched():
                self._step(batch)
        self._end_epoch()
        STOP.agree()

    def _fetched(self) -> Iterator[Any]:
        """The epoch's batches; a loader process that was stopped with this one is no fault."""
        stream = iter(self.batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            except RuntimeError:
                if STOP.due and self.keeper is not None and self.divided is None:
                    self.keeper.save(self._steps(), self._snapshot)
                STOP.check()
                raise
            self.state.sums.waited += time.perf_counter() - asked
            yield batch

    # ---- a step -------------------------------------------------------------------------------------------------

    def _step(self, batch: Any) -> None:
        state, sums, config = self.state, self.state.sums, self.config
        where = f"task {self.objective.task.name!r}, epoch {state.epoch}, step {state.step + 1}"
        try:
            tally = self._gradient(batch, where)
            samples = [] if batch is None else self.batches.where(batch)[:3]
            check_gradients(self.names, self.parameters, config.grad_clip, where, samples)
        except TrainingError as error:
            raise TrainingError(f"{error}; no weight has taken it in; {self._remedy()}") from None
        self.optimizer.step()
        self.hooks.after_step()
        sums.lr = float(self.optimizer.param_groups[0]["lr"])  # the rate of this step, not of the one that is set next
        self.scheduler.step()
        for loss in tally.losses:
            sums.loss += loss
        for penalty in tally.penalties:
            sums.penalty += penalty
        if tally.right is not None:
            sums.right = (sums.right or 0) + tally.right
        sums.seen += tally.samples
        state.step += 1
        sums.seconds = time.perf_counter() - self.epoch_started
        self.progress.advance(loss=sums.loss / sums.seen, accuracy=self._accuracy(), data_wait=sums.data_wait)
        if state.step % LOOK_EVERY == 0 or state.step == len(self.batches):
            self._look_at_size()
        if self.keeper is not None:
            try:
                self.keeper.after_step(self._steps(), self._snapshot)
            except FloatingPointError as error:  # the step itself led there, from a gradient that was finite
                raise TrainingError(f"{error}; {self._remedy()}") from None
        STOP.check()

    def _gradient(self, batch: Any, where: str) -> Tally:
        """Leave the gradient of the whole batch in the parameters, also where this process has but a part of it."""

        def forget() -> None:
            self.optimizer.zero_grad(set_to_none=True)

        if not ranks.active():
            return self.gradients.add(batch, where, forget)
        tally, failed = None, None
        if self.gradients.in_step:  # where one process fails the others wait for it within the model, and not here
            tally, stopped = add_up(self.parameters, self.gradients.add(batch, where, forget), None, STOP.requested)
            STOP.agree(stopped)
            return tally
        try:
            if batch is None:
                forget()
            else:
                tally = self.gradients.add(batch, where, forget)
        except Exception as error:
            failed = error
        tally, stopped = add_up(self.parameters, tally, failed, STOP.requested)
        STOP.agree(stopped)
        return tally

    def _accuracy(self) -> float | None:
        sums = self.state.sums
        return None if sums.right is None else 100.0 * sums.right / sums.seen

    def _remedy(self) -> str:
        """What to do about a loss or gradient that is not finite."""
        rate = f"{self.rate / 10:g}"
        return (
            "nothing after the task's last checkpoint is kept; lower the rate and go on, for "
            f"example `keeplora resume RUN -o training.learning_rate={rate}`, or set training.grad_clip"
        )

    def _tell_limit(self, line: str) -> None:
        self.state.limit = self.gradients.limit
        self.warn(line)

    def _look_at_size(self) -> None:
        """Warn, once per task, of an adapter that outgrows its weights."""
        if self.state.told_large or (found := self.hooks.largest_update()) is None:
            return
        layer, ratio = found
        if ratio > LARGE_UPDATE:
            self.state.told_large = True
            self.warn(
                f"task {self.objective.task.name!r}, epoch {self.state.epoch}, step {self.state.step}: the update of {layer} has "
                f"grown to {ratio:.2g} times the norm of its weights; a lower training.learning_rate is advised"
            )

    # ---- the end of an epoch ------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        state, selection = self.state, self.selection
        sums = state.sums
        sums.seconds = time.perf_counter() - self.epoch_started
        entry: dict[str, Any] = {"epoch": state.epoch, "loss": sums.loss / sums.seen}
        if sums.right is not None:
            entry["train_accuracy"] = self._accuracy()
        entry |= {"lr": sums.lr, "seconds": round(sums.seconds, 3), "data_wait": sums.data_wait}
        if sums.penalty:
            entry["penalty"] = sums.penalty / sums.seen
        self.progress.advance(0, data_wait=sums.data_wait)
        score = None if selection is None else self._validate(selection)
        with STOP.held():
            self._close(entry, score)

    def _close(self, entry: dict[str, Any], score: float | None) -> None:
        """Enter the epoch into the log, and go to the next."""
        state, selection = self.state, self.selection
        if selection is not None:
            entry["validation_accuracy"] = score
            self.progress.advance(0, validation_accuracy=score)
            if score is not None and (state.best_score is None or score > state.best_score):
                state.best_score, state.since_best = score, 0
                state.best = [p.detach().clone() for p in self.parameters]
                state.log.best_epoch = state.epoch
            else:
                state.since_best += 1
        state.log.epochs.append(entry)
        self.on_epoch(entry)
        state.epoch, state.step, state.sums = state.epoch + 1, 0, Sums()
        state.done = state.epoch > self.epochs
        if selection is not None and selection.patience is not None and state.since_best >= selection.patience:
            self.progress.line(f"stopped early: no better validation accuracy for {state.since_best} epochs")
            state.done = True

    def _validate(self, selection: Selection) -> float | None:
        """The score; whoever interrupts it finds the epoch's training kept."""
        before = rng_state()
        # One process may be interrupted alone, and cannot ask the others for their parts of a divided state then.
        ready = self._snapshot(before) if self.divided is not None and self.keeper is not None else None
        try:
            return selection.validate()
        except KeyboardInterrupt:
            if self.keeper is not None:
                self.keeper.save(self._steps(), lambda: ready or self._snapshot(before))
            raise

    # ---- what is kept -------------------------------------------------------------------------------------------

    def _steps(self) -> int:
        """Steps of the task that are done."""
        return (self.state.epoch - 1) * len(self.batches) + self.state.step

    def _snapshot(self, rng: Rng | None = None) -> Snapshot:
        state = self.state
        state.position = self.batches.position(state.step)
        state.log.seconds = time.perf_counter() - self.started
        if state.step:
            state.sums.seconds = time.perf_counter() - self.epoch_started
        return take_snapshot(state, self.names, self.parameters, self.optimizer, rng)


__all__ = ["LARGE_UPDATE", "Selection", "TrainingLog", "train_task"]
