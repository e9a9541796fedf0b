"""O-LoRA (Wang et al., EMNLP 2023 findings, arXiv 2310.14152): a new LoRA per task, pushed to be orthogonal to the old.

The loss of task t gains λ₁ Σ_{i<t} Σ |A_i A_tᵀ| + λ₂ Σ ‖·‖ over the new factors, both sums over all adapted layers: each
old task's update lives in the row space of its A, and the penalty turns the new row space away from it. Old factors are
frozen and their updates stay in the model, which is what merging each task does.

Where ours differs: the learned updates are merged at once instead of being carried as one wide LoRA, which is the same
function; our default λ₂ is 0, as in most of the authors' scripts; A starts from the learner's own seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.options import option


@dataclass(frozen=True)
class OLoraOptions:
    """Weights of the two penalties."""

    lam1: float = option(0.5, "λ₁, weight of Σ |A_old A_newᵀ|.")
    lam2: float = option(0.0, "λ₂, weight of the norms of the new A and B.")

    def __post_init__(self) -> None:
        for name in ("lam1", "lam2"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"tuner.options.{name} must be a finite number of at least 0, got {value!r}")


class OLora(SequentialLora):
    """A and B train, with a penalty on what A shares with the A's of earlier tasks."""

    Options: ClassVar[type] = OLoraOptions
    _held: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]] = ()
    """A and B of the open task's layers, and beside them all old A of the layer, stacked, on the same device."""

    def _attach(self, task: OpenTask) -> nn.Module:
        model = super()._attach(task)
        assert task.adapter is not None
        held = []
        for name in task.adapter.targets:
            A, B = task.adapter.weights(name)
            old = [record.factors[name].A for record in self.records if name in record.factors]
            held.append((A, B, torch.cat([*old, A.new_zeros(0, A.shape[1], device="cpu")]).to(A.device)))
        self._held = held
        task.when_released(lambda: setattr(self, "_held", ()))
        return model

    def state_bytes(self) -> int:
        """The old A's, which the penalty reads."""
        old = [f.A for record in self.records for f in record.factors.values()]
        return super().state_bytes() + sum(A.numel() * A.element_size() for A in old)

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        """λ₁ Σ |A_old A_newᵀ| + λ₂ (Σ ‖A_new‖ + Σ ‖B_new‖); None where both are zero by themselves."""
        terms = []
        for A, B, old in self._held:
            if self.options.lam1 and len(old):
                terms.append(self.options.lam1 * (old @ A.float().T).abs().sum())
            if self.options.lam2:
                terms.append(self.options.lam2 * (A.float().norm() + B.float().norm()))
        return torch.stack(terms).sum() if terms else None


register(
    Method("o-lora", "O-LoRA", OLora, "LoRA with a penalty on the overlap of its A with those of earlier tasks",
           config=ONE_SCALE, paper="Wang et al., EMNLP 2023 findings, arXiv 2310.14152", state="A of every task and target",
           search={**LEARNING_RATE, "tuner.options.lam1": ("log", 1e-2, 1e1)})
)  # fmt: skip
