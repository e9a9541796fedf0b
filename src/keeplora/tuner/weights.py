"""The running model's target weights: W₀ + Σ sBA, summed in float32 and rounded once (METHOD.md, point 6)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keeplora.errors import KeepLoraError, TargetError
from keeplora.tuner.adapter import Factors
from keeplora.tuner.linear_algebra import LinearAlgebra
from keeplora.tuner.quantised import quantisation

T = TypeVar("T")

Update = Factors | Tensor
"""ΔW of one weight by one task: low-rank factors, or the whole matrix in float32."""
Snapshot = dict[str, tuple[Update, ...]]
"""The updates of each weight in task order."""


class _Computed(Mapping[str, Tensor]):
    """A mapping whose values are made when they are asked for, one at a time."""

    def __init__(self, names: Callable[[], Collection[str]], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


@dataclass(frozen=True)
class ServingCost:
    """What the learned tasks cost at inference beside the base model: nothing where they are merged.

    Attributes:
        layers: linears that carry an adapter of past tasks. rank: the largest summed rank among them.
        bytes: float32 factors that are held, and read once per token when tokens are decoded one at a time.
        flops_per_token: extra floating-point operations, 2 R (in + out) summed over the layers.
        base_flops_per_token: those of the targets without any adapter, 2 · in · out summed.
    """

    layers: int = 0
    rank: int = 0
    bytes: int = 0
    flops_per_token: int = 0
    base_flops_per_token: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.layers:
            return "past tasks are merged: no cost at inference"
        share = self.flops_per_token / max(1, self.base_flops_per_token)
        return (
            f"past tasks run as one adapter beside {self.layers} layers, rank up to {self.rank}: "
            f"{self.flops_per_token / 1e6:.3g} MFLOP per token ({share:.1%} of these layers' own) and "
            f"{self.bytes / 2**20:.3g} MiB"
        )


class WeightStore:
    """Keeps W₀ and every task's update of each target, and writes W = round(W₀ + Σ ΔW) into the model.

    Rounding once, from the sum, is what keeps low-precision models from collecting a rounding error per task; and
    since the sum is taken in task order from the stored factors, a reloaded learner has the same bits.

    Memory: W₀ is copied to the CPU when a weight is first moved or handed out by `parameter`, until then it is the
    model's own tensor. Σ ΔW is summed from the records' factors one weight at a time, and held from when they are more
    numbers than it is; from then on a task adds its own to it, and what was summed before need not be read again. So neither
    a merge nor what it holds grows with the number of tasks beyond the weight's own size.

    Args:
        names: the targets, by the names of their linears.
        parameters: further parameters that a method moves, by their full names.

    Raises:
        TargetError: a target whose weight is quantised: this method needs it whole.
    """

    def __init__(self, model: nn.Module, names: list[str], parameters: Iterable[str] = ()) -> None:
        self._modules: dict[str, nn.Linear] = {}
        for name in names:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            self._modules[name] = module
        self._parameters: dict[str, nn.Parameter] = {}
        for name, module in self._modules.items():
            self._add_target(name, module)
        self._parameters |= {name: model.get_parameter(name) for name in parameters}
        self._versions = {name: _version(p) for name, p in self._parameters.items()}
        self._kept: dict[str, Tensor] = {}
        self.updates: Snapshot = {}
        self._sums: dict[str, tuple[tuple[Update, ...], Tensor]] = {}
        """Σ ΔW per weight, where it is held, and what it is the sum of."""
        self.W0: Mapping[str, Tensor] = _Computed(lambda: self.names, self._original)
        """W₀ per name, on the CPU; not to be written into."""
        self.delta: Mapping[str, Tensor] = _Computed(lambda: self.updates, self._sum)
        """Σ ΔW per target, float32 on the CPU; a target that no task moved is absent."""

    def _add_target(self, name: str, module: nn.Linear) -> None:
        if quantisation(module) is not None:
            raise needs_whole_weight(name)
        self._parameters[name] = cast(nn.Parameter, module.weight)

    def module(self, name: str) -> nn.Linear:
        """The linear itself (PEFT's wrapper may stand in the model's tree at the time)."""
        return self._modules[name]

    def parameter(self, name: str) -> nn.Parameter:
        """The weight of a target, or another parameter by its full name; may be written into while a task is open."""
        self._keep(name)
        return self._parameters[name]

    def keep(self) -> None:
        """Copy every W₀ now, for a time in which others may write into the weights, be it the same values."""
        for name in self._parameters:
            self._keep(name)

    @property
    def names(self) -> list[str]:
        """Targets first, then the further parameters."""
        return [*self._modules, *(name for name in self._parameters if name not in self._modules)]

    def add(self, updates: Mapping[str, Update]) -> None:
        """Σ ← Σ + ΔW, and the model's weights follow."""
        self._check(updates)
        for name, update in updates.items():
            self.updates[name] = (*self.updates.get(name, ()), update)
        self.write(updates)

    def snapshot(self) -> Snapshot:
        """The updates as they are now, to come back to with `restore`."""
        return dict(self.updates)  # tuples: `add` replaces them

    def restore(self, snapshot: Mapping[str, Update | tuple[Update, ...]]) -> None:
        """Back to an earlier `snapshot`, bit for bit; or to W₀ with the given updates and no others."""
        self._check({name: u for name, us in snapshot.items() for u in (us if isinstance(us, tuple) else (us,))})
        self.updates = {name: u if isinstance(u, tuple) else (u,) for name, u in snapshot.items()}
        self._sums = {name: held for name, held in self._sums.items() if name in self.updates}
        self.write(self.names)

    @torch.no_grad()
    def write(self, names: Iterable[str]) -> None:
        """Write round(W₀ + Σ) into the named modules."""
        for name in names:
            if name in self.updates:
                self._keep(name)
            if name in self._kept:  # of any other weight the model still holds the original
                self._live(name).copy_(self.current(name))

    def current(self, name: str) -> Tensor:
        """W = round(W₀ + Σ) of one target in the model's dtype, on the CPU."""
        W0 = self.W0[name]
        return (W0.to(torch.float32) + self.delta[name]).to(W0.dtype) if name in self.updates else W0

    def running(self, name: str) -> Tensor:
        """The weight that the model computes with, whole."""
        return self._live(name).detach()

    def per_weight(
        self, what: str, names: Sequence[str], work: Callable[[str, Tensor, torch.device], T], algebra: LinearAlgebra
    ) -> dict[str, T]:
        """``work(name, W₀, device)`` for every target's name; of several processes one does it for all of them.

        Args:
            work: W₀ is given on the CPU; ``device`` is where to compute.
        """
        return algebra.spread(what, names, lambda n, device: work(n, self.W0[n], device), self._lies)

    def _lies(self, name: str) -> torch.device:
        return self.module(name).weight.device

    def base_hash(self) -> str:
        """SHA-256 over the targets' names, dtypes, shapes and W₀ bytes: what a ledger's factors belong to."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            for label, W in self._stored(name):
                digest.update(f"{label}|{W.dtype}|{tuple(W.shape)}|".encode())
                digest.update(W.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def serving_cost(self) -> ServingCost:
        """What the learned tasks cost at inference."""
        return ServingCost(base_flops_per_token=sum(2 * m.in_features * m.out_features for m in self._modules.values()))

    def _check(self, updates: Mapping[str, Update]) -> None:
        """Refuse updates that cannot be applied, before any weight moves."""

    def _stored(self, name: str) -> list[tuple[str, Tensor]]:
        """W₀ as the base model stores it: labelled tensors on the CPU."""
        return [(name, self.W0[name])]

    def _original(self, name: str) -> Tensor:
        return self._kept[name] if name in self._kept else self._live(name).detach().to("cpu")

    def _live(self, name: str) -> nn.Parameter:
        """The parameter that the model computes with.

        Raises:
            KeepLoraError: it is not in memory whole: sharded, offloaded, or replaced by another.
        """
        p, module = self._parameters[name], self._modules.get(name)
        if isinstance(p, DTensor) or (module is not None and module.weight is not p):
            raise KeepLoraError(
                f"the weight of {name} was sharded or replaced by another after the learner was made, and not within a task: "
                "shard the base before the learner is made, or within each task the model that start_task returns"
            )
        if p.is_meta:
            raise KeepLoraError(
                f"the weight of {name} is offloaded and not in memory: choose a device_map that keeps the targets on a GPU or "
                "the CPU"
            )
        return p

    def _keep(self, name: str) -> None:
        if name in self._kept:
            return
        p = self._live(name)
        if _version(p) != self._versions[name]:
            raise self._lost(name)
        self._kept[name] = p.detach().to("cpu", copy=True)

    @staticmethod
    def _lost(name: str) -> KeepLoraError:
        return KeepLoraError(
            f"the weight of {name} was changed in place after the learner was made, and not by it, so W₀ is lost; "
            "make the learner after such a change"
        )

    def _sum(self, name: str) -> Tensor:
        updates = self.updates[name]
        done, total = self._sums.get(name, ((), None))
        if total is None or not _begins_with(updates, done):
            done, total = (), None
        for update in updates[len(done) :]:
            delta = update.delta if isinstance(update, Factors) else update.to("cpu", torch.float32)
            total = delta if total is None else total + delta  # one after another: the same bits from either start
        assert total is not None
        self._sums.pop(name, None)
        if len(updates) > 1 and sum(u.numel() for u in updates) >= total.numel():
            self._sums[name] = updates, total
        return total

    def summed(self) -> set[str]:
        """The weights whose Σ is held: their updates are read again only to take one out."""
        return {name for name, (done, _) in self._sums.items() if done is self.updates.get(name)}

    def exchange(self, stored: Mapping[int, Update]) -> None:
        """Put other objects in the place of updates, by their `id`; what they hold is the same."""
        for name, updates in self.updates.items():
            if any(id(u) in stored for u in updates):
                self.updates[name] = tuple(stored.get(id(u), u) for u in updates)
                if name in self._sums and self._sums[name][0] is updates:
                    self._sums[name] = self.updates[name], self._sums[name][1]


def _begins_with(updates: tuple[Update, ...], done: tuple[Update, ...]) -> bool:
    return len(done) <= len(updates) and all(a is b for a, b in zip(done, updates, strict=False))


def needs_whole_weight(name: str) -> TargetError:
    """The refusal of a method that reads or trains whole weights."""
    return TargetError(
        f"{name} is quantised, but this method reads or trains whole weights, which a quantised base does not have: load "
        "the model unquantised (model.quantize: null), or choose a method of low-rank factors (keeplora++, lora, o-lora, "
        "inflora, ...)"
    )


def _version(p: Tensor) -> int:
    return -1 if p.is_inference() else p._version
