"""WiSE-FT between tasks: fine-tune, then go back part of the way."""

from __future__ import annotations

from dataclasses import dataclass

from keeplora.errors import ConfigError
from keeplora.methods.full_finetuning import FullFineTuning
from keeplora.methods.registry import FULL_LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option


@dataclass(frozen=True)
class WiseFTOptions:
    """Settings of ``wise-ft``."""

    keep: float = option(0.8, "share of the fine-tuned weights in the mixture with those before the task, 0 to 1")

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"tuner.options.keep must lie between 0 and 1, got {self.keep!r}")


class WiseFT(FullFineTuning):
    """θ ← keep · θ_fine-tuned + (1 − keep) · θ_before after each task, which leaves keep · ΔW of the task's change.

    Wortsman et al. (2109.01903), as ZSCL (2303.06628) uses it in a sequence: the mixture is with the weights before the
    task, where the paper, which has one task, mixes with the pretrained ones. Target weights alone train and mix.
    """

    Options = WiseFTOptions

    def _detach(self, task: OpenTask) -> TaskRecord:
        record = super()._detach(task)
        record.full = {name: self.options.keep * delta for name, delta in record.full.items()}
        return record


register(
    Method("wise-ft", "WiSE-FT", WiseFT, "full fine-tuning, then a mixture with the weights before the task",
           config=ONE_SCALE, trained="all target weights", paper="Wortsman et al., arXiv 2109.01903",
           search={**FULL_LEARNING_RATE, "tuner.options.keep": ("uniform", 0.2, 1.0)})
)  # fmt: skip
