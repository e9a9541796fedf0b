"""RegLoRA, the weight part of SEFE (Chen et al., ICML 2025, arXiv 2505.02486): what old tasks moved most stays still.

Each task trains a LoRA of its own and is merged. Afterwards the ``share`` of the entries of B A that are largest in magnitude
are marked, layer by layer; they are taken to carry what the task learned. The loss of a later task gains

    λ · mean |B A| over the marked entries of all earlier tasks,

B and A being the new task's. λ = 2500 and 2 % are the authors' values.

Where ours differs: an entry that two tasks mark counts once, and the mean runs over the marks of all layers together, so
that λ means the same whatever the layers' sizes. SEFE's other part, which rewrites the answers of the training data in
several styles, is a change of the data and left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option

MARKS = "reglora/"
"""Prefix of a target's new marks among a record's tensors: int32 positions in ΔW, row by row, rising."""


@dataclass(frozen=True)
class RegLoraOptions:
    """What is marked, and how much it weighs."""

    lam: float = option(2500.0, "λ of λ · mean |B A| over the marked entries")
    share: float = option(2.0, "percent of each layer's entries that a task marks")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ConfigError(f"tuner.options.lam must be a finite number of at least 0, got {self.lam!r}")
        if not 0 < self.share <= 100:
            raise ConfigError(f"tuner.options.share must lie above 0 and up to 100 percent, got {self.share!r}")


def largest(update: Tensor, percent: float) -> Tensor:
    """Positions of the largest |entries| of a matrix, flat and rising, int64: ``percent`` of all, rounded down, none of 0.

    >>> largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), 50).tolist()
    [1, 2]
    """
    size = update.reshape(-1).abs()
    found = size.topk(int(percent * size.numel() / 100)).indices
    return found[size[found] > 0].sort().values


def pack(positions: Tensor, n: int) -> Tensor:
    """One bit per entry of a matrix of ``n`` entries, set at the positions: uint8 [⌈n / 8⌉]."""
    bits = torch.zeros(-(-n // 8) * 8, dtype=torch.uint8)
    bits[positions.long()] = 1
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """What `pack` packed, as a bool tensor [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).reshape(-1)[:n].bool()


class _MarkedSum(torch.autograd.Function):
    """Σ |B A| over the marked entries. Its gradient is known at once, so that no matrix of the layer's size is kept."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, bits: Tensor) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            A32, B32 = A.detach().float(), B.detach().float()
            update = B32 @ A32
            marked = unpack(bits, update.numel()).reshape(update.shape)
            sign = update.sign() * marked
            ctx.save_for_backward((B32.T @ sign).to(A.dtype), (sign @ A32.T).to(B.dtype))
            return (update * sign).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by_A, by_B = ctx.saved_tensors
        return grads[0] * by_A, grads[0] * by_B, None


def marked_sum(A: Tensor, B: Tensor, bits: Tensor) -> Tensor:
    """Σ |B A| over the entries marked in ``bits`` (`pack`): a scalar, differentiable in A (r, in) and B (out, r)."""
    found = _MarkedSum.apply(A, B, bits)
    assert isinstance(found, Tensor)
    return found


class RegLora(SequentialLora):
    """A and B train, with a penalty on the entries of B A that earlier tasks marked."""

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    Options: ClassVar[type] = RegLoraOptions
    _held: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]] = ()
    """A and B of the open task's layers that have marks, and the marks of all old tasks, packed, on the same device."""
    _count: int = 0

    def marks(self, layer: str) -> Tensor:
        """Positions that the learned tasks marked in a layer, each once, int64."""
        if len(self.records) < len(self.history):
            # A record holds only what its task was the first to mark; with a task taken out, others mark part of it.
            factors = [r.factors[layer] for r in self.records if layer in r.factors]
            found = [largest(f.B @ f.A, self.options.share) for f in factors]
            return torch.cat([torch.zeros(0, dtype=torch.long), *found]).unique()
        found = [r.tensors[MARKS + layer].long() for r in self.records if MARKS + layer in r.tensors]
        return torch.cat([torch.zeros(0, dtype=torch.long), *found])

    def _attach(self, task: OpenTask) -> nn.Module:
        model = super()._attach(task)
        assert task.adapter is not None
        held, self._count = [], 0
        for name in task.adapter.targets:
            A, B = task.adapter.weights(name)
            positions = self.marks(name)
            if len(positions):
                held.append((A, B, pack(positions, B.shape[0] * A.shape[1]).to(A.device)))
                self._count += len(positions)
        self._held = held
        task.when_released(lambda: setattr(self, "_held", ()))
        return model

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        """λ · mean |B A| over the marks; None where there are none."""
        if not self._held or not self.options.lam:
            return None
        total = torch.stack([marked_sum(A, B, bits) for A, B, bits in self._held]).sum()
        return self.options.lam / self._count * total

    def _remember(self, task: OpenTask, record: TaskRecord) -> None:
        for name, f in record.factors.items():
            positions = largest(f.B @ f.A, self.options.share)
            new = positions[~torch.isin(positions, self.marks(name))]
            record.tensors[MARKS + name] = new.to(torch.int32)


register(
    Method("reglora", "RegLoRA", RegLora, "LoRA with a penalty where earlier tasks moved the weights most",
           config=ONE_SCALE, paper="Chen et al., SEFE, ICML 2025, arXiv 2505.02486",
           state="positions of the largest entries of every task's update",
           search={**LEARNING_RATE, "tuner.options.lam": ("log", 1e1, 1e5)})
)  # fmt: skip
