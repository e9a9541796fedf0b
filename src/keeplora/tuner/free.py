"""Modules that train in full and are not protected: the reference leaves LLaVA's projector so (`free_modules`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.targets import Target, resolve_free
from keeplora.tuner.task import OpenTask
from keeplora.tuner.weights import WeightStore


class FreeModules:
    """Weights and biases of the linears that ``config.free_modules`` names; empty where it names none.

    A task's ΔW of them goes into `TaskRecord.full` under the parameters' names and is merged by the store.
    """

    def __init__(self, model: nn.Module, config: KeepLoraConfig, targets: Sequence[Target]) -> None:
        self.modules: list[str] = resolve_free(model, config, targets)
        self.parameters: list[str] = [
            f"{name}.{key}"
            for name in self.modules
            for key, _ in model.get_submodule(name).named_parameters(recurse=False)
        ]
        self._model = model

    def numel(self) -> int:
        """Entries that train."""
        return sum(self._model.get_parameter(name).numel() for name in self.parameters)

    def open(self, task: OpenTask, store: WeightStore) -> None:
        """Let them train beside what the method attached, unless the method trains nothing by steps."""
        if not self.parameters or not any(p.requires_grad for p in self._model.parameters()):
            return
        for name in self.parameters:
            p = store.parameter(name)
            if not p.requires_grad:
                p.requires_grad_(True)
                task.info["trained_parameters"] = task.info.get("trained_parameters", 0) + p.numel()
        task.info["free_modules"] = list(self.modules)

    def updates(self, task: OpenTask, store: WeightStore) -> dict[str, Tensor]:
        """ΔW per parameter, float32 on the CPU, against the store's present state; call it before the store writes."""
        out: dict[str, Tensor] = {}
        if "free_modules" not in task.info:
            return out
        for name in self.parameters:
            W = store.parameter(name).detach().to("cpu", torch.float32)
            if not torch.isfinite(W).all():
                raise FloatingPointError(f"the trained {name} holds NaN or infinity; nothing is merged")
            out[name] = W - store.current(name).to(torch.float32)
        return out
