"""What a learner holds of a task while it is being learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from keeplora.tuner.acceptance import Acceptance
from keeplora.tuner.adapter import TaskAdapter
from keeplora.tuner.objective import Objective
from keeplora.tuner.observers import LossFn, MaskFn, attention_masks
from keeplora.tuner.wrapping import Wrapping


@dataclass(frozen=True)
class TaskState:
    """What a learner holds of an open task beside its trained parameters, enough to go on with it in another process.

    Attributes:
        tensors: by name. values: JSON values.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


@dataclass
class OpenTask:
    """A task between `start_task` and `finish_task`."""

    name: str
    batches: Iterable[Any]
    loss_fn: LossFn
    labels: Sequence[int] | None = None
    feature_batches: Iterable[Any] | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    mask_fn: MaskFn = attention_masks
    acceptance: Acceptance | None = None
    objective: Objective | None = None
    reference: Iterable[Any] | None = None
    single_batches: Iterable[Any] | None = None
    """The task's data as batches of one sample, re-iterable, where a batch cannot be cut into samples by itself."""
    general_batches: Iterable[Any] | None = None
    """Samples of no task, for ``energy_general``."""
    frozen: frozenset[str] = frozenset()
    """Targets that are not adapted, by the policy for full layers."""
    adapter: TaskAdapter | None = None
    release: Callable[[], None] | None = None
    """Gives the model back as it was before `_attach`, trained weights aside; None once that is done."""
    wrapping: Wrapping | None = None
    """The model as it was handed to the training loop, where an engine for several processes may wrap it."""
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    statistics_seconds: float = 0.0
    saved: TaskState | None = None
    """What `ContinualLearner.task_state` gave in the process that began the task; the statistics are not taken again."""
    base_norms: dict[str, float] = field(default_factory=dict)
    """‖W₀‖_F of the adapted layers, once somebody has asked."""

    def when_released(self, action: Callable[[], None]) -> None:
        """Have ``action`` called as well when the model is given back: for what a method holds while a task is open."""
        release = self.release

        def both() -> None:
            action()
            if release is not None:
                release()

        self.release = both
