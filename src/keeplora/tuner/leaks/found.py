"""The rows of exports: those that could be written now, and one that lies on disk."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.tuner.adapter import Factors
from keeplora.tuner.leaks.factors import digest
from keeplora.tuner.leaks.rows import ExportRow
from keeplora.tuner.leaks.saved import SavedExport
from keeplora.tuner.leaks.state import LayerState, as_factors, dense, layer_states
from keeplora.tuner.leaks.weights import DTYPES, Depth, adapter_rows, dtype_name, merged_rows
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.quantised import quantisation
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import Update

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

SAME = 1e-2
"""A saved layer counts as a set of tasks up to this share of their update: 16-bit factors differ by 2e-3, a task by more."""

_known: weakref.WeakKeyDictionary[ContinualLearner, dict[str, tuple[tuple[str, ...], list[ExportRow]]]]
_known = weakref.WeakKeyDictionary()


def merged_and_adapter_rows(
    learner: ContinualLearner, states: dict[str, LayerState], names: list[str | None], depth: Depth
) -> list[ExportRow]:
    """Every precision that an export could have, the running one apart; a quantised base has the adapter alone."""
    known = _known.setdefault(learner, {})
    rows: list[ExportRow] = []
    for t in learner.targets:
        state = states[t.name]
        key = _key(state, names)
        if depth == Depth() and t.name in known and known[t.name][0] == key:
            rows += known[t.name][1]  # the last task's results are written twice
            continue
        found: list[ExportRow] = []
        W0 = learner.store.W0[t.name]
        if quantisation(learner.store.module(t.name)) is None:
            for name, dtype in DTYPES.items():
                if dtype != W0.dtype:
                    found += merged_rows(state, names, W0, dtype, depth, export=name)
        if all(update is None or isinstance(update, Factors) for update in state.updates):
            found += adapter_rows(state, names, W0, depth)
        if depth == Depth():
            known[t.name] = (key, found)
        rows += found
    return rows


def _key(state: LayerState, names: list[str | None]) -> tuple[str, ...]:
    halves = [
        half for update in state.updates if update is not None for half in (as_factors(update).A, as_factors(update).B)
    ]
    return (str(names), digest(state.guarded(0)[0]) if halves else "", *(digest(half) for half in halves))


def saved_rows(
    learner: ContinualLearner, folder: str | Path, names: list[str | None], depth: Depth
) -> tuple[list[ExportRow], list[str]]:
    """(rows, notes) of an export on disk, against the tasks that it holds.

    Raises:
        KeepLoraError: no export, one of another model, or a merged checkpoint of a model that was learned quantised.
    """
    saved = SavedExport(folder, learner.targets)
    if saved.kind == "checkpoint" and any(quantisation(learner.store.module(t.name)) for t in learner.targets):
        raise KeepLoraError(
            f"{folder} is a merged checkpoint, but the run learned on a quantised base, whose weights differ from it by the "
            "quantisation; audit the adapter (keeplora export --format peft)"
        )
    records, notes = _held_tasks(learner, saved)
    states = layer_states(learner, lambda record: any(record is one for one in records))
    rows: list[ExportRow] = []
    strange: list[str] = []
    for t in learner.targets:
        state, W0 = states[t.name], learner.store.W0[t.name]
        distance = _distance(saved, t, W0, state.updates)
        if distance > SAME:
            strange.append(t.name)
        if saved.kind == "checkpoint":
            rows += merged_rows(
                state, names, W0, saved.dtype, depth, export="saved", W=saved.weight(t)
            ) or _strangers(state, W0, saved.weight(t), dtype_name(saved.dtype))  # fmt: skip
            continue
        f = saved.factors(t)
        if f is None:
            f = Factors(torch.zeros(0, t.n_in), torch.zeros(t.n_out, 0), 1.0)
        rows += adapter_rows(state, names, W0, depth, export="saved", dtype=saved.dtype, held=f)
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        notes.append(f"{folder}: {strange[0]}{more} is not what the tasks in force add up to.")
    return rows, notes


def _held_tasks(learner: ContinualLearner, saved: SavedExport) -> tuple[list[TaskRecord], list[str]]:
    """Which learned tasks an export holds: all, the first so many, one, or all but one; all where nothing fits."""
    records = list(learner.records)
    candidates = [records[:n] for n in range(len(records), 0, -1)]
    candidates += [[one] for one in records[1:]]
    candidates += [[r for r in records if r is not one] for one in records[:-1]] if len(records) > 2 else []
    targets = [t for t in learner.targets if any(t.name in r.updates for r in records)]
    sample = targets[:: max(1, len(targets) // 4)]
    best, least = _closest(learner, saved, sample, candidates, records)
    if least > SAME and learner.removed:
        everything = sorted([*records, *(r for r in learner.removed if r.updates)], key=lambda record: record.entry)
        more = [everything[:n] for n in range(len(everything), 0, -1)] + [[one] for one in everything]
        told, near = _closest(learner, saved, sample, more, records)
        if near <= SAME:
            names = ", ".join(record.name for record in told)
            out = ", ".join(record.name for record in told if not any(record is one for one in records))
            return records, [
                f"{saved.folder}: {_what(saved)} in {dtype_name(saved.dtype)}, holding {names}. Of these {out} was taken out of "
                "the ledger since; the export still has it. It is audited as if it were meant to hold the tasks in force."
            ]
    if least > SAME:
        purged = [record.name for record in learner.removed if not record.updates]
        gone = f" It may hold {', '.join(purged)}, whose tensors were purged." if purged else ""
        return records, [
            f"{saved.folder} does not hold the sum of any tasks of the ledger in {dtype_name(saved.dtype)}; it is audited "
            f"as if it were meant to hold them all.{gone}"
        ]
    named = "all tasks" if len(best) == len(records) else ", ".join(record.name for record in best)
    return best, [f"{saved.folder}: {_what(saved)} in {dtype_name(saved.dtype)}, holding {named}."]


def _closest(
    learner: ContinualLearner, saved: SavedExport, sample: Sequence[Target], candidates: Iterable[list[TaskRecord]],
    otherwise: list[TaskRecord],
) -> tuple[list[TaskRecord], float]:  # fmt: skip
    """The candidate whose updates add up to what is saved, and how far they are from it at most, over a few layers."""
    best, least = otherwise, float("inf")
    for held in candidates:
        distance = max(
            (_distance(saved, t, learner.store.W0[t.name], [r.updates.get(t.name) for r in held]) for t in sample),
            default=0.0,
        )
        if distance < least:
            best, least = held, distance
    return best, least


def _what(saved: SavedExport) -> str:
    return "an adapter" if saved.kind == "adapter" else "a merged checkpoint"


def _distance(saved: SavedExport, t: Target, W0: Tensor, updates: Iterable[Update | None]) -> float:
    """‖what it holds − what the updates add up to‖_F over the size of their sum."""
    expected = sum((dense(u) for u in updates if u is not None), torch.zeros(t.n_out, t.n_in))
    if saved.kind == "checkpoint":
        merged = (W0.to(torch.float32) + expected).to(saved.dtype)
        off = saved.weight(t).to(torch.float64) - merged.to(torch.float64)
    else:
        f = saved.factors(t)
        off = expected if f is None else f.delta - expected
    norm, size = float(off.norm()), float(expected.norm())
    return norm / size if size > 0 else float("inf") if norm > 0 else 0.0


def _strangers(state: LayerState, W0: Tensor, W: Tensor, dtype: str) -> list[ExportRow]:
    """A layer that no held task moved: whatever moved it leaks in full, beside no rounding."""
    U0 = state.U[:, : state.widths[0]].to(torch.float64)
    D = W.to(torch.float64) - W0.to(W.dtype).to(torch.float64)
    norm = float(D.norm())
    if norm == 0 or U0.shape[1] == 0:
        return []
    return [ExportRow("saved", dtype, state.name, None, float((D @ U0).norm()) / norm, 0.0)]
