"""The store of a base that FSDP2 or ZeRO-3 has sharded: every process keeps, and moves, its own rows of W₀ + Σ s B A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keeplora.errors import KeepLoraError
from keeplora.tuner.adapter import Factors
from keeplora.tuner.linear_algebra import LinearAlgebra
from keeplora.tuner.quantised import quantisation
from keeplora.tuner.sharding import Stretch, held, is_partitioned, joined_up, per_weight, settle, stretch
from keeplora.tuner.weights import Update, WeightStore
from keeplora.tuner.zero3 import is_divided

T = TypeVar("T")


class ShardedStore(WeightStore):
    """`WeightStore` where weights are sharded. No process ever holds more than one of them whole.

    A merge needs no message: rows of W₀ + Σ s B A follow from the rows of W₀ and of B. What reads a whole weight (`W0`,
    `current`, `running`) puts it together from all processes, so all must ask for the same weight at once.

    Raises:
        KeepLoraError: the base is sharded in a way that cannot be read, or by DeepSpeed's own engine.
    """

    def __init__(self, model: nn.Module, names: list[str], parameters: Iterable[str] = ()) -> None:
        settle(model)
        self._model = model
        super().__init__(model, names, parameters)
        self._where: dict[str, Stretch] = {}
        self._hash: str | None = None
        divided = is_divided(model)
        for name, p in self._parameters.items():
            if is_partitioned(p) and not divided:
                raise KeepLoraError(
                    f"the weight of {name} was partitioned by DeepSpeed ZeRO-3 before the learner was made: make the learner "
                    "first, and give DeepSpeed the model that start_task returns; or shard the base with fully_shard"
                )
            if isinstance(p, DTensor) or is_partitioned(p):
                self._where[name] = stretch(name, p)
        self._versions = {name: self._piece(name)._version for name in self._where} | {
            name: version for name, version in self._versions.items() if name not in self._where
        }

    def parameter(self, name: str) -> nn.Parameter:
        if name in self._where:
            raise KeepLoraError(
                f"the weight of {name} is sharded, but this method reads or trains whole weights: leave it out "
                "of the sharding (fully_shard's ignored_params), do not shard, or choose a method of low-rank factors"
            )
        return super().parameter(name)

    def base_hash(self) -> str:
        """As `WeightStore.base_hash`, put together once: whoever asks again may be alone."""
        if self._hash is None:
            self._hash = super().base_hash()
        return self._hash

    def per_weight(
        self, what: str, names: Sequence[str], work: Callable[[str, Tensor, torch.device], T], algebra: LinearAlgebra
    ) -> dict[str, T]:
        def compute(name: str, W0: Tensor) -> T:
            return algebra.one(name, self._lies(name), lambda device: work(name, W0, device))

        return per_weight(what, names, self.W0.__getitem__, compute)

    @torch.no_grad()
    def write(self, names: Iterable[str]) -> None:
        names = list(names)
        settle(self._model)
        super().write([name for name in names if name not in self._where])
        for name in names:
            if name in self._where:
                if name in self.updates:
                    self._keep(name)
                if name in self._kept:
                    self._piece(name).copy_(self._moved(name))
                    self._versions[name] = self._piece(name)._version

    def current(self, name: str) -> Tensor:
        if name not in self._where:
            return super().current(name)
        return joined_up(name, self._moved(name), self._where[name])

    def running(self, name: str) -> Tensor:
        if name not in self._where:
            return super().running(name)
        settle(self._model)
        return joined_up(name, self._piece(name), self._where[name])

    def _piece(self, name: str) -> Tensor:
        """The live rows."""
        p, module = self._parameters[name], self._modules.get(name)
        if module is not None and module.weight is not p:
            raise KeepLoraError(
                f"the weight of {name} was replaced by another: shard the base once, before the learner is made, and leave the "
                "model that start_task returns as it is (its B is sharded with the base)"
            )
        return held(p, self._where[name])

    def _original(self, name: str) -> Tensor:
        if name not in self._where:
            return super()._original(name)
        settle(self._model)
        kept = self._kept[name] if name in self._kept else self._piece(name)
        return joined_up(name, kept, self._where[name])

    def _keep(self, name: str) -> None:
        if name not in self._where:
            super()._keep(name)
            return
        if name in self._kept:
            return
        settle(self._model)
        piece = self._piece(name)
        if piece._version != self._versions[name]:
            raise self._lost(name)
        self._kept[name] = piece.to("cpu", copy=True)

    def _moved(self, name: str) -> Tensor:
        """This process's rows of W₀ + Σ ΔW, flat, in the model's dtype, on the CPU: in the order of `WeightStore.current`."""
        where = self._where[name]
        W0 = self._kept[name] if name in self._kept else self._piece(name).to("cpu")
        if name not in self.updates:
            return W0
        first, *rest = (_rows(update, where) for update in self.updates[name])
        for delta in rest:
            first = first + delta
        return (W0.to(torch.float32) + first).to(W0.dtype)


def _rows(update: Update, where: Stretch) -> Tensor:
    """A stretch of ΔW, flat, float32."""
    if isinstance(update, Factors):
        update = Factors(update.A, update.B[where.rows], update.s).delta
        return where.of_rows(update)
    return update.to("cpu", torch.float32).reshape(-1)[where.start : where.end]


def refuse_quantised(model: nn.Module, names: Sequence[str]) -> None:
    """`KeepLoraError` where a quantised target is part of a sharded model."""
    for name in names:
        if quantisation(model.get_submodule(name)) is not None:
            raise KeepLoraError(
                f"{name} is quantised and the model is sharded: that is not supported; load the model in bf16 to shard it, or "
                "leave it whole in every process"
            )
