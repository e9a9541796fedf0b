"""What an audit found: rows of plain numbers, and how a number is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FACTOR_LIMIT = 1e-5
"""METHOD.md's limit on a factor's leak; below it a weight's leak needs no excuse either."""
FLOOR_SLACK = 2.0
"""A weight's leak of up to this many times its dtype's rounding floor is explained by rounding."""

OK, FLOOR, ABOVE = "ok", "floor", "above"


def judge(leak: float | None, floor: float | None = None) -> str | None:
    """ "ok": within 1e-5. "floor": above it, and no more than rounding causes. "above": more. None where nothing was measured.

    >>> judge(2e-7), judge(0.19, 0.2), judge(0.19, 0.01), judge(3e-5), judge(None)
    ('ok', 'floor', 'above', 'above', None)
    """
    if leak is None:
        return None
    if leak <= FACTOR_LIMIT:
        return OK
    return FLOOR if floor is not None and leak <= FLOOR_SLACK * floor else ABOVE


@dataclass(frozen=True)
class LeakRow:
    """One layer and task.

    Attributes:
        factor_leak: ‖B A U‖_F / ‖B A‖_F against U as it was when the task began; asserted ≤ 1e-5 for KeepLoRA.
        weight_leak: ‖(W − W₀) U₀‖_F / ‖W − W₀‖_F of the running weights after all tasks, against M1's basis; the same
            for all tasks of a layer. None where the base is quantised: its weights never move.
        weight_floor: what rounding W₀ + Σ sBA once to the running dtype leaks by itself.
        by_basis: ‖B A V‖_F / ‖B A‖_F for V = U₀, then for what each earlier task added to U, in the order of
            `Audit.bases`; None where a task added nothing.
    """

    layer: str
    task: str
    factor_leak: float
    weight_leak: float | None
    weight_floor: float | None
    by_basis: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class ExportRow:
    """One layer in one precision, against what one task had protected when it was done.

    D is what the weights moved since then: W − W₀ for basis None, else W − W_t, both as that precision stores them.

    Attributes:
        export: "running", "fp32", "bf16" and "fp16" (merged: W₀ + Σ sBA rounded once), "adapter", or "saved".
        dtype: what the numbers are stored in.
        basis: None for U₀ (M1), else the task whose increment V_t of U is meant.
        leak: ‖D V‖_F / ‖D‖_F. None where V is empty, or the dtype cannot hold the weights.
        floor: the leak that rounding to the dtype causes by itself. None where nothing is rounded.
        random, worst: `keeplora.math.forward_change` on the whole of U as it was after that task. None where not asked for.
    """

    export: str
    dtype: str
    layer: str
    basis: str | None
    leak: float | None
    floor: float | None
    random: float | None = None
    worst: float | None = None


@dataclass(frozen=True)
class BackwardRow:
    """One layer and earlier task: what all later updates together may do, and did, to the answers to its inputs.

    Attributes:
        explained: ε_t. bound: ‖Σ s'B'A'‖₂² (1 − ε_t) tr C_t.
        harm: Σ_x ‖Σ s'B'A' x‖² = tr(ΔW C_t ΔWᵀ), exact; None where C_t was not kept.
        tightness: harm / bound. None without harm, and where the bound is 0 up to rounding.
        holds: whether harm ≤ bound, up to rounding (1e-6 of ‖ΔW‖₂² tr C_t); None without harm.
    """

    layer: str
    task: str
    explained: float
    bound: float
    harm: float | None
    tightness: float | None
    holds: bool | None


@dataclass(frozen=True, repr=False)
class Audit:
    """All rows; printing it, or ending an interactive line with it, shows them as a table."""

    rows: list[LeakRow]
    notes: tuple[str, ...] = ()
    """What the rows leave out, and why; one sentence each."""
    bases: tuple[str | None, ...] = ()
    """What U is made of: None for U₀, then the tasks in the order in which they came."""
    exports: tuple[ExportRow, ...] = ()
    backward: tuple[BackwardRow, ...] = ()

    @property
    def factor_leak_max(self) -> float:
        """The worst factor leak over layers and tasks; 0 without tasks."""
        return max((row.factor_leak for row in self.rows), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every factor leak is within METHOD.md's 1e-5, and what was saved leaks no more than rounding explains."""
        saved = (row for row in self.exports if row.export == "saved")
        return self.factor_leak_max <= FACTOR_LIMIT and all(judge(row.leak, row.floor) != ABOVE for row in saved)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the parts that were not asked for are left out."""
        out: dict[str, Any] = {
            "factor_leak_max": self.factor_leak_max, "rows": [_plain(row) for row in self.rows], "notes": list(self.notes),
            "bases": list(self.bases),
        }  # fmt: skip
        for name, rows in (("exports", self.exports), ("backward", self.backward)):
            if rows:
                out[name] = [_plain(row) for row in rows]
        return out

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        from keeplora.tuner.leaks.table import audit_text

        return audit_text(self)


def _plain(row: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(row).items()}


def worst_of(rows: Sequence[ExportRow]) -> ExportRow | None:
    """The row to show of several: the worst judged, then the one furthest above its own floor, then the largest."""
    rank = {OK: 0, FLOOR: 1, ABOVE: 2}
    measured = [row for row in rows if row.leak is not None]

    def badness(row: ExportRow) -> tuple[int, float]:
        leak = row.leak or 0.0
        return rank[judge(leak, row.floor) or OK], leak

    return max(measured, key=badness, default=None)
