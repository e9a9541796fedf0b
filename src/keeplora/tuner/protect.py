"""After a task: what it adds to the protected subspaces (M8, M8g), and what a memory budget takes out of force."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.math import Candidates, CovarianceSketch, Subspace, held_bytes, keep_most_valuable
from keeplora.tuner import ranks
from keeplora.tuner.adapter import Factors
from keeplora.tuner.basis import added_columns, in_force
from keeplora.tuner.convergence import Matrix, explained, growth
from keeplora.tuner.stored import opened

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.ledger import TaskRecord

SKETCH = "covariance_sketch"
"""Key of ``record.info``: the rows ℓ, and per layer where a sketch stood for C the bound on ‖C − BᵀB‖₂, as a share of tr C."""
GIVEN_UP = "given_up"
"""Key of ``record.info``: per layer and task, ε_t before and after the directions that this record took out of force."""


@dataclass(frozen=True)
class _Joined:
    """What one target's statistics say: new directions, ε_t, tr C_t, shares of the columns that were there, and of the new."""

    V: Tensor
    share: float
    trace: float
    old: Tensor
    new: Tensor
    shed: float | None
    matrix: Tensor | None


def protect(
    learner: ContinualLearner,
    record: TaskRecord,
    source: Callable[[str], Matrix],
    shared: Mapping[str, str] | None = None,
) -> None:
    """Fill the record with what the task adds to U, and give the learner the U that follows.

    Args:
        source: per target, C (in, in) or its sketch, or G (out, in) where ``config.memory`` is "gradients"; asked for once each.
        shared: per target, the one whose C it shares; None: none does.
    """
    config, U = learner.config, learner.U
    groups: dict[str, list[str]] = {}
    for t in learner.targets:
        groups.setdefault((shared or {}).get(t.name, t.name), []).append(t.name)
    joined: dict[str, _Joined] = {}
    taken: dict[str, Matrix] = {}

    def take(name: str) -> Matrix:
        """Kept until its group is done: where a GPU fails at it, the CPU needs it again."""
        if name not in taken:
            taken[name] = source(name)
        return taken[name]

    def join(leader: str, device: torch.device) -> dict[str, _Joined]:
        found = _join(learner, groups[leader], take, device)
        for name in groups[leader]:
            taken.pop(name, None)
        return found

    with opened(r.basis for r in U.records):
        spread = learner.algebra.spread("the new directions", list(groups), join, lambda leader: take(leader).device)
    for found in spread.values():
        joined |= found
    basis, shed = dict(record.basis), {}
    for t in learner.targets:
        one = joined[t.name]
        basis[t.name] = one.V
        record.values[t.name] = torch.cat([one.old, one.new]).to(torch.float32)
        record.explained[t.name], record.trace[t.name] = one.share, one.trace
        if one.shed is not None:
            shed[t.name] = one.shed / one.trace if one.trace > 0 else 0.0
        if config.keep_covariance:
            assert one.matrix is not None
            record.covariance[t.name] = one.matrix.to(torch.float32)
    record.basis = basis
    if shed:
        record.info[SKETCH] = {"rows": config.covariance_sketch, "error": shed}
    if config.max_basis_bytes is not None:
        _fit(learner, record, config.max_basis_bytes)
    learner._U = U.extended(record)
    record.used = learner._U.dims()


