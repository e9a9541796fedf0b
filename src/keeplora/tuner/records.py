"""What one task left behind, and how it is laid out in a safetensors file and in JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.tuner.adapter import Factors

KINDS = ("A", "B", "basis", "delta", "covariance", "extra", "values", "kept")
"""What the tensors of a record's file are, by the first part of their keys."""


@dataclass
class TaskRecord:
    """What one task left behind.

    Attributes:
        factors: A, B and s per layer (low-rank methods). full: ΔW per layer (full fine-tuning), or per parameter by its
            full name (free modules).
        basis: new protected directions per layer, (in, m). explained: ε_t per layer. trace: tr C_t per layer.
        used: columns of U per layer after the task. covariance: C_t per layer, if kept.
        values: per layer, the share of tr C_t along every column that tasks have added up to this one, (Σ m,).
        kept: per layer, which of those columns are in force, (Σ m,) bool; only where this task took older ones out.
        tensors: whatever else belongs to the task (class heads). info: JSON values (classes, templates, ...).
        config: the `KeepLoraConfig` in force, as JSON. versions: of the packages that it was learned with. time: UTC.
        entry: its number in the ledger, from 1; 0 before it is entered.
    """

    name: str
    factors: dict[str, Factors] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    trace: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    covariance: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    time: str = ""
    entry: int = 0

    @property
    def updates(self) -> dict[str, Factors | Tensor]:
        """ΔW per layer as it is kept: factors, or whole where the method has none. What a store is given."""
        return {**self.factors, **self.full}

    @property
    def deltas(self) -> dict[str, Tensor]:
        """ΔW per layer, float32."""
        return {name: f.delta for name, f in self.factors.items()} | self.full

    def layers(self) -> dict[str, dict[str, Any]]:
        """The JSON part per layer."""
        names = sorted(set(self.factors) | set(self.full) | set(self.used))
        out: dict[str, dict[str, Any]] = {}
        for name in names:
            f = self.factors.get(name)
            out[name] = {
                "s": f.s if f else None, "rank": f.A.shape[0] if f else 0, "explained": self.explained.get(name),
                "trace": self.trace.get(name), "used": self.used.get(name),
            }  # fmt: skip
        return out

    def file(self) -> dict[str, Tensor]:
        """All tensors by their keys in tensors.safetensors."""
        tensors: dict[str, Tensor] = {}
        for name, f in self.factors.items():
            tensors[f"A/{name}"], tensors[f"B/{name}"] = f.A, f.B
        for kind, group in (("delta", self.full), ("covariance", self.covariance), ("extra", self.tensors)):
            tensors |= {f"{kind}/{name}": value for name, value in group.items()}
        return tensors | self.directions()

    def directions(self) -> dict[str, Tensor]:
        """What U is made of, by keys likewise: it outlives a purge where later tasks rely on it."""
        groups = (("basis", self.basis), ("values", self.values), ("kept", self.kept))
        return {f"{kind}/{name}": value for kind, group in groups for name, value in group.items()}

    def emptied(self) -> TaskRecord:
        """The record as it is after its tensors were purged: what it says, and its directions."""
        return TaskRecord(
            self.name, basis=self.basis, values=self.values, kept=self.kept, explained=self.explained, trace=self.trace,
            used=self.used, info=self.info,
            config=self.config, versions=self.versions, time=self.time, entry=self.entry,
        )  # fmt: skip


