"""What the learner and several baselines take from a task's data before or after training, and what they say of capacity."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

from keeplora.errors import CapacityError
from keeplora.tuner import ranks
from keeplora.tuner.observers import FeatureObserver, collect_features
from keeplora.tuner.sampling import statistics_batches
from keeplora.tuner.targets import Target

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner, OpenTask


def task_features(learner: ContinualLearner, task: OpenTask) -> FeatureObserver:
    """C of every target over the task's data at the model's present weights (M8); the adapter must be out."""
    config, batches = learner.config, task.feature_batches
    if batches is None:
        batches = statistics_batches(task.batches, config.feature_samples, config.seed, task.labels)
    elif ranks.active() and isinstance(batches, DataLoader):
        batches = statistics_batches(batches, None, config.seed)
    return collect_features(
        learner.model, learner.targets, learner.store, batches, task.forward_fn or task.loss_fn, task.mask_fn
    )


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
