"""Zero-shot: the untouched model, evaluated as if it had learned; the floor that nobody should fall below."""

from __future__ import annotations

from torch import nn

from keeplora.methods.registry import Method, register
from keeplora.tuner.adapter import ParameterState
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord


class ZeroShot(ContinualLearner):
    """Learns nothing: tasks become records without factors."""

    protects = False

    def planned_parameters(self) -> int:
        return 0

    def _attach(self, task: OpenTask) -> nn.Module:
        task.release = ParameterState(self.model).restore
        for p in self.model.parameters():  # a training loop that serves every method finds nothing to train
            p.requires_grad_(False)
        task.info["trained_parameters"] = 0
        return self.model

    def _detach(self, task: OpenTask) -> TaskRecord:
        return TaskRecord(task.name)


register(Method("zero-shot", "Zero-shot", ZeroShot, "the untouched model; trains nothing", trains=False,
                trained="nothing", search={}, inference="none"))  # fmt: skip
