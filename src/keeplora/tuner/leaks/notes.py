"""What an audit leaves out, and why, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keeplora.tuner.leaks.rows import ExportRow
from keeplora.tuner.leaks.state import LayerState
from keeplora.tuner.quantised import quantisation

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner


def learner_notes(learner: ContinualLearner, states: dict[str, LayerState], detail: str) -> list[str]:
    """Of the method and its settings."""
    notes: list[str] = []
    quantised = [t.name for t in learner.targets if quantisation(learner.store.module(t.name)) is not None]
    if quantised:
        notes.append(
            f"{len(quantised)} of {len(learner.targets)} layers are quantised: past tasks run beside them as an adapter and "
            "are never merged, so a leak of the weights does not apply there."
        )
    if learner.free.modules:
        notes.append(f"Not audited, since they train in full and are not protected: {', '.join(learner.free.modules)}.")
    if not any(state.widths[0] for state in states.values()):
        notes.append(
            "U₀ is empty (energy_weights is 0): no direction of the pretrained weights is protected, earlier tasks' are."
        )
    if detail != "full":
        return notes
    if learner.trains_A:
        notes.append(
            "A trains as well and is projected off U after every step: its leak is what float32 leaves of a projection."
        )
    if learner.config.memory == "gradients":
        notes.append(
            "With gradient memory (M8g) the stored share and trace are those of ‖G‖², so the backward bound, which is of "
            "‖x‖², does not apply."
        )
    elif learner.records and not any(record.covariance for record in learner.history):
        notes.append(
            "Backward stability: the bound alone, since C_t was not kept (keep_covariance was off while the tasks were "
            "learned)."
        )
    return notes


def range_notes(rows: Sequence[ExportRow]) -> list[str]:
    """Of dtypes that cannot hold the weights at all."""
    beyond: dict[str, list[str]] = {}
    for row in rows:
        if row.leak is None and row.random is None:
            layers = beyond.setdefault(row.dtype, [])
            if row.layer not in layers:
                layers.append(row.layer)
    return [
        f"{dtype} cannot hold the weights of {len(layers)} layer{'s' if len(layers) > 1 else ''} (first {layers[0]}): their "
        "values are beyond its range."
        for dtype, layers in beyond.items()
    ]
