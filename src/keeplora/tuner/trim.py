"""A trained update made smaller before it is merged, as far as the task's own training loss allows (beyond the paper).

Interpolating between a model before and after fine-tuning keeps most of what was learned long after it has stopped disturbing
the rest (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). There the share is chosen by hand and for full weights; here it is the
least that keeps a given part of the decrease of the training loss, so that no other data are asked for. B is multiplied: A U = 0
and every bound on ‖B‖ hold as before, the latter tightened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from keeplora.tuner import ranks
from keeplora.tuner.memory import in_smaller_batches
from keeplora.tuner.observers import quiet_model
from keeplora.tuner.passes import sum_and_count
from keeplora.tuner.sampling import to_device
from keeplora.tuner.sharding import going_through, in_step
from keeplora.tuner.statistics import gradient_batches

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.task import OpenTask

WHAT = "the passes that trim the update"
STEPS = 16
"""The factor is a multiple of 1/16, found by bisection: four passes beside the two that tell the decrease."""
TRIM = "trim"
"""Key of a task's info: the factor that B was multiplied by, and the mean training loss without B, with it, and trimmed."""


def trim(learner: ContinualLearner, task: OpenTask, tolerance: float) -> None:
    """Multiply B by the least α of 1/16, 2/16, …, 1 with L(α) ≤ L(1) + δ (L(0) − L(1)); all layers by the same.

    L(α) is the mean loss over the task's training data (those of the gradient pass) with α B in place of B, in evaluation mode.
    Between two multiples L is taken to fall with α, as it does along a line from a pretrained model to a fine-tuned one.

    Args:
        tolerance: δ in [0, 1). The adapter must be in the model, and unwrapped.
    """
    adapter = task.adapter
    if adapter is None:
        return
    weights = [adapter.weights(name)[1] for name in adapter.A0]
    trained = [B.detach().clone() for B in weights]

    @torch.no_grad()
    def loss_at(step: int) -> float:
        for B, whole in zip(weights, trained, strict=True):
            B.copy_(whole * (step / STEPS))
        with going_through(learner.model, WHAT):
            total, count = in_smaller_batches(
                "trimming", gradient_batches(learner, task), lambda b: _loss(learner, task, b)
            )
        total, count = ranks.totals(WHAT, total, count)
        return total / count if count else float("nan")

    before, after = loss_at(0), loss_at(STEPS)
    low, high, found = 0, STEPS, after
    while before > after and high - low > 1:
        middle = (low + high) // 2
        if (loss := loss_at(middle)) <= after + tolerance * (before - after):
            high, found = middle, loss
        else:
            low = middle
    with torch.no_grad():
        for B, whole in zip(weights, trained, strict=True):
            B.copy_(whole if high == STEPS else whole * (high / STEPS))
    task.info[TRIM] = {"factor": high / STEPS, "loss": {"without": before, "whole": after, "trimmed": found}}


def _loss(learner: ContinualLearner, task: OpenTask, batches: Iterable[Any]) -> tuple[float, int]:
    """(Σ ℓ_n, N) over this process's share."""
    device = learner.store.module(learner.targets[0].name).weight.device
    total, count = 0.0, 0
    with quiet_model(learner.model):
        for batch, own in in_step(learner.model, batches, WHAT):
            loss, n = sum_and_count(task.loss_fn(learner.model, to_device(batch, device)), batch)
            if own:
                total, count = total + float(loss), count + n
    return total, count
