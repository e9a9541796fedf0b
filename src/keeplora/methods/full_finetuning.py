"""Sequential full fine-tuning with the task's own loss, and nothing against forgetting: target weights, or all parameters."""

from __future__ import annotations

import torch
from torch import nn

from keeplora.methods.registry import FULL_LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.adapter import ParameterState
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.weights import WeightStore


class FullFineTuning(ContinualLearner):
    """Trains every entry of the store's weights; a record holds ΔW whole (no factors)."""

    protects = False

    def planned_parameters(self) -> int:
        return sum(self.store.parameter(name).numel() for name in self.store.names)

    def _attach(self, task: OpenTask) -> nn.Module:
        task.release = ParameterState(self.model).restore
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        for name in self.store.names:
            self.store.parameter(name).requires_grad_(True)
        task.info["trained_parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return self.model

    def _detach(self, task: OpenTask) -> TaskRecord:
        full = {}
        for name in self.store.names:
            W = self.store.parameter(name).detach().to("cpu", torch.float32)
            if not torch.isfinite(W).all():
                raise FloatingPointError(f"the trained weight of {name} holds NaN or infinity; nothing is kept")
            full[name] = W - self.store.current(name).to(torch.float32)
        return TaskRecord(task.name, full=full)


class FullFineTuningAll(FullFineTuning):
    """Trains every parameter of the model: embeddings, norms, biases, projections and ``logit_scale`` with the targets.

    This is the "continual fine-tuning" of MTIL's tables (ZSCL, Zheng et al., 2303.06628), except that their loop leaves
    ``logit_scale`` as it is. A record holds ΔW of a target under its module's name and of every other parameter under
    the parameter's own; a parameter that the loss does not reach keeps its value.
    """

    def _make_store(self) -> WeightStore:
        names = [t.name for t in self.targets]
        held = {id(self.model.get_submodule(name).weight) for name in names}
        rest = [n for n, p in self.model.named_parameters() if id(p) not in held and p.is_floating_point()]
        return WeightStore(self.model, names, rest)


register(
    Method("full-ft", "Full fine-tuning", FullFineTuning, "all entries of the target weights, one task after another",
           config=ONE_SCALE, search=FULL_LEARNING_RATE, trained="all target weights")
)  # fmt: skip
register(
    Method("full-ft-all", "Full fine-tuning, all parameters", FullFineTuningAll,
           "every parameter of the model, one task after another", config=ONE_SCALE, search=FULL_LEARNING_RATE,
           trained="every parameter", paper="Zheng et al., ZSCL, arXiv 2303.06628")
)  # fmt: skip
