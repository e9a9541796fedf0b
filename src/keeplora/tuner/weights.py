"""The running model's target weights: W₀ + Σ sBA, summed in float32 and rounded once (METHOD.md, point 6)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

Deltas = Mapping[str, Tensor]
"""ΔW per target name, float32, (out, in)."""


class WeightStore:
    """Keeps W₀ of every target and the float32 sum of the updates, and writes W = round(W₀ + Σ ΔW) into the model.

    Rounding once, from the sum, is what keeps low-precision models from collecting a rounding error per task; and
    since the sum is taken in task order from the stored factors, a reloaded learner has the same bits.

    Args:
        names: the targets, by the names of their linears.
        parameters: further parameters that a method moves, by their full names.
    """

    def __init__(self, model: nn.Module, names: list[str], parameters: Iterable[str] = ()) -> None:
        self._modules: dict[str, nn.Linear] = {}
        for name in names:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            self._modules[name] = module
        self._parameters: dict[str, nn.Parameter] = {
            name: cast(nn.Parameter, module.weight) for name, module in self._modules.items()
        }
        self._parameters |= {name: model.get_parameter(name) for name in parameters}
        self.W0: dict[str, Tensor] = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()}
        self.delta: dict[str, Tensor] = {}
        """Σ ΔW per target, float32 on the CPU; a target that no task moved is absent."""

    def module(self, name: str) -> nn.Linear:
        """The linear itself (PEFT's wrapper may stand in the model's tree at the time)."""
        return self._modules[name]

    def parameter(self, name: str) -> nn.Parameter:
        """The weight of a target, or another parameter by its full name."""
        return self._parameters[name]

    @property
    def names(self) -> list[str]:
        """Targets first, then the further parameters."""
        return list(self._parameters)

    def add(self, deltas: Deltas) -> None:
        """Σ ← Σ + ΔW, and the model's weights follow."""
        for name, delta in deltas.items():
            delta = delta.to("cpu", torch.float32)
            self.delta[name] = self.delta[name] + delta if name in self.delta else delta.clone()
        self.write(deltas)

    def snapshot(self) -> dict[str, Tensor]:
        """The sums as they are now, to come back to with `restore`."""
        return dict(self.delta)  # `add` replaces tensors and never writes into them

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Back to an earlier `snapshot`, bit for bit."""
        self.delta = dict(snapshot)
        self.write(self._parameters)

    @torch.no_grad()
    def write(self, names: Mapping[str, object]) -> None:
        """Write round(W₀ + Σ) into the named modules."""
        for name in names:
            self._parameters[name].copy_(self.current(name))

    def current(self, name: str) -> Tensor:
        """W = round(W₀ + Σ) of one target in the model's dtype, on the CPU."""
        W0 = self.W0[name]
        return (W0.to(torch.float32) + self.delta[name]).to(W0.dtype) if name in self.delta else W0

    def base_hash(self) -> str:
        """SHA-256 over the targets' names, dtypes, shapes and W₀ bytes: what a ledger's factors belong to."""
        digest = hashlib.sha256()
        for name in sorted(self.W0):
            W = self.W0[name].contiguous()
            digest.update(f"{name}|{W.dtype}|{tuple(W.shape)}|".encode())
            digest.update(W.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
