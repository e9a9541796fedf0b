"""The interface of a kind of run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from keeplora.experiment.config import TrainingConfig
from keeplora.experiment.pictures import Batches
from keeplora.tuner import ContinualLearner, KeepLoraConfig


@dataclass
class Sets:
    """A task's samples as the model reads them (map-style datasets); ``validation`` is None unless asked for."""

    train: Any
    test: Any
    validation: Any


class TrainingObjective(Protocol):
    """The loss of one task, as the training loop takes it."""

    @property
    def task(self) -> Any: ...

    @property
    def head(self) -> nn.Parameter | None:
        """Class weights that train beside the adapter, or None."""
        ...

    def training(self) -> AbstractContextManager[object]:
        """Around the task's training loop, when what trains requires its gradients."""
        ...

    def parts(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The batch as what goes through the model at once: one part, or several whose gradients add up."""
        ...

    def count(self, part: Mapping[str, Any]) -> int:
        """Losses in a part: samples, or answer tokens."""
        ...

    def part_loss(self, part: Mapping[str, Any], total: int) -> tuple[Tensor, Tensor | None]:
        """(Σ ℓ over the part / total, the logits [N, C] of a classification or None), differentiable."""
        ...

    def right(self, logits: Tensor, part: Mapping[str, Any]) -> int:
        """How many samples of the part the logits name rightly."""
        ...


class Kind(Protocol):
    """One kind of run, made once per run from (config, family, precision, method, tasks, probes)."""

    name: ClassVar[str]
    family: Any

    def sets(self, task: Any) -> Sets:
        """The task's data for the model; refuses now what the model could not read later."""
        ...

    def data_set(self, samples: Any) -> Any:
        """Samples to be scored, for a set that is neither a task's nor a probe's (a guard)."""
        ...

    def default_targets(self) -> Mapping[str, Any]:
        """`KeepLoraConfig` entries where the configuration names no modules."""
        ...

    def info(self, task: Any) -> dict[str, Any]:
        """What the task's record must hold for the model to be used later."""
        ...

    def objective(self, task: Any) -> Any: ...

    def prepare_head(self, objective: Any, data: Any, training: TrainingConfig) -> None:
        """Start what trains beside the adapter, where the method has such a thing."""
        ...

    def statistics(
        self, objective: Any, data: Any, training: TrainingConfig, config: KeepLoraConfig, seed: int
    ) -> dict[str, Any]:
        """The arguments of `ContinualLearner.start_task` that bring the task's data and losses."""
        ...

    def batches(self, objective: Any, data: Any, training: TrainingConfig, seed: int) -> Batches:
        """Training batches, in another order each epoch."""
        ...

    def first_batch(self, objective: Any, data: Any, training: TrainingConfig) -> tuple[Any, int]:
        """(a batch as the statistics take it, its samples): what `--dry-run` times."""
        ...

    def score(
        self, task: Any, data: Any, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None, keep: Path | None = None,
    ) -> float | None:  # fmt: skip
        """Percent score of the model as it is now on ``data``; None where this machine cannot compute it.

        Args:
            head: class weights that are being trained. keep: a file to write every answer to.
        """
        ...

    def per_sample(
        self, task: Any, data: Any, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None,
    ) -> list[float]:  # fmt: skip
        """What every sample of ``data`` earns with the model as it is now, 0 to 100, in the set's order; in one process alone."""
        ...

    def evaluation(self, learner: ContinualLearner) -> AbstractContextManager[object]:
        """Around the scores of one row of the accuracy matrix: no weight changes inside."""
        ...

    def steps(self, data: Any) -> int:
        """How often `score` will call ``on_batch``."""
        ...

    def results(self) -> dict[str, Any]:
        """The entries of results.json that this kind alone has."""
        ...

    def comparison(self) -> list[Any]:
        """What must be equal, beside model and data, for two runs' numbers to stand in one table."""
        ...

    def running(self, learner: ContinualLearner) -> AbstractContextManager[object]:
        """Around everything that a run does with the model."""
        ...

    def begin(self, folder: Path, earlier: Mapping[str, Any] | None) -> None:
        """Before the first evaluation: ``folder`` is the run directory, ``earlier`` the results.json of a resumed run."""
        ...

    def repeat(self, after: int) -> None:
        """The evaluation ``after`` is that of ``after - 1``: nothing moved in between."""
        ...

    def warnings(self) -> list[str]:
        """Sentences that came up while scoring, each told once."""
        ...
