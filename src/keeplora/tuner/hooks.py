"""What a method says of itself, and what it may add to a task; by default, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from keeplora.tuner.options import NoOptions

if TYPE_CHECKING:
    from keeplora.tuner.records import TaskRecord
    from keeplora.tuner.task import OpenTask


class MethodHooks:
    """The part of a learner that says which kind of method it is, and what it adds to a task; KeepLoRA++ adds nothing here."""

    trains_A: ClassVar[bool] = False
    """Whether A trains as well (plain LoRA)."""
    protects: ClassVar[bool] = True
    """Whether the method keeps protected subspaces at all."""
    accumulates: ClassVar[bool] = True
    """Whether updates add up in the model. False: it stays at W₀, and `serving` puts a task's update in."""
    schedule: ClassVar[str] = "sequential"
    """"sequential", or "joint": one training on the data of all tasks, after the last has come."""
    needs_reference: ClassVar[bool] = False
    """Whether `start_task` must be given a reference set."""
    unmergeable: ClassVar[str] = ""
    """Why no single model holds what was learned, as words that follow the method's name; empty where one does."""
    penalty_of_batch: ClassVar[bool] = False
    """Whether `penalty` is made of the batch that it is given, so that a batch in parts needs it for each of them."""
    irremovable: ClassVar[str] = ""
    """Why no single task can be taken out, as words that follow the method's name; empty where what a method holds is a
    function of `records`, in any selection. `rollback` works for every method."""
    single_process: ClassVar[str] = ""
    """Why the method cannot learn in several processes, as words that follow its name; empty where it can."""
    shards_B: bool = True
    """Whether B is sharded where the base is, and its gradient averaged by FSDP2; False: whoever trains adds gradients up."""
    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass of the method's own settings; `options` is an instance of it, from ``config.options``."""

    # ---- what a training loop and whoever serves the model call ---------------------------------------------------

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        """What the method adds to the task's loss of a training batch: a scalar, or None.

        A training loop calls it between the forward pass and ``backward()``: ``loss = task_loss + (penalty or 0)``.
        """
        return None

    def after_step(self) -> None:
        """What the method does to the weights after each optimiser step; a training loop calls it there."""

    def readout(self, image_features: Tensor, logits: Tensor, classes: Sequence[str]) -> Tensor:
        """The final logits [N, C] of pictures against the candidate ``classes``: the model's own unless a method changes them.

        Args:
            image_features: [N, D], unit norm. logits: [N, C], the model's own.
        """
        return logits

    @contextlib.contextmanager
    def serving(self, task: str | None) -> Iterator[None]:
        """The model as it answers for ``task``; only methods that are told the task at test time differ by it."""
        yield

    # ---- around the weights ---------------------------------------------------------------------------------------

    def _remember(self, task: OpenTask, record: TaskRecord) -> None:
        """After the merge: put into ``record.tensors`` what must outlive the task beside its update."""

    def _recall(self, records: Sequence[TaskRecord]) -> None:
        """After loading: rebuild whatever the method derives from its records."""

    def _told(self) -> dict[str, Any]:
        """What a ledger says of the method, for those who read it without one."""
        told: Any = type(self)
        return {
            "class": told.__name__, "protects": told.protects, "trains_a": told.trains_A,
            "accumulates": told.accumulates, "irremovable": told.irremovable, "unmergeable": told.unmergeable,
        }  # fmt: skip
