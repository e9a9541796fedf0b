"""How alike the feature subspaces of learned tasks are, and how much each task's update may disturb the others.

Of a task t at a layer, what it feeds in beyond U₀ is held as C_t / tr C_t ≈ Q diag(w) Qᵀ, Q orthonormal: from its covariance
where that was kept (`keep_covariance`), with Q the eigenvectors of (I − P₀) C_t (I − P₀); else from the ledger's own columns,
with w the share of tr C_t along each (``values``), which leaves out what lies between two columns and what later tasks' columns
would hold. U_t, the task's own subspace, is the fewest columns of Q that reach a share ε of Σ w.

Predictors of what learning j does to i:

    overlap   tr(U_iᵀ U_j U_jᵀ U_i) / min(d_i, d_j): symmetric; mean over layers by weights √(Σw_i Σw_j)
    energy    the share of j's energy beyond U₀ that lies inside U_i: a ratio of two sums over layers
    gradient  Σ ‖Ĝ_j U_i‖_F² / Σ ‖Ĝ_j‖_F² over layers, Ĝ_j = G_j (I − P₀) with G_j the gradient (M2) at the weights that j started
              from: how much of what j wants to change lies where i's features live. It is in no ledger and must be given
    update    tr(ΔW_j C_i ΔW_jᵀ) / tr C_i: what j's update does to i's features, plain mean over layers
    size      ‖ΔW_j‖_F², summed over layers: the update alone, whatever i is. One that does no better has learned nothing of i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.math import Subspace
from keeplora.math.angles import overlap
from keeplora.tuner.adapter import Factors
from keeplora.tuner.basis import Bases
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.records import TaskRecord

PREDICTORS = ("overlap", "energy", "gradient", "update", "size")
TAIL = 1e-5
"""Share of the energy whose smallest directions are not held."""


@dataclass(frozen=True)
class Directions:
    """Q (in, m) float32 and w (m,) float64, falling: C / tr C ≈ Q diag(w) Qᵀ."""

    Q: Tensor
    w: Tensor

    def own(self, energy: float) -> Tensor:
        """The fewest columns that reach a share ``energy`` of Σ w."""
        total = float(self.w.sum())
        if total <= 0:
            return self.Q[:, :0]
        reached = torch.cumsum(self.w, 0) >= energy * total * (1 - 1e-9)
        return self.Q[:, : int(torch.nonzero(reached)[0]) + 1]


@dataclass
class TaskFeatures:
    """What a task feeds into each layer.

    Attributes:
        beyond: beyond U₀. whole: all of it, where the covariance was kept, else ``beyond``. exact: whether it was.
        after: the names of the tasks whose columns ``beyond`` knows of; None: of all directions.
        start: U₀ per layer.
    """

    name: str
    beyond: dict[str, Directions] = field(default_factory=dict)
    whole: dict[str, Directions] = field(default_factory=dict)
    exact: bool = False
    after: tuple[str, ...] | None = None
    start: Mapping[str, Subspace] = field(default_factory=dict)

    def knows(self, other: str) -> bool:
        """Whether its energy inside the other's subspace can be told."""
        return self.after is None or other in self.after


def ledger_features(ledger: Ledger) -> dict[str, TaskFeatures]:
    """Every active task of a ledger by name, in order.

    Raises:
        KeepLoraError: its method protects nothing, or it is of a version that does not say what each direction is worth.
    """
    start = ledger.bases()
    if not start:
        raise KeepLoraError(
            f"{ledger.path}: its method keeps no subspaces, so it does not know its tasks' features; name a run of the same "
            "tasks by keeplora or keeplora++ as well"
        )
    history, active = ledger.history(), {record.entry for record in ledger.records()}
    bases = Bases(start, history)
    found = {}
    for t, record in enumerate(history):
        if record.entry not in active or record.info.get("undone"):
            continue
        if not record.values and not record.covariance:
            raise KeepLoraError(
                f"{ledger.path}: task {record.name!r} does not say what its directions are worth, as in ledgers of version 0; "
                "learn it again"
            )
        exact = bool(record.covariance)
        known = None if exact else tuple(r.name for r in history[: t + 1])
        one = TaskFeatures(record.name, exact=exact, after=known, start=start)
        last: tuple[Tensor, Tensor, Directions, Directions] | None = None
        for layer, S in start.items():
            if exact and layer in record.covariance:
                C = record.covariance[layer]
                if last is not None and torch.equal(last[0], C) and torch.equal(last[1], S.held):
                    one.beyond[layer], one.whole[layer] = last[2:]  # q, k and v read one input
                    continue
                one.beyond[layer], one.whole[layer] = _from_covariance(C, S)
                last = (C, S.held, one.beyond[layer], one.whole[layer])
            elif layer in record.values:
                one.beyond[layer] = one.whole[layer] = _from_columns(bases.added(layer, t + 1), record.values[layer])
        found[record.name] = one
    return found


def _from_covariance(C: Tensor, S: Subspace) -> tuple[Directions, Directions]:
    C64 = C.to(torch.float64)
    C64 = (C64 + C64.T) / (2 * max(float(C64.diagonal().sum()), 1e-300))
    left = S.project_out(S.project_out(C64).T)
    return _directions((left + left.T) / 2), _directions(C64)


