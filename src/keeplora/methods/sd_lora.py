"""SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198): directions are kept, and their magnitudes go on learning.

While task t trains, a layer computes

    y = W₀ x + α_t B_t A_t x + Σ_{i<t} α_i B_i A_i x / (‖B_i‖_F ‖A_i‖_F)

with the old directions frozen; A_t, B_t and *all* α of the layer train. Afterwards B_t A_t joins the directions.

Where ours differs. An old direction's α goes on from the magnitude that it had, α_i ‖B_i‖ ‖A_i‖ where task i ended, so that
a task's start does not move the model; the authors' code sets every α back to 0.8 and lets training find it again. Each layer
has α of its own, where their code shares one per task among all layers. The layer's new α takes the place of
``lora_alpha / r``, which is not used. All targets are adapted, not q and v alone. The rank-reducing and
direction-distilling variants (SD-LoRA-RR, -KD) are left out.

A task moves the old α as well, so its update, as every record holds it, is

    ΔW = α_t B_t A_t + Σ_{i<t} (α_i − α_i before the task) B_i A_i / (‖B_i‖ ‖A_i‖)

as one pair of factors: the A stacked, the scaled B side by side. Their sum over the records is the running weight, so
merging and export work as for any low-rank method, and so does going back to an earlier task. A single task cannot be taken
out: what it added is spread over the records after it. The rank of a record grows with the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.methods.registry import LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner.adapter import Factors, random_factor
from keeplora.tuner.branch import Branch, BranchLearner
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.options import option
from keeplora.tuner.rank_warning import warn_of_rank


@dataclass(frozen=True)
class SdLoraOptions:
    """Where a magnitude starts."""

    alpha: float = option(0.8, "α that a new task's direction starts with.")

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"tuner.options.alpha must be a finite number above 0, got {self.alpha!r}")


@dataclass(frozen=True)
class Direction:
    """B_i A_i / (‖B_i‖ ‖A_i‖) of a learned task in one layer: A (r, in) and B (out, r), each of unit norm (or zero)."""

    A: Tensor
    B: Tensor


class DirectionsBranch(Branch):
    """α_new B A x + Σ (α_i − α_i⁰) B_i A_i x, since the layer's weight already holds Σ α_i⁰ B_i A_i."""

    owner: Tensor
    start: Tensor
    A_old: Tensor
    B_old: Tensor

    def __init__(self, A: Tensor, n_out: int, alpha: float, old: list[Direction], alpha_old: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(n_out, A.shape[0]))
        self.alpha = nn.Parameter(torch.cat([alpha_old, torch.tensor([alpha])]))
        """[t + 1]: those of the old directions, then the new one."""
        buffers = {
            "start": alpha_old.clone(),
            "owner": torch.repeat_interleave(torch.tensor([d.A.shape[0] for d in old], dtype=torch.long)),
            "A_old": torch.cat([*(d.A for d in old), A.new_zeros(0, A.shape[1])]),
            "B_old": torch.cat([*(d.B for d in old), A.new_zeros(n_out, 0)], dim=1),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def _moved(self) -> Tensor:
        """α_i − α_i⁰ per row of A_old."""
        return (self.alpha[:-1] - self.start)[self.owner]

    def forward(self, x: Tensor) -> Tensor:
        y = self.alpha[-1] * nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        if len(self.owner) == 0:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.A_old) * self._moved(), self.B_old)

    @torch.no_grad()
    def factors(self) -> Factors:
        A = torch.cat([self.A_old, self.A])
        B = torch.cat([self.B_old * self._moved(), self.alpha[-1] * self.B], dim=1)
        return Factors(A.cpu(), B.cpu(), 1.0)

    @torch.no_grad()
    def learned(self) -> tuple[Direction, Tensor]:
        """The new direction, and every α [t + 1] in units of directions, on the CPU."""
        norm_A, norm_B = self.A.norm(), self.B.norm()
        direction = Direction((self.A / norm_A.clamp(min=1e-30)).cpu(), (self.B / norm_B.clamp(min=1e-30)).cpu())
        alpha = torch.cat([self.alpha[:-1], (self.alpha[-1] * norm_A * norm_B).reshape(1)])
        return direction, alpha.cpu()


class SdLora(BranchLearner):
    """Trains A, B and the magnitudes of all directions."""

    Options: ClassVar[type] = SdLoraOptions
    irremovable: ClassVar[str] = (
        "goes on training the magnitude of every earlier task's direction, so that what a task added is spread over the "
        "records of those after it"
    )

    def directions(self, layer: str) -> tuple[list[Direction], Tensor]:
        """The learned directions of a layer and their present α, [t]; a function of the records alone."""
        found, alpha = [], torch.zeros(0)
        for record in self.records:
            if f"sd_lora/A/{layer}" in record.tensors:
                found.append(Direction(record.tensors[f"sd_lora/A/{layer}"], record.tensors[f"sd_lora/B/{layer}"]))
                alpha = record.tensors[f"sd_lora/alpha/{layer}"]
        return found, alpha

    def _branches(self, task: OpenTask) -> Mapping[str, DirectionsBranch]:
        warn_of_rank(self, task)
        generator = torch.Generator().manual_seed(self.config.seed * 1009 + len(self.history))
        branches = {}
        for t in self.targets:
            old, alpha = self.directions(t.name)
            A = random_factor(t, generator)
            branches[t.name] = DirectionsBranch(A, t.n_out, self.options.alpha, old, alpha)
        return branches

    def planned_parameters(self) -> int:
        ranks = {t.name: min(t.r, t.n_in, t.n_out) for t in self.targets}
        return (
            sum(ranks[t.name] * (t.n_in + t.n_out) + len(self.directions(t.name)[0]) + 1 for t in self.targets)
            + self.free.numel()
        )

    def _detach(self, task: OpenTask) -> TaskRecord:
        record = super()._detach(task)
        for name, branch in self.open_branches().items():
            direction, alpha = branch.learned()
            for kind, value in (("A", direction.A), ("B", direction.B), ("alpha", alpha)):
                record.tensors[f"sd_lora/{kind}/{name}"] = value
        return record


register(
    Method("sd-lora", "SD-LoRA", SdLora, "LoRA whose old directions keep learning their magnitudes",
           config=ONE_SCALE, trained="A, B and all magnitudes of every target",
           paper="Wu et al., ICLR 2025, arXiv 2501.13198", state="A, B and magnitude of every task and target",
           search={**LEARNING_RATE, "tuner.options.alpha": ("choice", [0.4, 0.8, 1.6])})
)  # fmt: skip
