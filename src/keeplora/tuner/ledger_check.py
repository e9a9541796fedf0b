"""`keeplora ledger verify` and `diff`: what a ledger says, recomputed; and where two of them part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.math import orthonormality_error
from keeplora.tuner.basis import Bases, check_values
from keeplora.tuner.chain import TASK
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.records import TaskRecord

ORTHONORMAL = 1e-5
"""Largest |UᵀU − I| and |AAᵀ/c − I| (METHOD.md point 7)."""
LEAK = 1e-6
"""Largest |A U| of a fixed A with unit rows (M4)."""
TRAINED_LEAK = 1e-4
"""‖A U‖_F / ‖A‖_F of an A that was trained, and projected after every step (gpm-lora)."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: in a few words. where: an entry's folder, or a file. value: what was measured, None where there is nothing
            to measure. limit: that ``value`` must not pass.
    """

    what: str
    where: str
    value: float | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.value is None or self.limit is None or self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "passed": self.passed}


def checks(ledger: Ledger) -> Iterator[Check]:
    """Everything that can be recomputed without the model, file by file; removed and rolled back tasks are checked too.

    A damaged file raises `LedgerError` where it is come to; a number over its limit is a `Check` that has not passed.
    """
    entries, chain = ledger.entries(), ledger.chain()
    yield Check("format, seal and targets", "ledger.json")
    yield Check(f"seals and parent hashes of {len(entries)} entries, and their end", ledger.path.name)
    bases = ledger.bases()
    protects = ledger.told.get("protects", bool(bases))
    if protects and bases.keys() != ledger.targets.keys():
        raise LedgerError(f"{ledger.path / 'base.safetensors'} and ledger.json do not name the same layers")
    worst = max((orthonormality_error(S.held) for S in bases.values()), default=0.0)
    yield Check("U₀: hash, shapes, max |UᵀU − I|", "base.safetensors", worst, ORTHONORMAL)
    known: dict[int, TaskRecord] = {}
    fixed_a = ledger.told.get("trains_a") is False
    for entry in entries:
        if entry.kind != TASK:
            continue
        record = ledger.record(entry.index)
        where = entry.folder.name
        purged = entry.index in chain.state.purged
        yield Check(
            "tensors: purged, directions kept" if purged else "tensors: hash, layers, shapes, finite values", where
        )
        if entry.metrics() is not None:
            yield Check("metrics: seal and record", where)
        if protects:
            U = Bases(bases, [known[i] for i in chain.before[entry.index]])
            yield from _of_task(record, U, where, purged=purged, fixed_a=fixed_a)
        known[entry.index] = record


def _of_task(record: TaskRecord, U: Bases, where: str, *, purged: bool, fixed_a: bool) -> Iterator[Check]:
    """What one task left; U is that of before it, and ``fixed_a`` says that the method does not train A."""
    check_values(record, U.records, where)
    after = U.extended(record)
    dims = after.dims()
    for name, told in record.used.items():
        if name in record.basis and told != dims[name]:
            raise LedgerError(
                f"{where}: layer {name!r} says that {told} columns of U are used, and there are {dims[name]}"
            )
    whole = [orthonormality_error(after[name]) for name in record.basis]
    if whole:
        yield Check("U after the task: max |UᵀU − I|", where, max(whole), ORTHONORMAL)
    if purged or not record.factors:
        return
    leaks, relative, rows = [], [], []
    for name, f in record.factors.items():
        A = f.A.to(torch.float64)
        AAt = A @ A.T
        c = float(AAt.diagonal().mean()) if len(A) else 0.0
        AU = A @ U[name].to(torch.float64)
        if c > 0:
            rows.append(float((AAt / c - torch.eye(len(A), dtype=torch.float64)).abs().max()))
            leaks.append(float(AU.abs().max()) / c**0.5 if AU.numel() else 0.0)
            relative.append(float(AU.norm()) / float(A.norm()))
    if fixed_a:
        yield Check("rows of A: max |AAᵀ/c − I|", where, max(rows, default=0.0), ORTHONORMAL)
        yield Check("A against U as it was: max |A U|", where, max(leaks, default=0.0), LEAK)
    else:  # also version 0, which does not say whether A was trained
        yield Check("A against U as it was: ‖A U‖/‖A‖", where, max(relative, default=0.0), TRAINED_LEAK)


def verify(ledger: Ledger) -> list[Check]:
    """All `checks`; `LedgerError` at the first that has not passed."""
    found = []
    for check in checks(ledger):
        if not check.passed:
            raise failure(ledger.path, check)
        found.append(check)
    return found


def failure(path: Path, check: Check) -> LedgerError:
    """The sentence for a check that has not passed."""
    return LedgerError(
        f"{path / check.where}: {check.what} is {check.value:.1e}, over the limit of {check.limit:.0e}: tensors were swapped "
        "or changed, and everything hashed anew; restore the ledger from a copy that you trust"
    )


def compare_ledgers(a: Ledger, b: Ledger) -> dict[str, Any]:
    """Where two ledgers part, and how far their models lie from each other, as JSON values.

    Returns:
        ``same_base``; ``common``: so many entries at the start say the same; ``only_a`` and ``only_b``: kind and name of
        the rest; ``layers``: per layer ‖ΔW_a‖, ‖ΔW_b‖, ‖ΔW_a − ΔW_b‖ (Frobenius, over the active tasks), and the last over
        the larger of the first two.
    """
    entries = a.entries(), b.entries()
    keys = [[_content(e.value) for e in side] for side in entries]
    common = next((i for i, (x, y) in enumerate(zip(*keys, strict=False)) if x != y), min(map(len, keys)))
    rest = [[{"entry": e.index, "kind": e.kind, "name": e.name} for e in side[common:]] for side in entries]
    records = a.records(), b.records()
    names = sorted({name for side in records for r in side for name in (*r.factors, *r.full)})
    layers = []
    for name in names:
        delta = [_delta(side, name) for side in records]
        norms = [float(d.norm()) if d is not None else 0.0 for d in delta]
        one, other = delta
        if one is not None and other is not None and one.shape != other.shape:
            raise LedgerError(f"{name} has another shape in {a.path} than in {b.path}: they belong to different models")
        apart = float((one - other).norm()) if one is not None and other is not None else max(norms)
        layers.append(
            {"layer": name, "a": norms[0], "b": norms[1], "difference": apart,
             "relative": apart / max(norms) if max(norms) > 0 else 0.0}
        )  # fmt: skip
    return {
        "same_base": a.head["base"]["hash"] == b.head["base"]["hash"], "common": common, "only_a": rest[0],
        "only_b": rest[1], "layers": layers,
    }  # fmt: skip


def differ(told: Mapping[str, Any]) -> bool:
    """Whether `compare_ledgers` found anything."""
    return (
        not told["same_base"] or bool(told["only_a"] or told["only_b"]) or any(r["difference"] for r in told["layers"])
    )


def _content(value: dict[str, Any]) -> tuple[Any, ...]:
    """What an entry does, whenever and wherever it was written."""
    kind = value.get("kind", TASK)
    return (
        kind,
        value["name"],
        value.get("subject"),
        value["base_hash"],
        value.get("tensors_sha256"),
        value.get("layers"),
    )


def _delta(records: Sequence[TaskRecord], name: str) -> Tensor | None:
    found = [r.factors[name].delta if name in r.factors else r.full[name] for r in records if name in r.updates]
    return torch.stack([d.to(torch.float64) for d in found]).sum(0) if found else None