def _directions(C: Tensor) -> Directions:
    w, Q = torch.linalg.eigh(C)
    w, Q = w.flip(0).clamp(min=0), Q.flip(1)
    total = float(w.sum())
    kept = int((torch.cumsum(w, 0) < (1 - TAIL) * total).sum()) + 1 if total > 0 else 0
    return Directions(Q[:, :kept].to(torch.float32).contiguous(), w[:kept])


def _from_columns(columns: Tensor, values: Tensor) -> Directions:
    w, order = values.to(torch.float64).clamp(min=0).sort(descending=True, stable=True)
    return Directions(columns[:, : len(values)][:, order], w)


def updates_of(records: Sequence[TaskRecord]) -> dict[str, dict[str, Tensor]]:
    """ΔW of every task by name and layer, float32."""
    return {
        record.name: {n: u.delta if isinstance(u, Factors) else u for n, u in record.updates.items() if u is not None}
        for record in records
    }


def overlap_matrix(features: Mapping[str, TaskFeatures], energy: float = 0.99) -> list[list[float | None]]:
    """`overlap` of every pair of tasks, in the order of ``features``; 1 on the diagonal, None where nothing is known."""
    tasks = list(features.values())
    own = [{layer: s.own(energy) for layer, s in t.beyond.items()} for t in tasks]
    out: list[list[float | None]] = [[1.0] * len(tasks) for _ in tasks]
    for i in range(len(tasks)):
        for j in range(i):
            total = weight = 0.0
            for layer in own[i].keys() & own[j].keys():
                share = overlap(own[i][layer], own[j][layer])
                if share is not None:
                    w = float(tasks[i].beyond[layer].w.sum() * tasks[j].beyond[layer].w.sum()) ** 0.5
                    total, weight = total + w * share, weight + w
            out[i][j] = out[j][i] = total / weight if weight > 0 else None
    return out


def energy_inside(of: TaskFeatures, other: TaskFeatures, energy: float = 0.99) -> float | None:
    """The share of ``of``'s energy beyond U₀ that lies inside the own subspace of ``other``; None where that is not known."""
    if not of.knows(other.name):
        return None
    inside = total = 0.0
    for layer, s in of.beyond.items():
        if layer in other.beyond:
            U = other.beyond[layer].own(energy).to(torch.float64)
            inside += float((s.w * (U.T @ s.Q.to(torch.float64)).square().sum(0)).sum())
            total += float(s.w.sum())
    return inside / total if total > 0 else None


def gradient_inside(G: Mapping[str, Tensor], other: TaskFeatures, energy: float = 0.99) -> float | None:
    """The share of a residual gradient's energy that lies inside the own subspace of ``other``; None where there is none.

    Args:
        G: per layer (out, in), of any task, at whatever weights; layers that ``other`` says nothing of do not count.
    """
    inside = total = 0.0
    for layer, s in other.beyond.items():
        if layer in G:
            residual = other.start[layer].project_out(G[layer].to("cpu", torch.float64))
            inside += float((residual @ s.own(energy).to(torch.float64)).square().sum())
            total += float(residual.square().sum())
    return inside / total if total > 0 else None


def disturbance(delta: Mapping[str, Tensor], features: TaskFeatures) -> float | None:
    """tr(ΔW C ΔWᵀ) / tr C, mean over the layers of ``features``; a layer that ΔW leaves alone counts as 0."""
    found = []
    for layer, s in features.whole.items():
        D = delta.get(layer)
        moved = 0.0 if D is None else float((s.w * (D.to(torch.float64) @ s.Q.to(torch.float64)).square().sum(0)).sum())
        found.append(moved)
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Pair:
    """Two tasks of a run: ``later`` was learned when ``earlier`` was known already.

    Attributes:
        drop: by how many points ``earlier`` fell while ``later`` was learned; None where it was not measured.
        predicted: per predictor; None where it is not known.
    """

    run: str
    earlier: str
    later: str
    drop: float | None
    predicted: dict[str, float | None]


def pairs_of(
    run: str, order: Sequence[str], accuracy: Sequence[Sequence[float | None]], updates: Mapping[str, Mapping[str, Tensor]],
    features: Mapping[str, TaskFeatures], energy: float = 0.99, gradients: Mapping[str, Mapping[str, float | None]] | None = None,
) -> list[Pair]:  # fmt: skip
    """Every pair of tasks of a run, earlier before later, with what is predicted and what was measured.

    Args:
        order: the tasks as the run learned them. accuracy: row 0 before the first, row t after t tasks; a column per task.
        updates: `updates_of` the run's records. features: `ledger_features` of this run or of another with the same tasks.
        gradients: [later][earlier], `gradient_inside` of the later task's gradient in this run; None: not taken.
    """
    names = list(features)
    matrix = overlap_matrix(features, energy)
    out = []
    for j, later in enumerate(order):
        delta = updates.get(later)
        size = None if delta is None else sum(float(d.to(torch.float64).square().sum()) for d in delta.values())
        for i, earlier in enumerate(order[:j]):
            if earlier not in features or later not in features:
                continue
            predicted: dict[str, Any] = {
                "overlap": matrix[names.index(earlier)][names.index(later)],
                "energy": energy_inside(features[later], features[earlier], energy),
                "gradient": (gradients or {}).get(later, {}).get(earlier),
                "update": None if delta is None else disturbance(delta, features[earlier]), "size": size,
            }  # fmt: skip
            before, after = (accuracy[j][i], accuracy[j + 1][i]) if j + 1 < len(accuracy) else (None, None)
            drop = None if before is None or after is None else before - after
            out.append(Pair(run, earlier, later, drop, predicted))
    return out
