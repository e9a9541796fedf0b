"""Distillation from a frozen teacher on full fine-tuning of the target weights: LwF, and ZSCL with a reference set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.methods.full_finetuning import FullFineTuning
from keeplora.methods.registry import CLASSIFICATION, FULL_LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option
from keeplora.tuner.task import TaskState


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · (CE over texts of each picture + CE over pictures of each text), each a mean over its rows.

    Args:
        student, teacher: similarities [N, C] of N pictures and C texts. CE is −Σ softmax(teacher / T) log softmax(student / T).

    Its gradient vanishes where the two agree; its value does not: there it is the teacher's entropy.

    >>> float(soft_cross_entropy(torch.zeros(1, 4), torch.zeros(1, 4), 1.0).exp())
    4.0
    """
    s, t = student.float() / temperature, teacher.float() / temperature
    rows = nn.functional.cross_entropy(s, t.softmax(dim=1))
    columns = nn.functional.cross_entropy(s.T, t.T.softmax(dim=1))
    return temperature**2 * (rows + columns)


@dataclass(frozen=True)
class LwFOptions:
    """Settings of ``lwf``."""

    temperature: float = option(2.0, "T of the soft cross-entropy")
    weight: float = option(1.0, "weight of the distillation loss beside the task's own")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"tuner.options.temperature must be a finite number above 0, got {self.temperature!r}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"tuner.options.weight must be a finite number of at least 0, got {self.weight!r}")


class LwF(FullFineTuning):
    """Learning without forgetting: the model before the task teaches, on the task's own pictures and class texts.

    Li and Hoiem (1606.09282) distil old heads; a dual encoder has none, so the similarities of the batch's pictures and
    the task's class texts are distilled in both directions, as in the LwF baseline of ZSCL (2303.06628). That code
    compares the student's pictures with the teacher's texts; here both are the student's own, so that both towers are
    held.
    """

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    Options = LwFOptions
    penalty_of_batch = True
    _teacher: nn.Module | None = None

    def _make_teacher(self) -> nn.Module:
        """The model before the task, frozen."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def _attach(self, task: OpenTask) -> nn.Module:
        if task.objective is None:
            raise KeepLoraError(
                f"task {task.name!r}: {type(self).__name__} compares features with a teacher's and needs the task's "
                "objective: give start_task(objective=...)"
            )
        teacher = self._make_teacher()
        model = super()._attach(task)
        self._teacher = teacher
        task.when_released(self._dismiss)
        return model

    def _dismiss(self) -> None:
        self._teacher = None

    def _distilled(self, batch: Any, student: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch; ``student``: the model's logits of it, if they are there already."""
        objective = self._require_open().objective
        assert objective is not None
        with torch.no_grad():
            teacher = objective.logits(batch, model=self._teacher)
        if student is None:
            student = objective.logits(batch)
        return self.options.weight * soft_cross_entropy(student, teacher, self.options.temperature)

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        return self._distilled(batch, logits)


