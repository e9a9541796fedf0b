"""What leaked: for every task's update, how much of it acts on directions that were protected at the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from keeplora.errors import KeepLoraError
from keeplora.math import weight_leak
from keeplora.tuner.leaks.backward import backward_rows
from keeplora.tuner.leaks.factors import leaks_by_basis
from keeplora.tuner.leaks.found import merged_and_adapter_rows, saved_rows
from keeplora.tuner.leaks.notes import learner_notes, range_notes
from keeplora.tuner.leaks.rows import FACTOR_LIMIT, Audit, ExportRow, LeakRow
from keeplora.tuner.leaks.state import layer_states, position
from keeplora.tuner.leaks.table import TableText, as_text
from keeplora.tuner.leaks.weights import Depth, merged_rows
from keeplora.tuner.quantised import quantisation

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

__all__ = ["DETAILS", "FACTOR_LIMIT", "Audit", "LeakRow", "audit_learner", "layer_rows", "summary_table"]

DETAILS = ("quick", "exports", "full")


def audit_learner(learner: ContinualLearner, detail: str = "quick", saved: str | Path | None = None) -> Audit:
    """Audit every layer and task of a learner that protects subspaces.

    Args:
        detail: "quick": the factors into U₀ and into every earlier task's increment, and the running weights into U₀.
            "exports": beside them what the merged fp32, bf16 and fp16 weights and the adapter leak into U₀. "full": each of
            those into every task's increment, forward stability on random and worst-case inputs, and the backward bound.
        saved: a folder that `keeplora export` wrote, an adapter or a merged checkpoint, to audit in place of the exports.

    Raises:
        KeepLoraError: the method protects no subspace; ``saved`` is no export of this learner's model.
    """
    if not learner.protects:
        raise KeepLoraError(
            f"{type(learner).__name__} protects no subspace, so there is nothing to audit; audit a method that does "
            "(keeplora++, keeplora, inflora)"
        )
    if detail not in DETAILS:
        raise KeepLoraError(f"detail must be one of {', '.join(DETAILS)}, not {detail!r}")
    states = layer_states(learner)
    names: list[str | None] = [None, *(record.name for record in learner.history)]
    depth = Depth(every_basis=detail == "full", stability=detail == "full")
    by_basis = leaks_by_basis(learner, states)
    rows: list[LeakRow] = []
    running: list[ExportRow] = []
    for t in learner.targets:
        state, weights, floor = states[t.name], None, None
        module = learner.store.module(t.name)
        if quantisation(module) is None:
            W0, W = learner.store.W0[t.name], learner.store.running(t.name)
            found = merged_rows(state, names, W0, W.dtype, depth, export="running", W=W)
            running += found
            if found and found[0].basis is None:
                weights, floor = found[0].leak or 0.0, found[0].floor or 0.0
            else:  # nothing was learned here: whatever moved, a task did not
                weights, floor = weight_leak(W.cpu(), W0, state.U[:, : state.widths[0]]), 0.0
        for record in learner.records:
            i = position(learner.history, record)
            leaks = by_basis.get((t.name, i), [])
            shown = tuple(leak if width else None for leak, width in zip(leaks, state.found_by(i)[1], strict=False))
            total = sum(leak**2 for leak in leaks) ** 0.5
            rows.append(LeakRow(t.name, record.name, total, weights, floor, shown))
    exports: list[ExportRow] = []
    notes = learner_notes(learner, states, detail)
    if saved is not None:
        more, told = saved_rows(learner, saved, names, depth)
        exports, notes = [*running, *more], [*notes, *told]
    elif detail != "quick":
        exports = [*running, *merged_and_adapter_rows(learner, states, names, depth)]
    notes += range_notes(exports)
    backward = backward_rows(learner, states) if detail == "full" else []
    return Audit(rows, tuple(notes), tuple(names), tuple(exports), tuple(backward))


def layer_rows(learner: ContinualLearner, tasks: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Per target, as JSON: where it sits, its scale, and columns of U (``used``) and ranks after each task.

    Args:
        tasks: in this order, by default those of the history: what a removed one used is in use while a later one relies
            on it. One that is not in the history adds nothing.
    """
    bases = learner.U.start_dims() if learner.history or learner._U is not None else {}
    found = {record.name: record for record in learner.history}
    rows = []
    for t in learner.targets:
        start = bases[t.name][1] if t.name in bases else 0
        used, ranks = [start], []
        for name in found if tasks is None else tasks:
            record = found.get(name)
            used.append(record.used.get(t.name, used[-1]) if record else used[-1])
            ranks.append(record.factors[t.name].A.shape[0] if record and t.name in record.factors else 0)
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
    return as_text(table, notes)
