"""NuSA-CL (Jo & Kim, ICLR 2026, arXiv 2510.21175): every task is learned in what is nearly the null space of the weights.

As a task starts, W = U Σ Vᵀ of each layer's present weight; the leading singular directions that hold ``energy`` of ‖W‖_F²
are left alone, and the task learns ΔW = U_n M V_nᵀ in the others: U_n and V_n are fixed, M (r × r) trains from zero. Then
W ← W + ΔW, and the next task looks at the new W. Nothing else is kept.

Where ours differs: of more than ``max_rank`` low-energy directions the lowest are taken, and a layer that has none sits the
task out, with a warning. A layer that is not square has directions on its longer side that W does not reach at all; they
are not used, as U_n and V_n come in pairs. The singular vectors are computed in float64. All targets are adapted alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.math.subspace import smallest_rank
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.adapter import Factors
from keeplora.tuner.branch import Branch, BranchLearner
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.options import option
from keeplora.tuner.statistics import report_capacity
from keeplora.tuner.task import TaskState


@dataclass(frozen=True)
class NusaOptions:
    """Which singular directions are free."""

    energy: float = option(0.95, "Share of ‖W‖² whose leading singular directions are left alone.")
    max_rank: int = option(128, "At most so many of the other directions are used, the lowest ones.")

    def __post_init__(self) -> None:
        if not 0 <= self.energy <= 1:
            raise ConfigError(f"tuner.options.energy must lie between 0 and 1, got {self.energy!r}")
        if self.max_rank < 1:
            raise ConfigError(f"tuner.options.max_rank must be at least 1, got {self.max_rank!r}")


def null_directions(W: Tensor, energy: float, max_rank: int) -> tuple[Tensor, Tensor]:
    """(U_n, V_n): the low-energy singular directions of W, (out, r) and (in, r), float32, orthonormal columns.

    With p the smallest number of leading directions that hold ``energy`` of ‖W‖_F² (M1's rule; those beyond the numerical
    rank hold none), r = min(max_rank, min(out, in) − p).

    >>> U, V = null_directions(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 0.9, 8)   # 13/14 = 0.93 in the first two
    >>> V.abs().tolist()
    [[0.0], [0.0], [1.0]]
    """
    L, sigma, Rt = torch.linalg.svd(W.detach().to(torch.float64), full_matrices=False)
    squares = sigma.square()
    rank = int((sigma > max(W.shape) * torch.finfo(torch.float32).eps * sigma[0]).sum()) if sigma.numel() else 0
    p = smallest_rank(squares[:rank], energy, total=float(squares.sum()))
    first = max(p, len(sigma) - max_rank)
    return L[:, first:].to(torch.float32).contiguous(), Rt[first:].T.contiguous().to(torch.float32)


class NullSpaceBranch(Branch):
    """U_n M V_nᵀ x; only M trains, from zero."""

    U: Tensor
    V: Tensor

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.zeros(U.shape[1], V.shape[1]))
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("V", V, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(nn.functional.linear(x, self.V.T), self.M), self.U)

    @torch.no_grad()
    def factors(self) -> Factors:
        return Factors(self.V.T.contiguous().cpu(), (self.U @ self.M).cpu(), 1.0)


class NusaCl(BranchLearner):
    """Trains one small square matrix per target."""

    Options: ClassVar[type] = NusaOptions

    def planned_parameters(self) -> int:
        """At most: how many directions hold little energy is known from the weights alone."""
        return sum(min(self.options.max_rank, t.n_in, t.n_out) ** 2 for t in self.targets) + self.free.numel()

    def _branches(self, task: OpenTask) -> Mapping[str, NullSpaceBranch]:
        if task.saved is not None:
            U, V = task.saved.group("U"), task.saved.group("V")
            return {name: NullSpaceBranch(U[name], V[name]) for name in U}
        started = time.perf_counter()
        options: NusaOptions = self.options
        found = {
            t.name: null_directions(self.store.current(t.name), options.energy, options.max_rank) for t in self.targets
        }
        task.statistics_seconds += time.perf_counter() - started
        report_capacity(
            task,
            self.targets,
            {name: V.T for name, (_, V) in found.items()},
            "lower tuner.options.energy, or add targets",
        )
        task.info.pop("rank_shrunk")  # M's size follows from the weights and not from the configured rank
        return {name: NullSpaceBranch(U, V) for name, (U, V) in found.items() if V.shape[1] > 0}

    def task_state(self) -> TaskState:
        state = super().task_state()
        branches = self.open_branches()
        sides = {f"U/{n}": b.U for n, b in branches.items()} | {f"V/{n}": b.V for n, b in branches.items()}
        return TaskState(state.tensors | sides, state.values)


register(
    Method("nusa-cl", "NuSA-CL", NusaCl, "updates in the low-energy singular directions of the present weights",
           config=ONE_SCALE, trained="M (r × r) of every target",
           paper="Jo & Kim, ICLR 2026, arXiv 2510.21175",
           search={**LEARNING_RATE, "tuner.options.energy": ("choice", [0.9, 0.95, 0.99])})
)  # fmt: skip