def _join(
    learner: ContinualLearner, names: Sequence[str], source: Callable[[str], Matrix], device: torch.device
) -> dict[str, _Joined]:
    """`protect` for targets that share one C: where their U is the same too (no U₀, the same past), so is what they add.

    Computed on ``device``; what comes out is on the CPU.
    """
    config, U = learner.config, learner.U
    gradients = config.memory == "gradients"
    done: list[tuple[Subspace, Tensor | None, Tensor, float, _Joined]] = []
    joined: dict[str, _Joined] = {}
    for name in names:
        S, mask, energy = U.subspace(name), U.in_force(name), learner.feature_energy(name)
        # Of U's columns the last are those of tasks; where its complement is held, they are read, and the shares taken anew.
        added = U.added_in_force(name) if S.by_complement and bool(mask.any()) else None
        same = (
            j
            for s, a, m, e, j in done
            if e == energy and _same(s, S) and torch.equal(m, mask) and (a is None) == (added is None)
            and (a is None or added is None or torch.equal(a, added))
        )  # fmt: skip
        twin = next(same, None)
        if twin is not None:
            joined[name] = replace(twin, V=twin.V.clone())  # records are written tensor by tensor
            continue
        M = source(name).to(device)
        found = growth(S.to(device), M, energy, gradients=gradients).cpu()
        old = torch.zeros(len(mask), dtype=torch.float64)
        if added is not None:
            old[mask] = explained(added.to(device), M, gradients=gradients).cpu()
        elif found.old is not None:
            old[mask] = found.old[S.k - int(mask.sum()) :]
        kept = M.cpu() if isinstance(M, Tensor) and config.keep_covariance else None
        shed = M.shed if isinstance(M, CovarianceSketch) else None
        joined[name] = _Joined(found.V, found.share, _trace(M, gradients), old, found.new, shed, kept)
        done.append((S, added, mask, energy, joined[name]))
    return joined


def _trace(M: Matrix, gradients: bool) -> float:
    """tr C, of C = GᵀG with ``gradients``."""
    if isinstance(M, CovarianceSketch):
        return M.trace
    return float(M.square().sum() if gradients else M.diagonal().sum())


def _same(one: Subspace, other: Subspace) -> bool:
    return one.by_complement == other.by_complement and torch.equal(one.held, other.held)


def same_update(record: TaskRecord) -> None:
    """What was trained, from rank 0 on every rank: bits that all have, and that the ledger will hold.

    Raises:
        KeepLoraError: the processes trained different things: each has its own gradients, and nobody added them up.
    """
    if not ranks.active():
        return
    what = "comparing what was trained"
    first = ranks.agreed(what, (record.factors, record.full))
    with ranks.together(what):
        for name, update in record.updates.items():
            reference = first[0].get(name, first[1].get(name))
            if reference is None or _distance(update, reference) > SAME:
                raise KeepLoraError(
                    f"the trained update of {name} on rank {ranks.rank()} is not that of rank 0: the gradients were not "
                    "averaged over the processes; train through accelerator.prepare(model) or DistributedDataParallel(model)"
                )
    record.factors, record.full = first


SAME = 1e-3
"""‖B − B₀‖/‖B₀‖ between ranks up to which rounding on unlike machines is the reason."""


def _distance(a: Factors | Tensor, b: Factors | Tensor) -> float:
    a, b = (x.B if isinstance(x, Factors) else x for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm()) / max(float(b.norm()), 1e-30)


def check_budget(learner: ContinualLearner) -> None:
    """`ConfigError` if what is never dropped is over the budget: U₀, which protects the pretrained knowledge, and directions
    of records that do not say what each is worth (format v0)."""
    budget = learner.config.max_basis_bytes
    if budget is None:
        return
    U = learner.U
    start, dims, needed = U.start_dims(), U.dims(), 0
    for name, (n, p) in start.items():
        fixed = p + int((U.in_force(name) & ~_valued(U.records, name)).sum())
        needed += min(held_bytes(n, fixed), held_bytes(n, dims[name]))
    if needed > budget:
        raise ConfigError(
            f"max_basis_bytes is {budget}, but the bases of the pretrained weights alone take {needed} bytes in {len(U)} "
            "targets; raise it, or lower energy_weights (ε_w) so that less of the weights is protected"
        )


def remaining_explained(history: Sequence[TaskRecord], name: str) -> list[float | None]:
    """ε_t of every task of ``history`` at a layer, after what later tasks took out of force; None where it has none.

    This is the ε_t that the backward bound of METHOD.md takes for the updates that come after the last of ``history``: the
    columns are orthonormal, so what a task loses is the sum of its shares along those that went.
    """
    now = in_force(history, name)
    out: list[float | None] = []
    for record in history:
        share, values = record.explained.get(name), record.values.get(name)
        if share is not None and values is not None:
            share = max(0.0, share - float(values.to(torch.float64)[~now[: len(values)]].sum()))
        out.append(share)
    return out


