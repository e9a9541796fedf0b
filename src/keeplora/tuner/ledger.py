"""The ledger: every learned task as a record on disk, each pointing at the one before (format v0).

Layout::

    ledger.json              format, version, base model (name, class, hash of target weights), targets, config, bases
    base.safetensors         "basis/<layer>": U₀ (in, p), float32; or "complement/<layer>": (in, in − p), where that is smaller
    0001-<task>/record.json  what the task was: layers (s, rank, ε_t, tr C_t), classes, metrics, parent hash, ...
    0001-<task>/tensors.safetensors   "A/<layer>", "B/<layer>", "basis/<layer>" (new directions), "delta/<layer>"
                             (full updates), "covariance/<layer>" (if kept), "extra/<name>" (heads), "values/<layer>"
                             (what each direction protects), "kept/<layer>" (which are in force, where a budget took some)

A record is written into a hidden folder and renamed, so it is there whole or not at all. ``parent`` is the SHA-256 of
the previous record.json (of ledger.json for the first), each record names the SHA-256 of its tensors, and each JSON
file's ``seal`` is the SHA-256 of its other keys: nothing points at the last record, so it must vouch for itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.files import atomic_dir, atomic_write_json, sha256_file
from keeplora.math import Subspace
from keeplora.tuner.adapter import Factors

FORMAT = "keeplora-ledger"
VERSION = 0


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
        tensors: whatever else belongs to the task (class heads). info: JSON values (classes, templates, metrics, ...).
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


def slug(name: str) -> str:
    """A task's name as a file name.

    >>> slug("Road signs / EU")
    'road-signs-eu'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "task"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LedgerError(f"{path} is missing: the ledger is not complete; copy the whole folder again") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LedgerError(
            f"{path} is not readable JSON ({error}): the file is damaged; restore it from a copy"
        ) from None


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise LedgerError(f"{path} is missing: the ledger is not complete; copy the whole folder again")
    if sha256_file(path) != digest:
        raise LedgerError(f"{path} does not have the SHA-256 that its record names: the file was changed or damaged")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise LedgerError(f"{path} is not a readable safetensors file ({error})") from None


