"""Sequential LoRA: a fresh, stock LoRA per task, A random and trained, merged after each task (Hu et al., 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor

from keeplora.methods.registry import ONE_SCALE, Method, register
from keeplora.tuner.adapter import random_factor
from keeplora.tuner.learner import ContinualLearner, OpenTask


class SequentialLora(ContinualLearner):
    """A and B train; nothing is protected. A starts as PEFT starts it, from the learner's seed and count of tasks."""

    trains_A = True
    protects = False

    def _initial_A(self, task: OpenTask) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + len(self.history))
        return {t.name: random_factor(t, generator) for t in self.targets}


register(
    Method("lora", "Sequential LoRA", SequentialLora, "plain LoRA, one task after another, merged after each",
           config=ONE_SCALE, paper="Hu et al., arXiv 2106.09685")
)  # fmt: skip