def _fit(learner: ContinualLearner, record: TaskRecord, budget: int) -> None:
    """Take columns, new ones and old, out of force until U fits into ``budget`` bytes, and note what that gives up."""
    dims = learner.U.dims()
    layers, movable = [], {}
    for t in learner.targets:
        movable[t.name] = free = _movable(learner, record, t.name)
        fixed = dims[t.name] + added_columns(record, t.name) - int(free.sum())
        layers.append(Candidates(t.n_in, fixed, _values(learner, record, t.name)[free]))
    chosen = keep_most_valuable(layers, budget)  # what stays in any case fits: `check_budget` saw to it
    given_up: dict[str, dict[str, list[float]]] = {}
    for t, choice in zip(learner.targets, chosen, strict=True):
        if not bool(choice.all()):
            keep = torch.ones(len(movable[t.name]), dtype=torch.bool)
            keep[movable[t.name]] = choice
            given_up[t.name] = _drop(learner, record, t.name, keep)
    if given_up:
        record.info[GIVEN_UP] = given_up
        _tell(record, given_up, budget)


def _valued(records: Sequence[TaskRecord], name: str) -> Tensor:
    """Which of a layer's columns come from a record that says what each is worth."""
    parts = [torch.full((added_columns(r, name),), name in r.values) for r in records]
    return torch.cat([*parts, torch.zeros(0, dtype=torch.bool)])


def _movable(learner: ContinualLearner, record: TaskRecord, name: str) -> Tensor:
    """Which columns may be dropped: the new ones, and of the old those in force whose worth is known."""
    old = _valued(learner.U.records, name) & learner.U.in_force(name)
    return torch.cat([old, torch.ones(added_columns(record, name), dtype=torch.bool)])


def _values(learner: ContinualLearner, record: TaskRecord, name: str) -> Tensor:
    """What each column protects: its share of tr C_t, summed over the learned tasks and this one."""
    out = torch.zeros(len(record.values[name]), dtype=torch.float64)
    for one in [*learner.records, record]:
        if (values := one.values.get(name)) is not None:
            out[: len(values)] += values.to(torch.float64)
    return out


def _drop(learner: ContinualLearner, record: TaskRecord, name: str, keep: Tensor) -> dict[str, list[float]]:
    """Take what ``keep`` leaves out of force at one layer; ε before and after, by task."""
    m = added_columns(record, name)
    old, new = keep[: len(keep) - m], keep[len(keep) - m :]
    history, mask = learner.U.records, learner.U.in_force(name)
    before = remaining_explained(history, name)
    values = record.values[name].to(torch.float64)
    out_of_force = torch.cat([mask & ~old, ~new])
    wanted = record.explained[name]
    record.explained[name] = max(0.0, wanted - float(values[out_of_force].sum()))
    record.basis = {**record.basis, name: record.basis[name][:, new].contiguous()}
    record.values[name] = torch.where(out_of_force, 0.0, values)[torch.cat([torch.ones_like(old), new])].to(
        torch.float32
    )
    if bool((mask & ~old).any()):
        record.kept[name] = torch.cat([mask & old, torch.ones(int(new.sum()), dtype=torch.bool)])
    after = remaining_explained([*history, record], name)
    told = {
        one.name: [was, now]
        for one, was, now in zip(history, before, after, strict=False)
        if was is not None and now is not None and now < was
    }
    if record.explained[name] < wanted:
        told[record.name] = [wanted, record.explained[name]]
    return told


def _tell(record: TaskRecord, given_up: dict[str, dict[str, list[float]]], budget: int) -> None:
    losses = [
        (was - now, layer, task, was, now) for layer, tasks in given_up.items() for task, (was, now) in tasks.items()
    ]
    if not losses:
        return
    _, layer, task, was, now = max(losses)
    tasks = sorted({loss[2] for loss in losses})
    warnings.warn(
        f"task {record.name!r}: the budget of {budget} bytes (max_basis_bytes) leaves no room for every direction; in "
        f"{len(given_up)} targets protection of {', '.join(map(repr, tasks[:3]))}{', …' if len(tasks) > 3 else ''} is given "
        f"up, most of it in {layer}, where {task!r} goes from {100 * was:.2f} % to {100 * now:.2f} %",
        stacklevel=4,
    )