def _seal(value: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in value.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _write_sealed(path: Path, value: dict[str, Any]) -> None:
    value = json.loads(json.dumps(value, allow_nan=False))  # as a reader will see it: keys as strings, tuples as lists
    atomic_write_json(path, {**value, "seal": _seal(value)})


def _check_head(value: Any, path: Path) -> None:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise LedgerError(f"{path} is not a keeplora ledger: its 'format' is not {FORMAT!r}")
    version = value.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise LedgerError(
            f"{path} has format version {version!r}; this keeplora reads up to version {VERSION}: upgrade keeplora"
        )
    if value.get("seal") != _seal(value):
        raise LedgerError(f"{path} was changed after it was written: its 'seal' does not fit; restore it from a copy")


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _group(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key[len(kind) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{kind}/")}


class Ledger:
    """A ledger's folder. Use `create` for a new one and `open` for one that is there."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.head = head

    @classmethod
    def create(cls, path: str | Path, *, base: dict[str, Any], targets: list[dict[str, Any]], config: dict[str, Any],
               bases: Mapping[str, Subspace], versions: dict[str, str]) -> Ledger:  # fmt: skip
        """Write ledger.json and base.safetensors into a new folder, whole or not at all."""
        path = Path(path)
        if path.exists():
            raise LedgerError(f"{path} exists already: choose another folder, or open it with from_pretrained")
        head = {
            "format": FORMAT, "version": VERSION, "base": base, "targets": targets, "config": config,
            "versions": versions,
        }  # fmt: skip
        with atomic_dir(path) as part:
            file = part / "base.safetensors"
            save_file(
                {f"{'complement' if S.by_complement else 'basis'}/{n}": S.held.contiguous() for n, S in bases.items()},
                file,
            )
            head["tensors_sha256"] = sha256_file(file)
            _write_sealed(part / "ledger.json", head)
        return cls(path, head)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Open a ledger's folder; `LedgerError` names what is missing, damaged or too new."""
        path = Path(path)
        head = _read_json(path / "ledger.json")
        _check_head(head, path / "ledger.json")
        return cls(path, head)

    def bases(self) -> dict[str, Subspace]:
        """U₀ per layer, by its smaller side."""
        tensors = _read_tensors(self.path / "base.safetensors", self.head["tensors_sha256"])
        found = {name: Subspace.of(U) for name, U in _group(tensors, "basis").items()}
        return found | {name: Subspace(N, True) for name, N in _group(tensors, "complement").items()}

    def folders(self) -> list[Path]:
        """Record folders in task order."""
        found = sorted(p for p in self.path.iterdir() if p.is_dir() and re.match(r"\d{4}-", p.name))
        for i, folder in enumerate(found, 1):
            if int(folder.name[:4]) != i:
                raise LedgerError(f"{self.path}: record {i:04d} is missing before {folder.name}")
        return found

    def append(self, record: TaskRecord) -> Path:
        """Add a record after the last one; atomic."""
        folders = self.folders()
        parent = _file_hash(folders[-1] / "record.json" if folders else self.path / "ledger.json")
        tensors: dict[str, Tensor] = {}
        for name, f in record.factors.items():
            tensors[f"A/{name}"], tensors[f"B/{name}"] = f.A, f.B
        for kind, group in (
            ("delta", record.full), ("basis", record.basis), ("covariance", record.covariance), ("extra", record.tensors),
            ("values", record.values), ("kept", record.kept),
        ):  # fmt: skip
            tensors |= {f"{kind}/{name}": value for name, value in group.items()}
        target = self.path / f"{len(folders) + 1:04d}-{slug(record.name)}"
        with atomic_dir(target) as part:
            file = part / "tensors.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
            _write_sealed(
                part / "record.json",
                {
                    "format": FORMAT, "version": VERSION, "index": len(folders) + 1, "name": record.name,
                    "base_hash": self.head["base"]["hash"], "parent": parent, "tensors_sha256": sha256_file(file),
                    "layers": record.layers(), "info": record.info,
                },
            )  # fmt: skip
        return target

    def records(self) -> list[TaskRecord]:
        """All records in order, with the chain of parent hashes checked; `LedgerError` names the first bad one."""
        out: list[TaskRecord] = []
        parent = _file_hash(self.path / "ledger.json")
        for i, folder in enumerate(self.folders(), 1):
            file = folder / "record.json"
            value = _read_json(file)
            _check_head(value, file)
            if value["index"] != i or value["parent"] != parent:
                raise LedgerError(
                    f"{file} does not follow the record before it: the ledger was reordered or changed by hand"
                )
            if value["base_hash"] != self.head["base"]["hash"]:
                raise LedgerError(f"{file} belongs to another base model than {self.path / 'ledger.json'}")
            parent = _file_hash(file)
            out.append(self._record(value, _read_tensors(folder / "tensors.safetensors", value["tensors_sha256"])))
        return out

    @staticmethod
    def _record(value: dict[str, Any], tensors: dict[str, Tensor]) -> TaskRecord:
        layers = value["layers"]
        A, B = _group(tensors, "A"), _group(tensors, "B")
        return TaskRecord(
            name=value["name"],
            factors={name: Factors(A[name], B[name], layers[name]["s"]) for name in layers if name in A},
            full=_group(tensors, "delta"), basis=_group(tensors, "basis"),
            explained={n: v["explained"] for n, v in layers.items() if v["explained"] is not None},
            trace={n: v["trace"] for n, v in layers.items() if v["trace"] is not None},
            used={n: v["used"] for n, v in layers.items() if v["used"] is not None},
            covariance=_group(tensors, "covariance"), tensors=_group(tensors, "extra"), info=value["info"],
            values=_group(tensors, "values"), kept=_group(tensors, "kept"),
        )  # fmt: skip
