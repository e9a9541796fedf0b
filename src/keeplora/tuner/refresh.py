"""Half of A's rows taken in the middle of a task, inside the residual that is left then (`refresh_factor`; beyond the paper).

A task begins with the leading half of M4's rows; the others are zero, so that their columns of B get no gradient and stay zero.
At the task's half G is taken anew at W + s B A, and the free rows become the leading directions of what it has outside U *and*
outside the rows that are there:

    A ← [A₁; A₂],    A₂ = top rows of G (I − P)(I − A₁ᵀA₁)

The update is unchanged at that moment (A₂'s columns of B are zero), all columns of B train on, and the optimiser begins anew with
them, its rate following the schedule. The rows of A are orthonormal and A U = 0 as ever: the ledger holds one adapter of rank r,
and whatever the method promises holds. It costs the parameters of the configured rank, and one gradient pass more per task.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from keeplora.math import residual_factor
from keeplora.tuner import ranks
from keeplora.tuner.adapter import Factors
from keeplora.tuner.statistics import residual_gradients

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.task import OpenTask

REFRESHED = "refreshed"
"""Key of a task's info: rows of A that were taken at its half, over all targets."""


def leading_half(A: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A with its rows behind the first ⌈r'/2⌉ at zero.

    >>> leading_half({"q": torch.eye(3)})["q"].diagonal()
    tensor([1., 1., 0.])
    """
    found = {name: a.clone() for name, a in A.items()}
    for a in found.values():
        a[-(-len(a) // 2) :] = 0.0
    return found


def refresh(learner: ContinualLearner, task: OpenTask) -> list[nn.Parameter]:
    """Fill the free rows of every A; the B whose optimiser states are to be forgotten. Nothing where no row is free."""
    adapter = task.adapter
    assert adapter is not None
    used = {name: a[_rows(a)] for name, a in adapter.A0.items()}
    free = {name: len(a) - len(used[name]) for name, a in adapter.A0.items()}
    targets = [replace(t, r=free[name]) for name, t in adapter.targets.items() if free[name]]
    if not targets:
        return []
    started = time.perf_counter()
    G, U = residual_gradients(learner, task, targets), learner.U

    def rows(name: str, device: torch.device) -> Tensor:
        taken = U.subspace(name).extended(used[name].T.contiguous())
        return residual_factor(G[name].to(device), taken.to(device), free[name]).cpu()

    names = [t.name for t in targets]
    spread = learner.algebra.spread("the refreshed factors", names, rows, lambda name: G[name].device)
    found = ranks.agreed("A", spread)
    for name, more in found.items():
        rest = torch.zeros(free[name] - len(more), used[name].shape[1])
        adapter.set_A(name, torch.cat([used[name], more, rest]))
    task.info[REFRESHED] = sum(map(len, found.values()))
    task.statistics_seconds += time.perf_counter() - started
    return [adapter.weights(name)[1] for name in found]


def without_free_rows(task: OpenTask, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The trained factors without rows of A that were never filled, whose columns of B are zero."""
    if REFRESHED not in task.info:
        warnings.warn(
            f"task {task.name!r}: refresh_factor is set, but half of A's rows were never taken and half of the rank did not "
            "train; call the learner's midway() after half of the task's steps",
            stacklevel=4,
        )
    return {name: Factors(f.A[_rows(f.A)], f.B[:, _rows(f.A)].contiguous(), f.s) for name, f in factors.items()}


def _rows(A: Tensor) -> Tensor:
    return A.abs().amax(dim=1) > 0
