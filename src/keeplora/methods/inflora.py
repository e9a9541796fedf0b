"""InfLoRA (Liang & Li, CVPR 2024, arXiv 2404.00228): LoRA in the part of the new task's input space that no old task used.

Per task and layer, A = the top-r directions of the task's own input covariance C, taken before training and projected out
of the old tasks' input space, divided by √3 and frozen; only B trains, from zero. Afterwards the task's inputs join the old
space until it explains ε_t = ε_start + (ε_end − ε_start) · t / T of their energy, t = 0, 1, … counting tasks.

DualGPM (Liang & Li, arXiv 2310.06652): of the old space and its orthogonal complement the one of fewer dimensions is worked
with: projecting *out of* the one is projecting *into* the other (`keeplora.math.Subspace`, as for every method here).

Where ours differs. The projection is (I − P) C (I − P), the paper's Ĥ Ĥᵀ; the authors' code takes the left singular
vectors of (I − P) C, which span the same space and rank it otherwise. Energy is a share of tr C, as in the paper; their
code squares the eigenvalues of C, and protects less. Their code, too, keeps the leading basis as if it were the complement
where the first task alone fills more than half of a layer. All targets are adapted, not k and v alone; the class head is
the text tower (or the "cls" variants' own), not a linear layer per task. The number of tasks T is an option, since a
learner is not told how many will come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.math import Subspace, append_directions
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option
from keeplora.tuner.statistics import report_capacity, task_features

EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class InfLoraOptions:
    """How the protected energy rises."""

    eps_start: float = option(0.95, "ε of the first task: share of its input energy that joins the old space.")
    eps_end: float = option(1.0, "ε that the share rises to, linearly in the task's index.")
    tasks: int = option(10, "T, the number of tasks over which it rises; later tasks stay at eps_end.")

    def __post_init__(self) -> None:
        for name in ("eps_start", "eps_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"tuner.options.{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if self.tasks < 1:
            raise ConfigError(f"tuner.options.tasks must be at least 1, got {self.tasks!r}")

    def energy(self, t: int) -> float:
        """ε of the task with index ``t``, from 0.

        >>> [InfLoraOptions(tasks=4).energy(t) for t in (0, 2, 4, 9)]
        [0.95, 0.975, 1.0, 1.0]
        """
        return self.eps_start + (self.eps_end - self.eps_start) * min(t, self.tasks) / self.tasks


def interference_free_factor(C: Tensor, U: Tensor | Subspace, rank: int) -> Tensor:
    """A: the leading eigenvectors of (I − U Uᵀ) C (I − U Uᵀ) as rows, over √3.

    Args:
        C: (in, in), Σ x xᵀ of the new task's inputs. U: (in, k) orthonormal, the old tasks' input space, or that space by its
            smaller side. rank: r ≥ 1.

    Returns:
        (r', in) float32 with A Aᵀ = I/3 and A U = 0; r' = min(r, in − k, numerical rank of what is left of C).
    """
    S = U if isinstance(U, Subspace) else Subspace.of(U)
    C64, basis = C.detach().to(torch.float64), S.held.to(torch.float64)
    if S.by_complement:  # into: an eigenproblem of the complement's own, smaller size
        eigenvalues, vectors = torch.linalg.eigh(basis.T @ C64 @ basis)
        vectors = basis @ vectors
    else:  # out of
        eigenvalues, vectors = torch.linalg.eigh(S.project_out(S.project_out(C64).T))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    floor = C64.shape[0] * EPS32 * float(torch.linalg.eigvalsh(C64)[-1])
    r = min(rank, S.n_in - S.k, int((eigenvalues > floor).sum()))
    V = S.project_out(vectors[:, :r].T).T
    return append_directions(torch.zeros(S.n_in, 0), V).T.contiguous() / math.sqrt(3)


class InfLora(ContinualLearner):
    """A fixed in the new task's own part of the input space; B trains."""

    Options: ClassVar[type] = InfLoraOptions

    def _initial_A(self, task: OpenTask) -> dict[str, Tensor]:
        if isinstance(task.feature_batches, Iterator):
            raise KeepLoraError(
                f"task {task.name!r}: feature_batches is a {type(task.feature_batches).__name__}, which can be gone through "
                "only once, but inflora takes the features before training and after it; give a list or a DataLoader"
            )
        started = time.perf_counter()
        features = task_features(self, task, exact=True)
        A = {}
        for t in self.targets:
            if t.name in task.frozen:
                continue
            rank = min(t.r, t.n_out)  # a B with fewer rows than columns has nothing more to tell apart
            C = features.C(t.name).to("cpu")
            assert isinstance(C, Tensor)
            A[t.name] = interference_free_factor(C, self.U.subspace(t.name), rank)
        task.statistics_seconds += time.perf_counter() - started
        report_capacity(
            task, self.targets, A,
            "lower tuner.options.eps_start or eps_end, set tuner.options.tasks to the number of tasks, or add targets",
        )  # fmt: skip
        return A

    def _protect(self, task: OpenTask, record: TaskRecord) -> None:
        config = self.config
        self.config = replace(config, energy_features=self.options.energy(len(self.history)), memory="features")
        try:
            super()._protect(task, record)
        finally:
            self.config = config


register(
    Method("inflora", "InfLoRA", InfLora, "LoRA with a fixed A in the new task's inputs, old tasks' projected out (DualGPM)",
           config={**ONE_SCALE, "energy_weights": 0.0, "memory": "features"}, trained="B of every target",
           paper="Liang & Li, CVPR 2024, arXiv 2404.00228", state="basis of old inputs, or of their complement, per target",
           search={**LEARNING_RATE, "tuner.options.eps_start": ("choice", [0.9, 0.95, 0.98])})
)  # fmt: skip
