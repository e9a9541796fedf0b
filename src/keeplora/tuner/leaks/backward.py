"""Backward stability against its theory: what all later updates together did to an earlier task's inputs, and may do at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keeplora.math import backward_harm, product_norm
from keeplora.tuner.leaks.rows import BackwardRow
from keeplora.tuner.leaks.state import LayerState
from keeplora.tuner.ledger import TaskRecord

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

RESOLUTION = 1e-6
"""Of ‖ΔW‖₂² tr C_t: what the float32 rounding of U and A may add to the left side."""


def backward_rows(learner: ContinualLearner, states: dict[str, LayerState]) -> list[BackwardRow]:
    """Per layer and earlier task with something learned since. Empty with gradient memory (M8g): its ε_t and trace are of
    ‖G_t‖², which bounds nothing at the inputs."""
    if learner.config.memory == "gradients":
        return []
    rows = []
    for name, state in states.items():
        for t, record in enumerate(learner.history, start=1):
            f = state.later_factors(t)
            if f is None or name not in record.explained or name not in record.trace:
                continue
            explained, trace = _explained(record, state), record.trace[name]
            norm = product_norm(f.B, f.A)
            bound = norm**2 * (1.0 - explained) * trace
            harm = tightness = holds = None
            if name in record.covariance:
                harm = backward_harm(f.B, f.A, record.covariance[name])
                noise = RESOLUTION * norm**2 * trace
                holds = harm <= bound + noise
                tightness = harm / bound if bound > noise else None
            rows.append(BackwardRow(name, record.name, explained, bound, harm, tightness, holds))
    return rows


def _explained(record: TaskRecord, state: LayerState) -> float:
    """ε_t, less what fell out of force before the last of the later updates: the columns are orthonormal, so shares add up."""
    explained = record.explained[state.name]
    values = record.values.get(state.name)  # only where a memory budget may take columns away
    if values is None:
        return explained
    last = max(i for i, update in enumerate(state.updates) if update is not None)
    counted = state.in_force[last][state.widths[0] :][: len(values)]
    return max(0.0, explained - float(values[~counted].sum()))
