"""Sequential full fine-tuning of the target weights with the task's own loss, and nothing against forgetting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keeplora.methods.registry import Method, register
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord


class FullFineTuning(ContinualLearner):
    """Trains every entry of the target weights; a record holds ΔW whole (no factors)."""

    protects = False

    def _attach(self, task: OpenTask) -> nn.Module:
        self._before = {p: (p.requires_grad, p.grad) for p in self.model.parameters()}
        for p in self._before:
            p.requires_grad_(False)
            p.grad = None
        for t in self.targets:
            self.store.module(t.name).weight.requires_grad_(True)
        task.info["trained_parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return self.model

    def _release(self) -> None:
        for p, (flag, grad) in self._before.items():
            p.requires_grad_(flag)
            p.grad = grad

    def _detach(self, task: OpenTask) -> TaskRecord:
        self._release()
        full = {}
        for t in self.targets:
            W = self.store.module(t.name).weight.detach().to("cpu", torch.float32)
            if not torch.isfinite(W).all():
                raise FloatingPointError(f"the trained weight of {t.name} holds NaN or infinity; nothing is kept")
            full[t.name] = W - self.store.current(t.name).to(torch.float32)
        return TaskRecord(task.name, full=full)

    def _undo(self, snapshot: dict[str, Tensor], U: dict[str, Tensor] | None) -> None:
        self._release()
        super()._undo(snapshot, U)

    def _protect(self, task: OpenTask, record: TaskRecord) -> None:
        pass


register(
    Method("full-ft", "Full fine-tuning", FullFineTuning, "all entries of the target weights, one task after another",
           config={"gamma": 1.0, "schedule": "constant"})
)  # fmt: skip