def slug(name: str) -> str:
    """A task's name as a file name.

    >>> slug("Road signs / EU")
    'road-signs-eu'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "task"


def group(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind, by layer."""
    return {key[len(kind) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{kind}/")}


def check_layers(layers: Mapping[str, Any], file: Path) -> None:
    """`LedgerError` unless every entry of a record's ``layers`` holds numbers of the right kind."""
    for name, told in layers.items():
        if not isinstance(told, dict):
            raise _bad("the entry", name, file)
        for key in ("s", "explained", "trace"):
            if told.get(key) is not None and not _finite(told[key]):
                raise _bad(f"{key} = {told[key]!r:.60}", name, file)
        for key in ("rank", "used"):
            if told.get(key) is not None and (type(told[key]) is not int or told[key] < 0):
                raise _bad(f"{key} = {told[key]!r:.60}", name, file)


def _bad(what: str, name: str, file: Path) -> LedgerError:
    return LedgerError(f"{file}: {what} of layer {name!r:.80} cannot be used; restore the ledger from a copy")


def read_record(
    value: Mapping[str, Any], tensors: Mapping[str, Tensor], targets: Mapping[str, tuple[int, int]], where: Path,
    *, purged: bool = False,
) -> TaskRecord:  # fmt: skip
    """A record from its JSON and its tensors; whatever does not fit the other or the targets is refused by name.

    Args:
        targets: (in, out) of each target. where: the record's folder, for the sentence. purged: no update is expected.

    Raises:
        LedgerError: a layer without its tensors or the reverse, a shape that does not fit, a number that is not finite.
    """
    file = where / "record.json"
    if strange := [key for key in tensors if key.partition("/")[0] not in KINDS]:
        raise LedgerError(f"{where}: its tensors hold {strange[0]!r}, of which this keeplora knows nothing: upgrade it")
    layers = value["layers"]
    A, B, basis = group(tensors, "A"), group(tensors, "B"), group(tensors, "basis")
    for kind, found in (("A", A), ("B", B), ("basis", basis), ("covariance", group(tensors, "covariance"))):
        for name, tensor in found.items():
            if name not in layers:
                raise LedgerError(f"{where}: its tensors hold {kind}/{name}, of which {file.name} knows nothing")
            _check_tensor(kind, name, tensor, targets, where)
    if A.keys() != B.keys():
        odd = sorted(A.keys() ^ B.keys())[0]
        raise LedgerError(f"{where}: its tensors hold one factor of layer {odd!r} without the other")
    for name, told in layers.items():
        rank = told.get("rank") or 0
        if not purged and (A[name].shape[0] if name in A else 0) != rank:
            raise LedgerError(f"{where}: layer {name!r} has rank {rank} in {file.name}, and another in its tensors")
        if name in A and (A[name].shape[0] != B[name].shape[1] or told.get("s") is None):
            raise _bad("the factors' rank or their scale s", name, file)
    full = group(tensors, "delta")
    for name, tensor in full.items():
        _check_tensor("delta", name, tensor, targets, where)
    for kind, dtypes in (("values", (torch.float32,)), ("kept", (torch.bool,))):
        for name, tensor in group(tensors, kind).items():
            if (
                name not in layers
                or tensor.ndim != 1
                or tensor.dtype not in dtypes
                or not bool(torch.isfinite(tensor).all())
            ):
                raise LedgerError(f"{where}: {kind}/{name} is not a vector as keeplora writes it: the file was changed")
    for name, tensor in group(tensors, "extra").items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise LedgerError(f"{where}: extra/{name} holds NaN or infinity: the file was changed")
    return TaskRecord(
        name=value["name"],
        factors={name: Factors(A[name], B[name], float(layers[name]["s"])) for name in layers if name in A},
        full=full, basis=basis,
        explained={n: v["explained"] for n, v in layers.items() if v.get("explained") is not None},
        trace={n: v["trace"] for n, v in layers.items() if v.get("trace") is not None},
        used={n: v["used"] for n, v in layers.items() if v.get("used") is not None},
        covariance=group(tensors, "covariance"), values=group(tensors, "values"), kept=group(tensors, "kept"),
        tensors=group(tensors, "extra"), info=dict(value["info"]),
        config=dict(value.get("config") or {}), versions=dict(value.get("versions") or {}),
        time=str(value.get("time") or ""), entry=value["index"],
    )  # fmt: skip


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _check_tensor(kind: str, name: str, tensor: Tensor, targets: Mapping[str, tuple[int, int]], where: Path) -> None:
    if name in targets:
        n_in, n_out = targets[name]
        wanted = {
            "A": (None, n_in), "B": (n_out, None), "basis": (n_in, None), "covariance": (n_in, n_in), "delta": (n_out, n_in),
        }[kind]  # fmt: skip
        fits = tensor.ndim == 2 and all(w in (None, n) for w, n in zip(wanted, tensor.shape, strict=True))
        if not fits:
            shape = " × ".join("any" if n is None else str(n) for n in wanted)
            raise LedgerError(
                f"{where}: {kind}/{name} has shape {tuple(tensor.shape)}, but the layer asks for {shape}: the file was "
                "changed, or belongs to another model"
            )
    elif kind != "delta":
        raise LedgerError(f"{where}: its tensors hold {kind}/{name}, but {name!r} is no target of this ledger")
    if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
        raise LedgerError(
            f"{where}: {kind}/{name} holds NaN, infinity, or other numbers than float32: the file was changed"
        )
