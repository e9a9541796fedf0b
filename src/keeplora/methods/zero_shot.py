"""Zero-shot: the untouched model, evaluated as if it had learned; the floor that nobody should fall below."""

from __future__ import annotations

from torch import Tensor, nn

from keeplora.methods.registry import Method, register
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord


class ZeroShot(ContinualLearner):
    """Learns nothing: tasks become records without factors."""

    protects = False

    def _attach(self, task: OpenTask) -> nn.Module:
        self._flags = {p: p.requires_grad for p in self.model.parameters()}
        for p in self._flags:  # a training loop that serves every method finds nothing to train
            p.requires_grad_(False)
        task.info["trained_parameters"] = 0
        return self.model

    def _release(self) -> None:
        for p, flag in self._flags.items():
            p.requires_grad_(flag)

    def _detach(self, task: OpenTask) -> TaskRecord:
        self._release()
        return TaskRecord(task.name)

    def _undo(self, snapshot: dict[str, Tensor], U: dict[str, Tensor] | None) -> None:
        self._release()
        super()._undo(snapshot, U)

    def _protect(self, task: OpenTask, record: TaskRecord) -> None:
        pass


register(Method("zero-shot", "Zero-shot", ZeroShot, "the untouched model; trains nothing", trains=False))
