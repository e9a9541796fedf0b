"""The sentence about a rank that no layer can take, once, from every method that has a rank."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from keeplora.tuner.targets import rank_too_large

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.task import OpenTask


def warn_of_rank(learner: ContinualLearner, task: OpenTask) -> None:
    """Warn, before the first task that trains anything, of a rank above min(in, out) of every target of a tower."""
    first = task.saved is None and not any(record.factors or record.tensors for record in learner.records)
    if first and (told := rank_too_large(learner.targets)):
        warnings.warn(told, stacklevel=4)
