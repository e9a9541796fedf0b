"""How far two states of a model lie apart, layer by layer, and how their protected subspaces lie to each other.

A state is a ledger after one of its tasks, an exported adapter, or a merged checkpoint. With W_a, W_b the weights of a layer
(or, where the base model is not at hand, ΔW_a and ΔW_b alone), D = W_b − W_a, and U_a, U_b what each side protects:

    relative      ‖D‖_F / ‖W_a‖_F
    overlap       tr(U_aᵀ U_b U_bᵀ U_a) / min(k_a, k_b), and the principal angles behind it
    weight angle  the largest principal angle between the principal input subspaces of W_a and W_b (M1, at an ε of choice)
    a_in_b        ‖ΔW_a U_b‖_F² / ‖ΔW_a‖_F²: how much of what a learned acts on what b protects; b_in_a the other way round
    moved_in_a    ‖D U_a‖_F² / ‖D‖_F²: for two states of one ledger, the leak of what came after a
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.math import weight_basis
from keeplora.math.angles import overlap, principal_angles, share_inside
from keeplora.tuner.adapter import Factors
from keeplora.tuner.basis import Bases
from keeplora.tuner.leaks.saved import SavedExport
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.records import TaskRecord
from keeplora.tuner.targets import Target

START = "start"
"""The state before the first task."""


class Side:
    """One of two states. ``layers``: (in, out) per layer. ``label``: what it is called in tables."""

    def __init__(self, label: str, layers: Mapping[str, tuple[int, int]], W0: Mapping[str, Tensor] | None) -> None:
        self.label, self.layers, self.W0 = label, dict(layers), W0

    def delta(self, name: str) -> Tensor | None:
        """ΔW (out, in) float64; None where it cannot be told without the base model."""
        raise NotImplementedError

    def weight(self, name: str) -> Tensor | None:
        """W (out, in) float64; None where the base model is not at hand."""
        D = self.delta(name)
        W0 = self.base(name)
        return W0 + D if W0 is not None and D is not None else None

    def base(self, name: str) -> Tensor | None:
        """W₀ (out, in) float64; None where the base model is not at hand, or has no such layer."""
        W0 = None if self.W0 is None else self.W0.get(name)
        return None if W0 is None else W0.to(torch.float64)

    def U(self, name: str) -> Tensor | None:
        """The protected subspace (in, k); None where nothing is said to be protected."""
        return None


class LedgerSide(Side):
    """A ledger after the task ``upto``: its name, `START` for before all, None for all that are active."""

    def __init__(
        self, label: str, ledger: Ledger, upto: str | None = None, W0: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(label if upto is None else f"{label} @ {upto}", ledger.targets, W0)
        if reason := ledger.told.get("unmergeable"):
            raise KeepLoraError(f"{ledger.path}: no one model holds its tasks, for its method {reason}")
        self.base_hash = ledger.head["base"]["hash"]
        active, history = ledger.records(), ledger.history()
        if upto is not None:
            names = [record.name for record in active]
            if upto != START and upto not in names:
                raise KeepLoraError(
                    f"{ledger.path}: no active task is named {upto!r}; there are {', '.join([START, *names])}"
                )
            active = active[: names.index(upto) + 1] if upto != START else []
            last = active[-1].entry if active else 0
            history = [record for record in history if record.entry <= last]
        self.records: Sequence[TaskRecord] = active
        start = ledger.bases()
        self.bases = Bases(start, history) if start else None

    def delta(self, name: str) -> Tensor:
        n_in, n_out = self.layers[name]
        total = torch.zeros((n_out, n_in), dtype=torch.float64)
        for record in self.records:
            if (update := record.updates.get(name)) is not None:
                total += (update.delta if isinstance(update, Factors) else update).to(torch.float64)
        return total

    def U(self, name: str) -> Tensor | None:
        return self.bases[name] if self.bases is not None and name in self.bases else None


class SavedSide(Side):
    """An exported adapter or merged checkpoint on disk."""

    def __init__(
        self, label: str, export: SavedExport, targets: Sequence[Target], W0: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(label, {t.name: (t.n_in, t.n_out) for t in targets}, W0)
        self.export, self.targets = export, {t.name: t for t in targets}

    def delta(self, name: str) -> Tensor | None:
        if self.export.kind == "adapter":
            found = self.export.factors(self.targets[name])
            n_in, n_out = self.layers[name]
            return torch.zeros((n_out, n_in), dtype=torch.float64) if found is None else found.delta.to(torch.float64)
        W0 = self.base(name)
        return None if W0 is None else self.weight_on_disk(name) - W0

    def weight(self, name: str) -> Tensor | None:
        return self.weight_on_disk(name) if self.export.kind == "checkpoint" else super().weight(name)

    def weight_on_disk(self, name: str) -> Tensor:
        return self.export.weight(self.targets[name]).to(torch.float64)


@dataclass(frozen=True)
class DriftRow:
    """One layer; None where a side does not say enough. Angles in degrees, from 0 to 90.

    Attributes:
        moved: ‖D‖_F. relative: over ‖W_a‖_F. k_a, k_b: protected dimensions. The others: the module's text.
    """

    layer: str
    moved: float
    relative: float | None
    k_a: int | None
    k_b: int | None
    overlap: float | None
    mean_angle: float | None
    largest_angle: float | None
    weight_angle: float | None
    a_in_b: float | None
    b_in_a: float | None
    moved_in_a: float | None


@dataclass(frozen=True)
class Drift:
    """Two states and what lies between them.

    Attributes:
        a, b: what the sides are called. relative: sqrt(Σ‖D‖² / Σ‖W_a‖²) over all layers. rows: one per layer.
    """

    a: str
    b: str
    relative: float | None
    rows: tuple[DriftRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"a": self.a, "b": self.b, "relative": self.relative, "layers": [asdict(row) for row in self.rows]}


def drift(a: Side, b: Side, energy: float = 0.5) -> Drift:
    """Measure two states against each other, over the layers that both have.

    Args:
        energy: ε of the weights' principal subspaces (M1), above 0 and at most 1.

    Raises:
        KeepLoraError: no common layer, one of another shape, ledgers of different base models, or D cannot be told.
    """
    if isinstance(a, LedgerSide) and isinstance(b, LedgerSide) and a.base_hash != b.base_hash:
        raise KeepLoraError(
            f"{a.label} and {b.label} were learned on different base models: their updates cannot be compared"
        )
    names = [name for name in a.layers if name in b.layers]
    if not names:
        raise KeepLoraError(f"{a.label} and {b.label} have no layer in common: they belong to different models")
    rows, squares, base = [], 0.0, 0.0
    for name in names:
        if a.layers[name] != b.layers[name]:
            raise KeepLoraError(
                f"{name} has {a.layers[name]} inputs and outputs in {a.label}, {b.layers[name]} in {b.label}"
            )
        row, size = _row(a, b, name, energy)
        rows.append(row)
        squares += row.moved**2
        base += size**2 if size is not None else math.nan
    return Drift(a.label, b.label, math.sqrt(squares / base) if base > 0 else None, tuple(rows))


def _row(a: Side, b: Side, name: str, energy: float) -> tuple[DriftRow, float | None]:
    W_a, W_b, d_a, d_b = a.weight(name), b.weight(name), a.delta(name), b.delta(name)
    if d_a is not None and d_b is not None:
        D = d_b - d_a
    elif W_a is not None and W_b is not None:
        D = W_b - W_a
    else:
        raise KeepLoraError(
            f"{a.label} and {b.label}: a checkpoint is compared with what was learned by way of the base model; name it with "
            "--model"
        )
    size = float(W_a.norm()) if W_a is not None else None
    moved = float(D.norm())
    angle = None
    if W_a is not None and W_b is not None:
        principal = principal_angles(weight_basis(W_a, energy), weight_basis(W_b, energy))
        angle = math.degrees(float(principal[-1])) if len(principal) else None
    U_a, U_b = a.U(name), b.U(name)
    angles = principal_angles(U_a, U_b) if U_a is not None and U_b is not None else torch.zeros(0)
    row = DriftRow(
        name, moved, moved / size if size else None,
        None if U_a is None else U_a.shape[1], None if U_b is None else U_b.shape[1],
        overlap(U_a, U_b) if U_a is not None and U_b is not None else None,
        math.degrees(float(angles.mean())) if len(angles) else None,
        math.degrees(float(angles[-1])) if len(angles) else None, angle,
        None if d_a is None or U_b is None else share_inside(d_a, U_b),
        None if d_b is None or U_a is None else share_inside(d_b, U_a),
        None if U_a is None else share_inside(D, U_a),
    )  # fmt: skip
    return row, size
