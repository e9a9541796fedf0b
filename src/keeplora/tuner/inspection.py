"""What a learner tells of itself, and writes down: size, capacity, leaks, cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from keeplora.tuner import ranks
from keeplora.tuner.audit import Audit, audit_learner, summary_table
from keeplora.tuner.capacity import Capacity, gauge
from keeplora.tuner.free import FreeModules
from keeplora.tuner.history import TaskHistory
from keeplora.tuner.persistence import save_learner
from keeplora.tuner.weights import ServingCost

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner


class Inspection(TaskHistory):
    """The part of a learner that is asked; nothing here changes the learner."""

    free: FreeModules

    @property
    def _learner(self) -> ContinualLearner:
        """Itself, as what it is whole."""
        return cast("ContinualLearner", self)

    def feature_energy(self, name: str) -> float:
        """ε_f of a target."""
        tower = next(t.tower for t in self.targets if t.name == name)
        return float(self.config.for_tower("energy_features", tower))

    def summary(self) -> str:
        """Targets by tower and depth with scales, ranks and dimensions used; shown as a table in an interactive session."""
        return summary_table(self._learner)

    def capacity(self) -> Capacity:
        """Dimensions used and left per target and task, and how many more tasks fit; `KeepLoraError` if nothing is protected."""
        return gauge(self._learner)

    def audit(self, detail: str = "quick", saved: str | Path | None = None) -> Audit:
        """Leaks per layer and task, factors and weights (METHOD.md point 6); `KeepLoraError` if nothing is protected.

        ``detail`` and ``saved`` ask for more, see `keeplora.tuner.audit.audit_learner`.
        """
        return audit_learner(self._learner, detail, saved)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the ledger and one stock PEFT adapter per task into ``directory`` (new or empty)."""
        return ranks.first("saving", lambda: save_learner(self._learner, directory))

    # ---- what a method may tell otherwise ------------------------------------------------------------------------------

    def planned_parameters(self) -> int:
        """Entries that a task trains if no rank shrinks; `TaskRecord.info["trained_parameters"]` is what one did train."""
        ranks = {t.name: min(t.r, t.n_in, t.n_out) for t in self.targets}
        low_rank = sum(ranks[t.name] * (t.n_out + (t.n_in if self.trains_A else 0)) for t in self.targets)
        return low_rank + self.free.numel()

    def state_bytes(self) -> int:
        """Bytes that go from task to task beside the model itself: U by its smaller side, factors that are not merged, and
        what records keep."""
        tensors = [t for r in self.records for t in r.tensors.values()]
        kept = sum(t.numel() * t.element_size() for t in tensors) + (self._U.bytes if self._U is not None else 0)
        return kept + self.store.serving_cost().bytes

    def serving_cost(self) -> ServingCost:
        """What the learned tasks cost at inference: nothing where they are merged, an adapter beside a quantised base."""
        return self.store.serving_cost()

    def largest_update(self) -> tuple[str, float] | None:
        """(layer, ‖s B A‖_F / ‖W₀‖_F) of the open task where that is largest; None where no LoRA trains."""
        adapter = self._require_open().adapter
        return None if adapter is None else adapter.largest_update(self.store, self._require_open().base_norms)
