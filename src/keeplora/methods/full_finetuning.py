"""Sequential full fine-tuning of the target weights with the task's own loss, and nothing against forgetting."""

from __future__ import annotations

import torch
from torch import nn

from keeplora.methods.registry import ONE_SCALE, Method, register
from keeplora.tuner.adapter import ParameterState
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord


class FullFineTuning(ContinualLearner):
    """Trains every entry of the target weights; a record holds ΔW whole (no factors)."""

    protects = False

    def _attach(self, task: OpenTask) -> nn.Module:
        task.release = ParameterState(self.model).restore
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        for t in self.targets:
            self.store.module(t.name).weight.requires_grad_(True)
        task.info["trained_parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return self.model

    def _detach(self, task: OpenTask) -> TaskRecord:
        full = {}
        for t in self.targets:
            W = self.store.module(t.name).weight.detach().to("cpu", torch.float32)
            if not torch.isfinite(W).all():
                raise FloatingPointError(f"the trained weight of {t.name} holds NaN or infinity; nothing is kept")
            full[t.name] = W - self.store.current(t.name).to(torch.float32)
        return TaskRecord(task.name, full=full)


register(
    Method("full-ft", "Full fine-tuning", FullFineTuning, "all entries of the target weights, one task after another",
           config=ONE_SCALE)
)  # fmt: skip
