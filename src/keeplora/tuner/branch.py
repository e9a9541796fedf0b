"""A small module beside a linear, y = W x + branch(x), for adapters that are no plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.tuner.adapter import Factors, ParameterState
from keeplora.tuner.learner import ContinualLearner, OpenTask
from keeplora.tuner.ledger import TaskRecord

BRANCH = "keeplora_branch"
"""Name of the branch among its linear's submodules; its parameters are ``<linear>.keeplora_branch.*``."""


class Branch(nn.Module):
    """ΔW x in some parametrisation of its own: (..., in) float32 -> (..., out). Parameters and buffers are float32."""

    def factors(self) -> Factors:
        """ΔW as it is now, as low-rank factors on the CPU, detached."""
        raise NotImplementedError


def _add_branch(linear: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    # Looked up in the linear, not closed over: a deep copy of the model then runs its own copy of the branch.
    return y + getattr(linear, BRANCH)(args[0].to(torch.float32)).to(y.dtype)


def attach_branches(model: nn.Module, branches: Mapping[str, Branch]) -> Callable[[], None]:
    """Put each branch beside the linear it is named after; from then on nothing but branches requires a gradient.

    Returns:
        A function that takes them out: submodules, hooks, ``requires_grad`` flags and gradients are as they were before.
    """
    linears = {name: model.get_submodule(name) for name in branches}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear) or hasattr(linear, BRANCH):
            raise RuntimeError(f"{name} is no plain linear, or has a branch already")
    state = ParameterState(model)
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    handles = []
    for name, linear in linears.items():
        linear.add_module(BRANCH, branches[name].to(next(linear.parameters()).device))
        handles.append(linear.register_forward_hook(_add_branch))

    def release() -> None:
        for handle, linear in zip(handles, linears.values(), strict=True):
            handle.remove()
            delattr(linear, BRANCH)
        state.restore()

    return release


class BranchLearner(ContinualLearner):
    """A method whose adapter is a `Branch` per target; a subclass says which in `_branches`."""

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    protects: ClassVar[bool] = False

    def _branches(self, task: OpenTask) -> Mapping[str, Branch]:
        """A branch per target that is adapted; each must add zero before it is trained."""
        raise NotImplementedError

    def _attach(self, task: OpenTask) -> nn.Module:
        branches = self._branches(task)
        task.release = attach_branches(self.model, branches)
        task.info["trained_parameters"] = sum(p.numel() for b in branches.values() for p in b.parameters())
        return self.model

    def open_branches(self) -> dict[str, Any]:
        """The open task's branches by target."""
        linears = {t.name: self.store.module(t.name) for t in self.targets}
        return {name: getattr(linear, BRANCH) for name, linear in linears.items() if hasattr(linear, BRANCH)}

    def _detach(self, task: OpenTask) -> TaskRecord:
        factors = {name: branch.factors() for name, branch in self.open_branches().items()}
        for name, f in factors.items():
            if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
                raise FloatingPointError(f"the trained branch of {name} holds NaN or infinity; nothing is merged")
        return TaskRecord(task.name, factors=factors)