@dataclass(frozen=True)
class ZSCLOptions(LwFOptions):
    """Settings of ``zscl``."""

    average_every: int = option(100, "optimiser steps between two weights of the average; 0: no averaging")
    l2: float = option(0.0, "weight of Σ (θ − θ*)², θ* the weights before the task; the authors' runs have 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_every < 0:
            raise ConfigError(
                f"tuner.options.average_every must be at least 1, or 0 for none, got {self.average_every!r}"
            )
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ConfigError(f"tuner.options.l2 must be a finite number of at least 0, got {self.l2!r}")


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches again and again, each time as the iterable gives them."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise KeepLoraError("reference: it holds no batch; give pictures and texts beside the tasks' own")


class ZSCL(LwF):
    """The original model teaches on a reference set, and the average of the weights along the task is kept.

    Zheng et al. (2303.06628). Each step takes one reference batch; the kept weights are the mean of those at the task's
    start, after every ``average_every`` steps, and at its end. Ours differs from the authors' code: target weights train,
    not the whole model; the student's own texts are compared, not the teacher's; the average has no member after the
    very first step; the L2 term that their runs add is an option, off; the task's loss has no label smoothing.
    """

    Options = ZSCLOptions
    needs_reference = True
    penalty_of_batch = False

    def _make_teacher(self) -> nn.Module:
        """The original model: W₀ in every target of a copy, which is all that ever changes."""
        teacher = super()._make_teacher()
        with torch.no_grad():
            for t in self.targets:
                teacher.get_parameter(f"{t.name}.weight").copy_(self.store.W0[t.name])
        return teacher

    def _attach(self, task: OpenTask) -> nn.Module:
        if task.reference is None:
            raise KeepLoraError(
                f"task {task.name!r}: zscl needs a reference set, pictures and texts beside the tasks' own: name a data "
                "set under `reference:` in the config, or give start_task(reference=...)"
            )
        model = super()._attach(task)
        self._reference = endless(task.reference)
        self._steps = self._taken = 0
        self._start = {n: self.store.parameter(n).detach().to(torch.float32, copy=True) for n in self.store.names}
        self._sum = {n: torch.zeros_like(W) for n, W in self._start.items()}
        self._members = 1  # the start itself
        return model

    def _dismiss(self) -> None:
        super()._dismiss()
        self._reference, self._start, self._sum = iter(()), {}, {}

    def task_state(self) -> TaskState:
        state = super().task_state()
        tensors = state.tensors | {f"average/{n}": total for n, total in self._sum.items()}
        return TaskState(tensors, state.values | {"zscl": [self._steps, self._members, self._taken]})

    def load_task_state(self, task: OpenTask, saved: TaskState) -> None:
        super().load_task_state(task, saved)
        self._steps, self._members, self._taken = saved.values["zscl"]
        sums = saved.group("average")
        self._sum = {n: sums[n].to(W.device) for n, W in self._start.items()}
        reference: Any = task.reference
        if hasattr(reference, "fast_forward"):
            reference.fast_forward(*divmod(self._taken, len(reference)))
        else:
            for _ in range(self._taken):
                next(self._reference)

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        loss = self._distilled(next(self._reference))
        self._taken += 1
        if self.options.l2:
            moved = [(self.store.parameter(n).to(torch.float32) - W).square().sum() for n, W in self._start.items()]
            loss = loss + self.options.l2 * torch.stack(moved).sum()
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        self._steps += 1
        if self.options.average_every and self._steps % self.options.average_every == 0:
            self._count()

    def _count(self) -> None:
        for n, total in self._sum.items():
            total += self.store.parameter(n).to(torch.float32) - self._start[n]
        self._members += 1

    @torch.no_grad()
    def _detach(self, task: OpenTask) -> TaskRecord:
        record = super()._detach(task)
        every = self.options.average_every
        if not every:
            return record
        if self._steps % every:
            self._count()
        record.full = {n: (total / self._members).cpu() for n, total in self._sum.items()}
        return record

    def state_bytes(self) -> int:
        return sum(W.numel() * W.element_size() for W in self.store.W0.values())  # the teacher's weights


register(
    Method("lwf", "LwF", LwF, "full fine-tuning, taught by the model before the task on the task's own data",
           config=ONE_SCALE, kinds=CLASSIFICATION, trained="all target weights", paper="Li and Hoiem, arXiv 1606.09282",
           search={**FULL_LEARNING_RATE, "tuner.options.weight": ("log", 1e-2, 1e1)})
)  # fmt: skip
register(
    Method("zscl", "ZSCL", ZSCL, "full fine-tuning, taught by the original model on a reference set, weights averaged",
           config=ONE_SCALE, kinds=CLASSIFICATION, trained="all target weights", state="the original weights",
           extra_data="a reference set of pictures and texts", paper="Zheng et al., arXiv 2303.06628",
           search={**FULL_LEARNING_RATE, "tuner.options.weight": ("log", 1e-2, 1e1)})
)  # fmt: skip
