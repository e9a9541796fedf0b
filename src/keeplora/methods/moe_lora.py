"""MoELoRA as the CoIN benchmark has it (Chen et al., NeurIPS 2024, arXiv 2403.08350): LoRA experts behind a dense router.

A layer computes, for every token x,

    y = W₀ x + s Σ_j softmax(R x)_j B_j A_j x,   j = 1 … k

with k experts of rank r / k and a router R (k × in); s = alpha / r of the whole. All experts and the router train on every
task, one task after another, and go on from where the last task left them: nothing is kept of earlier tasks, and nothing
holds the experts back. The weights of the sum follow the token, so the update is no matrix that could be added to W₀: the
model itself stays as it is, and the experts run beside it (`MoeLora.serving`).

Where ours differs: A starts as PEFT starts a LoRA's, U(−1/√in, 1/√in), where the authors' code draws N(0, 0.01²); no
dropout; the experts are computed as one LoRA of rank r whose hidden values are weighed, which is the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.basis import Bases
from keeplora.tuner.branch import Branch, BranchLearner, attach_branches
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option
from keeplora.tuner.rank_warning import warn_of_rank
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import Snapshot

PREFIX = "moelora/"
"""A record keeps "moelora/A/<layer>", "moelora/B/<layer>" and "moelora/router/<layer>" as they were after its task."""
Experts = dict[str, Tensor]
"""Of one layer: "A" (r, in) and "B" (out, r), the experts' blocks in order, and "router" (k, in)."""


@dataclass(frozen=True)
class MoeLoraOptions:
    """How the rank is split."""

    experts: int = option(4, "k, the number of experts; tuner.r must be a multiple of it: each has rank r / k")

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ConfigError(f"tuner.options.experts must be at least 1, got {self.experts!r}")


class ExpertsBranch(Branch):
    """s Σ_j softmax(R x)_j B_j A_j x, for (..., in) float32 -> (..., out)."""

    def __init__(self, experts: Mapping[str, Tensor], s: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(experts["A"].clone()), nn.Parameter(experts["B"].clone())
        self.router = nn.Parameter(experts["router"].clone())
        self.s = s

    def weights(self, x: Tensor) -> Tensor:
        """softmax(R x), (..., k); each row sums to one."""
        return nn.functional.linear(x, self.router).float().softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.A)
        share = self.weights(x).repeat_interleave(self.A.shape[0] // self.router.shape[0], dim=-1)
        return self.s * nn.functional.linear(hidden * share, self.B)

    def experts(self) -> Experts:
        """As they are now, on the CPU."""
        return {key: p.detach().to("cpu", torch.float32, copy=True) for key, p in self.named_parameters()}


class MoeLora(BranchLearner):
    """Trains the experts and the router of every target; outside a task and `serving`, the model is the untouched one."""

    Options: ClassVar[type] = MoeLoraOptions
    unmergeable: ClassVar[str] = (
        "weighs its experts anew for every token, which no adapter or checkpoint of fixed weights holds"
    )
    irremovable: ClassVar[str] = "trains the same experts on every task, so that no part of them belongs to one task"
    _present: Mapping[str, Experts] = {}
    """Experts per layer after the last task; empty before the first."""

    def __init__(
        self, model: nn.Module, config: KeepLoraConfig, *, ledger: str | Path | None = None, base_name: str = "",
        base_revision: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, ledger=ledger, base_name=base_name, base_revision=base_revision)
        for t in self.targets:
            if t.r % self.options.experts:
                raise ConfigError(
                    f"tuner.r is {t.r}, which cannot be split evenly: it must be a multiple of tuner.options.experts, "
                    f"{self.options.experts}"
                )

    def _start(self, target: Target, generator: torch.Generator) -> Experts:
        rows = target.r + self.options.experts
        drawn = torch.empty(rows, target.n_in).uniform_(-1, 1, generator=generator) / target.n_in**0.5
        return {"A": drawn[: target.r], "B": torch.zeros(target.n_out, target.r), "router": drawn[target.r :]}

    def _branches(self, task: OpenTask) -> Mapping[str, ExpertsBranch]:
        warn_of_rank(self, task)
        generator = torch.Generator().manual_seed(self.config.seed * 1009)  # experts are drawn once, for all tasks
        start = self._present or {t.name: self._start(t, generator) for t in self.targets}
        return {t.name: ExpertsBranch(start[t.name], t.s) for t in self.targets}

    def _detach(self, task: OpenTask) -> TaskRecord:
        present = {name: branch.experts() for name, branch in self.open_branches().items()}
        for name, experts in present.items():
            if not all(torch.isfinite(value).all() for value in experts.values()):
                raise FloatingPointError(f"the trained experts of {name} hold NaN or infinity; nothing is kept")
        self._present = present
        tensors = {f"{PREFIX}{key}/{name}": value for name, e in present.items() for key, value in e.items()}
        return TaskRecord(task.name, tensors=tensors)

    def _undo(self, snapshot: Snapshot, U: Bases | None) -> None:
        super()._undo(snapshot, U)
        self._recall(self.records)

    def _recall(self, records: Sequence[TaskRecord]) -> None:
        self._present = {}
        for record in reversed(records):
            if any(key.startswith(PREFIX) for key in record.tensors):
                keys = ("A", "B", "router")
                self._present = {
                    t.name: {k: record.tensors[f"{PREFIX}{k}/{t.name}"] for k in keys} for t in self.targets
                }
                return

    @contextlib.contextmanager
    def serving(self, task: str | None) -> Iterator[None]:
        """The experts beside the model, whatever the task; they are there already while one trains."""
        if not self._present or self.open_branches():
            yield
            return
        branches = {t.name: ExpertsBranch(self._present[t.name], t.s) for t in self.targets}
        release = attach_branches(self.model, branches)
        for branch in branches.values():
            branch.requires_grad_(False)
        try:
            yield
        finally:
            release()

    def planned_parameters(self) -> int:
        k = self.options.experts
        return sum(t.r * (t.n_in + t.n_out) + k * t.n_in for t in self.targets) + self.free.numel()

    def state_bytes(self) -> int:
        """The experts and routers as they are now: earlier states are of no use."""
        return sum(t.numel() * t.element_size() for e in self._present.values() for t in e.values())


register(
    Method("moelora", "MoELoRA", MoeLora, "LoRA experts weighed by a router for every token, shared by all tasks",
           config=ONE_SCALE, trained="A and B of k experts of rank r / k and a router, per target",
           paper="Chen et al., NeurIPS 2024, arXiv 2403.08350", state="the experts and the router",
           inference="k experts of rank r / k and a router beside every target; never merged",
           search={**LEARNING_RATE, "tuner.options.experts": ("choice", [2, 4, 8])})
)  # fmt: skip
