"""The per-task oracle: every task its own LoRA on the untouched model, chosen by task identity; nothing can be forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import ONE_SCALE, Method, register


class Oracle(SequentialLora):
    """A fresh LoRA (Hu et al., 2106.09685) per task, each from W₀; the model itself never moves.

    An upper bound on what a task's own adapter can reach, and no method to deploy where nobody says which task a picture
    belongs to. A task that was not learned is answered by the untouched model, so nothing transfers, and nothing suffers.
    """

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    accumulates: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "keeps one model per task, which no single adapter or checkpoint holds"

    @contextlib.contextmanager
    def serving(self, task: str | None) -> Iterator[None]:
        """W₀ + ΔW of ``task`` in the model, W₀ for a task that is not learned; as it was, bit for bit, afterwards."""
        record = next((record for record in self.records if record.name == task), None)
        before = self.store.snapshot()
        wanted = record.updates if record is not None else {}
        if not wanted and not before:  # W₀ is wanted and there; an adapter that is in training stays where it is
            yield
            return
        try:
            self.store.restore(wanted)
            yield
        finally:
            self.store.restore(before)

    def state_bytes(self) -> int:
        """The factors of every task: they are not merged, so all of them are kept."""
        factors = [f for record in self.records for f in record.factors.values()]
        return sum(t.numel() * t.element_size() for f in factors for t in (f.A, f.B))


register(
    Method("oracle", "Per-task oracle", Oracle, "upper bound: one LoRA per task on the untouched model", config=ONE_SCALE,
           state="A and B of every task", task_identity=True, inference="one adapter per task, chosen by task identity",
           paper="Hu et al., arXiv 2106.09685")
)  # fmt: skip
