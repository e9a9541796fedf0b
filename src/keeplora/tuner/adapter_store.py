"""A store for quantised bases: past tasks are not merged but run as one concatenated adapter (METHOD.md, point 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.tuner.adapter import Factors, concatenate
from keeplora.tuner.quantised import dequantised, keep_layout, quantisation, stored_tensors
from keeplora.tuner.sharded_store import ShardedStore, refuse_quantised
from keeplora.tuner.sharding import is_sharded
from keeplora.tuner.weights import ServingCost, Update, WeightStore, needs_whole_weight

PAST = "keeplora_past"
"""Name of the past tasks' adapter among its linear's submodules."""


class PastAdapter(nn.Module):
    """Σ_t s_t B_t A_t x of the tasks learned so far in one linear, A stacked and s B side by side; nothing trains.

    Its factors stay float32 whatever the base computes in: rounding A would leak into the protected subspace.
    """

    A: Tensor
    B: Tensor

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        # Not persistent: they belong to the ledger, and the base's own state dict stays what it was.
        self.register_buffer("A", factors.A, persistent=False)
        self.register_buffer("B", factors.s * factors.B, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(nn.functional.linear(x.to(torch.float32), self.A), self.B)


def _add_past(linear: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    # Looked up in the linear, not closed over: a deep copy of the model then runs its own copy.
    return (y.to(torch.float32) + getattr(linear, PAST)(args[0])).to(y.dtype)


class AdapterStore(WeightStore):
    """`WeightStore` where some targets are quantised: those keep their weight, and a `PastAdapter` runs beside it.

    The adapter is a submodule and a hook of the linear itself, so module names stay as they are, and the PEFT adapter of
    the task in training wraps both. Targets that are not quantised, and further parameters, are merged as ever.

    Raises:
        KeepLoraError: the model carries the adapters of another learner.
    """

    def __init__(self, model: nn.Module, names: list[str], parameters: Iterable[str] = ()) -> None:
        self._handles: dict[str, Any] = {}
        super().__init__(model, names, parameters)

    def _add_target(self, name: str, module: nn.Linear) -> None:
        if quantisation(module) is None:
            super()._add_target(name, module)
            return
        if hasattr(module, PAST):
            raise KeepLoraError(
                f"{name} carries the past tasks of another learner; load the untouched base model first"
            )

    def is_quantised(self, name: str) -> bool:
        """Whether the target runs with an adapter in place of a merge."""
        return name in self._modules and name not in self._parameters

    @property
    def quantised(self) -> list[str]:
        """The targets that are never merged."""
        return [name for name in self._modules if self.is_quantised(name)]

    def parameter(self, name: str) -> nn.Parameter:
        if self.is_quantised(name):
            raise needs_whole_weight(name)
        return super().parameter(name)

    def current(self, name: str) -> Tensor:
        if self.is_quantised(name):
            raise needs_whole_weight(name)
        return super().current(name)

    def write(self, names: Iterable[str]) -> None:
        """As `WeightStore.write`; a quantised target gets the adapter that its updates add up to."""
        names = list(names)
        super().write([name for name in names if not self.is_quantised(name)])
        for name in names:
            if self.is_quantised(name):
                self._set_past(name)

    def serving_cost(self) -> ServingCost:
        past = {name: getattr(self._modules[name], PAST) for name in self.quantised if name in self._handles}
        entries = sum(p.A.numel() + p.B.numel() for p in past.values())
        return ServingCost(
            layers=len(past), rank=max((p.A.shape[0] for p in past.values()), default=0), bytes=4 * entries,
            flops_per_token=2 * entries, base_flops_per_token=super().serving_cost().base_flops_per_token,
        )  # fmt: skip

    def _set_past(self, name: str) -> None:
        module = self._modules[name]
        if (handle := self._handles.pop(name, None)) is not None:
            handle.remove()
            delattr(module, PAST)
        factors = concatenate([u for u in self.updates.get(name, ()) if isinstance(u, Factors)])
        if factors is not None:
            module.add_module(PAST, PastAdapter(factors).to(module.weight.device))
            # First of the linear's hooks: what is hooked on while a task is open sees the layer's whole output.
            self._handles[name] = module.register_forward_hook(_add_past, prepend=True)

    def _check(self, updates: Mapping[str, Update]) -> None:
        for name, update in updates.items():
            if self.is_quantised(name) and not isinstance(update, Factors):
                raise needs_whole_weight(name)

    def _original(self, name: str) -> Tensor:
        return dequantised(self._modules[name]) if self.is_quantised(name) else super()._original(name)

    def _stored(self, name: str) -> list[tuple[str, Tensor]]:
        if not self.is_quantised(name):
            return super()._stored(name)
        return [(f"{name}/{label}", value) for label, value in stored_tensors(self._modules[name]).items()]


def make_store(model: nn.Module, names: list[str], parameters: Iterable[str] = ()) -> WeightStore:
    """The store that the targets ask for: merged weights, whole or sharded, or adapters beside a quantised base.

    Raises:
        TargetError: a quantised linear anywhere in the model that could not be read, or would pass no gradient.
    """
    keep_layout(model)
    if is_sharded(model):
        refuse_quantised(model, names)
        return ShardedStore(model, names, parameters)
    quantised = any(quantisation(model.get_submodule(name)) is not None for name in names)
    return (AdapterStore if quantised else WeightStore)(model, names, parameters)
