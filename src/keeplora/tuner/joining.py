"""Where several processes learn as one: see to it, before anything is learned, that they begin with the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keeplora.errors import KeepLoraError
from keeplora.tuner import ranks
from keeplora.tuner.sharding import is_sharded

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner


def join(learner: ContinualLearner) -> None:
    """Compare the learners of all processes, and make U in each; does nothing in a process alone.

    Raises:
        KeepLoraError: the method works in one process; configs or weights differ; the model is not in memory whole.
    """
    if not ranks.active():
        return
    if learner.single_process:
        raise KeepLoraError(f"{type(learner).__name__} {learner.single_process}; start it as one process")
    for key in ("statistics_tolerance", "covariance_sketch"):
        if getattr(learner.config, key) is not None:
            raise KeepLoraError(
                f"{key} is for one process: every process would stop, or give up directions, by its own share; leave it at "
                "None, and cap the samples with gradient_samples and feature_samples"
            )
    what = "comparing the models"
    if is_sharded(learner.model):
        learner.store.base_hash()  # put together by all, which could not be waited for below
    with ranks.together(what):
        mine = (learner.config.to_dict(), learner.store.base_hash())
    for r, (config, base) in enumerate(ranks.exchange(what, mine)):
        if config != mine[0]:
            raise KeepLoraError(f"rank {r} has another KeepLoraConfig than rank {ranks.rank()}: give all the same")
        if base != mine[1]:
            raise KeepLoraError(
                f"rank {r} has other weights than rank {ranks.rank()}: load the same checkpoint in every process, or seed the "
                "random numbers before the model is made"
            )
    _ = learner.U  # now, where all are at it: whoever asks later may be alone
