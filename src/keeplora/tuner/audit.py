"""What leaked: for every task's update, how much of it acts on directions that were protected at the time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from keeplora.errors import KeepLoraError
from keeplora.math import factor_leak, rounding_floor, weight_leak
from keeplora.tuner.quantised import quantisation

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

FACTOR_LIMIT = 1e-5


@dataclass(frozen=True)
class LeakRow:
    """One layer and task.

    Attributes:
        factor_leak: ‖B A U‖_F / ‖B A‖_F against U as it was when the task began; asserted ≤ 1e-5 for KeepLoRA.
        weight_leak: ‖(W − W₀) U₀‖_F / ‖W − W₀‖_F of the running weights after all tasks, against M1's basis; the same
            for all tasks of a layer. None where the base is quantised: its weights never move.
        weight_floor: what rounding W₀ + Σ sBA once to the running dtype leaks by itself.
    """

    layer: str
    task: str
    factor_leak: float
    weight_leak: float | None
    weight_floor: float | None


class TableText(str):
    """A table as text that an interactive session shows as it is, not as a quoted string."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Audit:
    """All rows; printing it, or ending an interactive line with it, shows them as a table."""

    rows: list[LeakRow]
    notes: tuple[str, ...] = ()
    """What the rows leave out, and why; one sentence each."""

    @property
    def factor_leak_max(self) -> float:
        """The worst factor leak over layers and tasks; 0 without tasks."""
        return max((row.factor_leak for row in self.rows), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every factor leak is within METHOD.md's 1e-5."""
        return self.factor_leak_max <= FACTOR_LIMIT

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "factor_leak_max": self.factor_leak_max, "rows": [asdict(row) for row in self.rows], "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        layers: dict[str, list[LeakRow]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, []).append(row)
        table = Table(box=box.SIMPLE_HEAD, title="Leak audit: share of the updates that acts on protected inputs")
        for header in ("layer", "factors, worst task (limit 1e-5)", "weights", "rounding floor of the dtype"):
            table.add_column(header, justify="left" if header == "layer" else "right")
        for layer, rows in layers.items():
            worst = max(row.factor_leak for row in rows)
            last = rows[-1]
            table.add_row(layer, f"{worst:.1e}", *(_number(v) for v in (last.weight_leak, last.weight_floor)))
        return _render(table, self.notes)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _render(table: Table, notes: Sequence[str] = ()) -> TableText:
    stream = io.StringIO()
    Console(file=stream, width=130, color_system=None).print(table)
    return TableText(stream.getvalue() + "".join(f"{note}\n" for note in notes))


def audit_learner(learner: ContinualLearner) -> Audit:
    """Audit every layer and task of a learner that protects subspaces.

    Raises:
        KeepLoraError: the method protects none.
    """
    if not learner.protects:
        raise KeepLoraError(
            f"{type(learner).__name__} protects no subspace, so there is nothing to audit; audit a method that does "
            "(keeplora++, keeplora, inflora)"
        )
    rows: list[LeakRow] = []
    notes: list[str] = []
    bases = learner.start_bases()
    quantised = {t.name for t in learner.targets if quantisation(learner.store.module(t.name)) is not None}
    if quantised:
        notes.append(
            f"{len(quantised)} of {len(learner.targets)} layers are quantised: past tasks run beside them as an adapter and "
            "are never merged, so a leak of the weights does not apply there."
        )
    if learner.free.modules:
        notes.append(f"Not audited, since they train in full and are not protected: {', '.join(learner.free.modules)}.")
    for t in learner.targets:
        U0 = bases[t.name]
        weights = floor = None
        if t.name not in quantised:
            W, W0 = learner.store.module(t.name).weight, learner.store.W0[t.name]
            delta = learner.store.delta.get(t.name)
            weights = weight_leak(W.cpu(), W0, U0)
            floor = rounding_floor(W0, delta, U0, W.dtype) if delta is not None else 0.0
        found = {id(record): U for record, U in zip(learner.history, learner.U.before_each(t.name), strict=False)}
        for record in learner.records:
            f = record.factors.get(t.name)
            leak = factor_leak(f.B, f.A, found[id(record)]) if f is not None else 0.0
            rows.append(LeakRow(t.name, record.name, leak, weights, floor))
    return Audit(rows, tuple(notes))


def layer_rows(learner: ContinualLearner) -> list[dict[str, Any]]:
    """Per target, as JSON: where it sits, its scale, and columns of U (``used``) and ranks after each task."""
    bases = learner.U.start_dims() if learner.records or learner._U is not None else {}
    rows = []
    for t in learner.targets:
        start = bases[t.name][1] if t.name in bases else 0
        used, ranks = [start], []
        for record in learner.records:
            used.append(record.used.get(t.name, used[-1]))
            ranks.append(record.factors[t.name].A.shape[0] if t.name in record.factors else 0)
        rows.append(
            {
                "layer": t.name, "tower": t.tower, "depth": t.depth, "blocks": t.blocks, "in": t.n_in, "out": t.n_out,
                "scale": t.scale, "used": used, "rank": ranks,
            }
        )  # fmt: skip
    return rows


def summary_table(learner: ContinualLearner) -> TableText:
    """The table behind `ContinualLearner.summary`."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(learner.targets)} targets, {len(learner.records)} tasks learned")
    for header in ("tower", "block", "layer", "in → out", "scale", "r", "s", "protected"):
        table.add_column(header, justify="left" if header in ("tower", "layer") else "right")
    cost = learner.store.serving_cost()
    notes = [str(cost)] if cost.layers else []
    if learner.free.modules:
        notes.append(f"trained in full, not protected: {', '.join(learner.free.modules)}")
    used = learner.U.dims()
    for t in sorted(learner.targets, key=lambda t: (t.tower, -1 if t.depth is None else t.depth)):
        block = "–" if t.depth is None else f"{t.depth + 1}/{t.blocks}"
        short = t.name.removeprefix(t.tower).lstrip(".")
        table.add_row(
            t.tower or "model", block, short, f"{t.n_in} → {t.n_out}", f"{t.scale:.2f}", str(t.r), f"{t.s:.3f}",
            f"{used.get(t.name, 0)}/{t.n_in}",
        )  # fmt: skip
    return _render(table, notes)
