"""Sequential LoRA: a fresh, stock LoRA per task, A random and trained, merged after each task (Hu et al., 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor

from keeplora.methods.registry import Method, register
from keeplora.tuner.adapter import random_factor
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord


class SequentialLora(ContinualLearner):
    """A and B train; nothing is protected. A starts as PEFT starts it, from the learner's own seed and task count."""

    trains_A = True
    protects = False

    def _initial_A(self, task: OpenTask) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + len(self.records))
        return {t.name: random_factor(t, generator) for t in self.targets}

    def _protect(self, task: OpenTask, record: TaskRecord) -> None:
        pass


register(
    Method("lora", "Sequential LoRA", SequentialLora, "plain LoRA, one task after another, merged after each",
           config={"gamma": 1.0, "schedule": "constant"})
)  # fmt: skip
