"""GPM with LoRA: gradient projection memory (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762), on A of a sequential LoRA.

GPM keeps, per layer, a basis U of the inputs that old tasks used, and takes the gradient's part along it away:
G ← G (I − U Uᵀ). For ΔW = s B A that is A ← A (I − U Uᵀ), so that ΔW U = 0 and old inputs are answered as before.

Where ours differs: A of a LoRA is projected, not a gradient of the whole weight, and *after* each optimiser step, since
AdamW's own rescaling carries a projected gradient back into U (about a tenth of the step). The energy is one number per
tower for all tasks (``energy_features``), where the paper raises it from task to task; and C = Σ x xᵀ is taken over all
samples, or ``feature_samples`` of them, in place of an SVD of some hundred samples' features (M8, with no weight subspace).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.math import Subspace
from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.statistics import report_capacity

LEAK_LIMIT = 1e-4
"""‖A U‖_F / ‖A‖_F beyond which the projection was not made: float32 leaves 1e-6, one AdamW step without it 1e-2."""


class GpmLora(SequentialLora):
    """A and B train; after every step A is projected off the inputs of earlier tasks."""

    protects: ClassVar[bool] = True
    _held: Sequence[tuple[nn.Parameter, Subspace]] = ()
    """A of the open task's layers, and U beside it on the same device."""

    def _initial_A(self, task: OpenTask) -> dict[str, Tensor]:
        A = {}
        for name, random in super()._initial_A(task).items():
            if name in task.frozen:
                continue
            U = self.U.subspace(name)
            a = random[: U.n_in - U.k].to(torch.float64)
            A[name] = U.project_out(U.project_out(a)).to(torch.float32)
        report_capacity(task, self.targets, A, "lower energy_features, or add targets")
        return A

    def _attach(self, task: OpenTask) -> nn.Module:
        model = super()._attach(task)
        assert task.adapter is not None
        held = []
        for name in task.adapter.targets:
            A, _ = task.adapter.weights(name)
            held.append((A, self.U.subspace(name).to(A.device)))
        self._held = held
        task.when_released(lambda: setattr(self, "_held", ()))
        return model

    @torch.no_grad()
    def after_step(self) -> None:
        """A ← A (I − U Uᵀ)."""
        for A, U in self._held:
            A.copy_(U.project_out(A))

    def _detach(self, task: OpenTask) -> TaskRecord:
        record = super()._detach(task)
        for name, f in record.factors.items():
            leak, norm = float((f.A - self.U.subspace(name).project_out(f.A)).norm()), float(f.A.norm())
            if leak > LEAK_LIMIT * norm:
                raise KeepLoraError(
                    f"A of {name} has {leak / norm:.1e} of its norm along protected inputs: it was trained without the "
                    "projection; call the learner's after_step() after every optimiser step"
                )
        return record


register(
    Method("gpm-lora", "GPM-LoRA", GpmLora, "LoRA whose A is projected off old tasks' inputs after every optimiser step",
           config={**ONE_SCALE, "energy_weights": 0.0, "memory": "features"},
           paper="Saha et al., ICLR 2021, arXiv 2103.09762", state="basis U of old inputs per target",
           search={**LEARNING_RATE, "tuner.energy_features": ("choice", [0.9, 0.95, 0.99])})
)  # fmt: skip
