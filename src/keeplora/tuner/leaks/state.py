"""What an audit reads of one layer: U in blocks, and the updates that are in its weights, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.tuner.adapter import Factors, concatenate
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.weights import Update

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner


@dataclass(frozen=True)
class LayerState:
    """One target.

    Attributes:
        U: (in, k), [U₀, V₁, V₂, …], every column that was ever added. widths: columns of each block, U₀ first, then one
            entry per task of the history.
        in_force: per moment (before the first task, after it, …), which of the columns so far counted; a memory budget may
            take some out of force, and none comes back.
        updates: ΔW of each task of the history; None where it did not move the layer, or was taken out of the weights.
    """

    name: str
    U: Tensor
    widths: tuple[int, ...]
    in_force: tuple[Tensor, ...]
    updates: tuple[Update | None, ...]

    def found_by(self, i: int) -> tuple[Tensor, list[int]]:
        """(U, columns of each of its blocks) as the task with index ``i`` found it."""
        return self._columns(self.in_force[i], i + 1)

    def guarded(self, t: int) -> tuple[Tensor, int]:
        """(U as it was at moment ``t``, columns of its last block), less what fell out of force before the last update."""
        last = max(i for i, update in enumerate(self.updates) if update is not None)
        U, widths = self._columns(self.in_force[max(t, last)], t + 1)
        return U, widths[-1]

    def _columns(self, mask: Tensor, blocks: int) -> tuple[Tensor, list[int]]:
        """The columns of the first ``blocks`` blocks that count, and how many of each do."""
        widths = self.widths[:blocks]
        mask = mask[: sum(widths)]
        U = self.U[:, : len(mask)]
        return U if bool(mask.all()) else U[:, mask], [int(part.sum()) for part in mask.split(list(widths))]

    def later(self, t: int) -> list[Update]:
        """The updates since moment ``t``: 0 is before the first task."""
        return [update for update in self.updates[t:] if update is not None]

    def later_factors(self, t: int) -> Factors | None:
        """`later`, as one pair of factors with s = 1; None where there is none."""
        return concatenate([as_factors(update) for update in self.later(t)])

    def sums(self) -> Iterator[Tensor | float]:
        """Σ ΔW at each moment, float32, added up in task order as the running model and every merge do; 0.0 before any."""
        total: Tensor | float = 0.0
        yield total
        for update in self.updates:
            if update is not None:
                total = dense(update) if isinstance(total, float) else total + dense(update)
            yield total

    def moments(self) -> list[int]:
        """The moments since which something was learned: those that can be audited."""
        return [t for t in range(len(self.updates)) if self.later(t)]


def dense(update: Update) -> Tensor:
    """ΔW, (out, in) float32 on the CPU."""
    return update.delta if isinstance(update, Factors) else update.to("cpu", torch.float32)


def as_factors(update: Update) -> Factors:
    """ΔW as factors; one that is kept whole is its own B."""
    return update if isinstance(update, Factors) else Factors(torch.eye(update.shape[1]), dense(update), 1.0)


def layer_states(
    learner: ContinualLearner, kept: Callable[[TaskRecord], bool] = lambda record: True
) -> dict[str, LayerState]:
    """The state of every target.

    Args:
        kept: which of the tasks in the weights count; by default all.
    """
    history = learner.history
    held = {position(history, record): record for record in learner.records if kept(record)}
    out = {}
    for name, U0 in learner.start_bases().items():
        blocks, masks = [U0], [torch.ones(U0.shape[1], dtype=torch.bool)]
        for record in history:
            blocks.append(record.basis[name] if name in record.basis else U0[:, :0])
            mask = torch.cat([masks[-1], torch.ones(blocks[-1].shape[1], dtype=torch.bool)])
            if (counted := record.kept.get(name)) is not None:  # only where a memory budget took some away
                mask[U0.shape[1] :] &= counted.to(torch.bool)
            masks.append(mask)
        updates = tuple(held[i].updates.get(name) if i in held else None for i in range(len(history)))
        widths = tuple(block.shape[1] for block in blocks)
        out[name] = LayerState(name, torch.cat(blocks, dim=1), widths, tuple(masks), updates)
    return out


def position(history: Sequence[TaskRecord], record: TaskRecord) -> int:
    """Where a learned task stands among the tasks behind U.

    Raises:
        KeepLoraError: it is not there, so that nobody can say what was protected when it was learned.
    """
    for same in (lambda one: one is record, lambda one: one.name == record.name):
        for i in reversed(range(len(history))):
            if same(history[i]):
                return i
    raise KeepLoraError(
        f"task {record.name!r} is in the weights but not among the tasks behind the protected directions, so it cannot be "
        "audited; load the learner from its ledger again"
    )
