"""What the learner and several baselines take from a task's data before or after training, and what they say of capacity."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from keeplora.errors import CapacityError, ConfigError
from keeplora.math import Subspace, residual_factor
from keeplora.tuner import ranks
from keeplora.tuner.convergence import BasisChange, Enough, FactorChange, growth
from keeplora.tuner.observers import FeatureObserver
from keeplora.tuner.passes import collect_features, collect_gradients
from keeplora.tuner.sampling import statistics_batches
from keeplora.tuner.sketching import gradients_for_factor
from keeplora.tuner.targets import Target

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner, OpenTask


def task_features(learner: ContinualLearner, task: OpenTask, *, exact: bool = False) -> FeatureObserver:
    """C of every target over the task's data at the model's present weights (M8); the adapter must be out.

    ``exact``: C itself also where the config asks for a sketch.
    """
    config, batches = learner.config, task.feature_batches
    tolerance, enough = config.statistics_tolerance, None
    if batches is None:
        batches = statistics_batches(
            task.batches, config.feature_samples, config.seed, task.labels, endable=tolerance is not None
        )
    elif ranks.active() and isinstance(batches, DataLoader):  # of several processes each gets its own share
        batches = statistics_batches(batches, None, config.seed)
    if tolerance is not None:
        enough = Enough(tolerance, BasisChange(learner.U.subspace, learner.feature_energy, algebra=learner.algebra))
    found = collect_features(
        learner.model, learner.targets, learner.store, batches, task.forward_fn or task.loss_fn, task.mask_fn, enough,
        None if exact else config.covariance_sketch,
    )  # fmt: skip
    _note(task, "features", enough)
    return found


def shielded(learner: ContinualLearner, task: OpenTask) -> Callable[[str], Subspace]:
    """Per target, what the task's A is kept off: U, and beside it what ``energy_general`` (ε_g) takes of the general samples.

    With C_g = Σ x xᵀ over ``general_batches`` at the weights before the task, the leading eigenvectors of (I − P) C_g (I − P)
    join U for this task alone until they and U explain ε_g · tr C_g. What the model makes of those samples then moves by at
    most Σ_x ‖sBAx‖² ≤ s² ‖B‖₂² (1 − ε_g) tr C_g per layer: the backward bound, for samples of no task. A target that they do
    not reach is left to U. Nothing is carried to the next task but through A.
    """
    U = learner.U
    share = {t.name: learner.config.for_tower("energy_general", t.tower) for t in learner.targets}
    asked = [t for t in learner.targets if t.name not in task.frozen and share[t.name] > 0]
    if not asked:
        return U.subspace
    if task.general_batches is None:
        raise ConfigError(
            f"task {task.name!r}: energy_general keeps a task off the features of general samples, and there are none: give "
            "start_task general_batches, or set energy_general to 0"
        )
    batches = statistics_batches(task.general_batches, None, learner.config.seed)
    found = collect_features(
        learner.model, asked, learner.store, batches, task.forward_fn or task.loss_fn, task.mask_fn,
        sketch=learner.config.covariance_sketch, all_fire=False,
    )  # fmt: skip
    names = [t.name for t in asked if t.name in found.fired]

    def leading(name: str, device: torch.device) -> Tensor:
        return growth(U.subspace(name).to(device), found.C(name).to(device), share[name]).V.cpu()

    V = learner.algebra.spread("the features of general samples", names, leading, lambda name: found.C(name).device)
    grown = {name: U.subspace(name).extended(v) for name, v in V.items()}
    return lambda name: grown[name] if name in grown else U.subspace(name)


def task_factors(learner: ContinualLearner, task: OpenTask) -> dict[str, Tensor]:
    """A of every target that is not frozen, (r', in): the top directions of the residual gradient (M2–M4)."""
    tolerance, room = learner.config.statistics_tolerance, shielded(learner, task)
    targets = [t for t in learner.targets if t.name not in task.frozen]
    change = FactorChange(targets, room, learner.algebra)
    enough = None if tolerance is None else Enough(tolerance, change)
    G = gradients_for_factor(learner, task, targets, gradient_batches(learner, task, enough), enough)
    _note(task, "gradient", enough)
    if enough is not None and enough.checked == enough.samples:  # the comparison that ended the pass has made A
        return change.A
    rank_of = {t.name: t.r for t in targets}

    def factor(name: str, device: torch.device) -> Tensor:
        A = residual_factor(G[name].to(device), room(name).to(device), rank_of[name]).cpu()
        del G[name]  # not before: what a GPU fails at, the CPU needs again
        return A

    return learner.algebra.spread("the residual gradients", list(rank_of), factor, lambda name: G[name].device)


def task_gradients(learner: ContinualLearner, task: OpenTask) -> dict[str, Tensor]:
    """G of every target over the task's data at the model's present weights, to be remembered (M8g)."""
    tolerance, enough = learner.config.statistics_tolerance, None
    if tolerance is not None:
        enough = Enough(
            tolerance, BasisChange(learner.U.subspace, learner.feature_energy, gradients=True, algebra=learner.algebra)
        )
    G = collect_gradients(
        learner.model,
        learner.targets,
        learner.store,
        gradient_batches(learner, task, enough),
        task.loss_fn,
        task.mask_fn,
        enough,
    )
    _note(task, "memory", enough)
    return G


def gradient_batches(learner: ContinualLearner, task: OpenTask, enough: Enough | None = None) -> Iterable[Any]:
    """What a gradient pass goes through: the task's data, or as many samples as ``gradient_samples`` says."""
    samples, seed = learner.config.gradient_samples, learner.config.seed
    return statistics_batches(task.batches, samples, seed, task.labels, endable=enough is not None)


def _note(task: OpenTask, what: str, enough: Enough | None) -> None:
    """Say in the task's info how many samples a pass took that might end early."""
    if enough is not None:
        task.info["statistics"] = {**task.info.get("statistics", {}), what: enough.report()}


def report_capacity(task: OpenTask, targets: Sequence[Target], A: Mapping[str, Tensor], remedy: str) -> None:
    """Note in the task's info which targets got a lower rank than configured and which none; warn of the latter.

    Args:
        A: per target, (r', in); a frozen one may be left out. remedy: what to change, the end of the error's sentence.

    Raises:
        CapacityError: no target has a direction left.
    """
    frozen = [t.name for t in targets if t.name in task.frozen]
    asked = [t for t in targets if t.name not in task.frozen]
    shrunk = [t.name for t in asked if 0 < A[t.name].shape[0] < min(t.r, t.n_in, t.n_out)]
    out = [t.name for t in asked if A[t.name].shape[0] == 0]
    if len(out) == len(asked):
        raise CapacityError(
            f"task {task.name!r} cannot be learned: no target has residual space left (the protected subspaces hold "
            f"every input direction that it uses); {remedy}"
        )
    task.info["rank_shrunk"], task.info["not_adapted"] = shrunk, out
    if frozen:
        task.info["frozen"] = frozen
    if out:
        warnings.warn(
            f"task {task.name!r}: no residual space is left in {len(out)} of {len(targets)} targets, which sit this "
            f"task out: {', '.join(out[:3])}{', …' if len(out) > 3 else ''}",
            stacklevel=5,
        )
