"""Checkpoints of the task under way: RUN/checkpoint/, safetensors and JSON, whole or not at all.

Layout: checkpoint/TASK-NUMBER/state.json and tensors.safetensors (docs/formats.md). A new one is renamed into place before
the one before it is deleted, so that a kill at any moment leaves one that is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.experiment.interrupt import STOP
from keeplora.files import atomic_dir, atomic_write_json, sha256_file

FORMAT = "keeplora-checkpoint"
VERSION = 0
FOLDER = "checkpoint"
_NAME = re.compile(r"\d{4,}-\d{8,}")

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and JSON values beside them."""


class CheckpointError(KeepLoraError):
    """A checkpoint that is damaged, or of another run; the sentence says what does not fit."""


def seal(value: Mapping[str, Any]) -> str:
    """SHA-256 of all keys of a JSON object but "seal"."""
    text = json.dumps({k: v for k, v in value.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def ledger_digest(ledger: Path) -> str:
    """SHA-256 over the ledger's JSON files: its head and its records, each of which names the hash of its tensors."""
    total = hashlib.sha256()
    for file in sorted(ledger.rglob("*.json")):
        inside = file.relative_to(ledger)
        if not any(part.startswith(".") for part in inside.parts):
            total.update(f"{inside.as_posix()}|{sha256_file(file)}|".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; every field must be equal for it to be used.

    Attributes:
        task, index: name, and place in the order from 1. config: digest of every setting that the task's numbers depend
            on, but for those that may change (`keeplora.experiment.resuming`). ledger: `ledger_digest`. data: the
            task's fingerprint. versions: of the libraries that the numbers depend on. device: "cpu" or "cuda".
    """

    task: str
    index: int
    config: str
    ledger: str
    data: str
    versions: dict[str, str]
    device: str

    def differs(self, other: Mapping[str, Any]) -> str | None:
        """What the other one does not share, in words; None where it is the same."""
        words = {
            "task": "it is of another task", "index": "it is of another place in the order",
            "config": "the configuration has changed", "ledger": "the learned tasks are others now",
            "data": "the task's data have changed", "versions": "the installed libraries are others now",
            "device": "it was written on another kind of device",
        }  # fmt: skip
        return next((why for key, why in words.items() if other.get(key) != getattr(self, key)), None)


def _finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor that holds NaN or infinity."""
    return next((k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)


class Checkpoints:
    """The folder of a run's checkpoints; there is never one of more than one task."""

    def __init__(self, run: Path) -> None:
        self.path = run / FOLDER

    def _found(self) -> list[Path]:
        """Newest first."""
        if self.path.is_symlink() or not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if _NAME.fullmatch(p.name)), reverse=True)

    def write(self, identity: Identity, steps: int, snapshot: Snapshot) -> Path:
        """Write a checkpoint after ``steps`` steps of the task, and delete the others.

        Raises:
            FloatingPointError: a tensor holds NaN or infinity; the checkpoint before stays.
            OSError: the disk is full or cannot be written to; the checkpoint before stays.
        """
        if self.path.is_symlink():  # nothing is written outside the run's folder
            self.path.unlink()
        tensors, values = snapshot
        tensors = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
        if (bad := _finite(tensors)) is not None:
            raise FloatingPointError(f"{bad} holds NaN or infinity after {steps} steps of task {identity.task!r}")
        number = 1 + max((int(p.name.split("-")[1]) for p in self._found()), default=0)
        path = self.path / f"{identity.index:04d}-{number:08d}"
        with atomic_dir(path) as part:
            file = part / "tensors.safetensors"
            save_file(tensors, file)
            value = {
                "format": FORMAT, "version": VERSION, "belongs_to": vars(identity), "steps": steps,
                "tensors_sha256": sha256_file(file), **values,
            }  # fmt: skip
            value = json.loads(json.dumps(value, allow_nan=False))  # as a reader will see it
            atomic_write_json(part / "state.json", {**value, "seal": seal(value)})
        for old in self.path.iterdir():  # the one before, and what a kill left half-written
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def read(self, identity: Identity) -> Snapshot | None:
        """The newest checkpoint; None where there is none.

        Raises:
            CheckpointError: it cannot be used; the sentence says why.
        """
        found = self._found()
        return self._read(found[0], identity) if found else None

    def _read(self, path: Path, identity: Identity) -> Snapshot:
        if path.is_symlink():
            raise CheckpointError("it is a link and no folder")
        state, file = path / "state.json", path / "tensors.safetensors"
        try:
            value = json.loads(state.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise CheckpointError("state.json is missing or no JSON") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CheckpointError(f"its format is not {FORMAT!r}")
        if value.get("version") != VERSION:
            raise CheckpointError(f"it has version {value.get('version')!r}, and this keeplora reads {VERSION}")
        if value.get("seal") != seal(value):
            raise CheckpointError("state.json was changed after it was written")
        belongs = value.get("belongs_to")
        if not isinstance(belongs, dict) or (why := identity.differs(belongs)) is not None:
            raise CheckpointError(why if isinstance(belongs, dict) else "it does not say what it belongs to")
        try:
            if sha256_file(file) != value.get("tensors_sha256"):
                raise CheckpointError("tensors.safetensors is damaged")
            tensors = load_file(file)
        except (OSError, SafetensorError, ValueError):
            raise CheckpointError("tensors.safetensors is missing or damaged") from None
        if (bad := _finite(tensors)) is not None:
            raise CheckpointError(f"{bad} holds NaN or infinity")
        return tensors, value

    def drop_finished(self, done: int) -> None:
        """Delete what a kill left of a task that the ledger holds, or of a checkpoint that was never whole."""
        found = self._found()
        if not found or int(found[0].name.split("-")[0]) <= done:
            self.clear()

    def clear(self) -> None:
        """Delete them all."""
        if self.path.is_symlink():
            self.path.unlink()
        elif self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)


class Keeper:
    """Decides when the task under way is kept, and keeps it.

    Args:
        minutes, steps: at most so much of both between two checkpoints; None: no limit of that kind.
        more: what belongs into a checkpoint beside the loop's own state.
        tell: gets a line where a checkpoint could not be written.
        saved: the checkpoint to go on from.

    Attributes:
        late: asked whether so many minutes make it time; where a state is put together from several processes, they agree.
    """

    def __init__(
        self, checkpoints: Checkpoints, identity: Identity, *, minutes: float | None, steps: int | None,
        more: Callable[[], Snapshot], tell: Callable[[str], None], saved: Snapshot | None = None,
    ) -> None:  # fmt: skip
        self.saved = saved
        self._checkpoints, self._identity, self._more, self._tell = checkpoints, identity, more, tell
        self._minutes, self._steps = minutes, steps
        self._last = time.monotonic()
        self.late: Callable[[bool], bool] = bool

    def _late(self, share: float = 1.0) -> bool:
        return self._minutes is not None and self.late(time.monotonic() - self._last >= 60 * self._minutes * share)

    def after_step(self, steps: int, snapshot: Callable[[], Snapshot]) -> None:
        """After each step of the task: save if it is time, or if the process is to stop; raises `Interrupted` then."""
        if STOP.due or self._late() or (self._steps is not None and steps % self._steps == 0):
            self.save(steps, snapshot)
        STOP.check()

    def at_end(self, steps: int, snapshot: Callable[[], Snapshot]) -> None:
        """When training is over: what follows (merging, statistics) takes its time too."""
        STOP.agree()
        if STOP.due or self._steps is not None or self._late(0.1):
            self.save(steps, snapshot)
        STOP.check()

    def save(self, steps: int, snapshot: Callable[[], Snapshot]) -> None:
        """Write a checkpoint now. A full disk is told and costs the checkpoint, not the run."""
        own, more = snapshot(), self._more()
        try:
            self._checkpoints.write(self._identity, steps, ({**own[0], **more[0]}, {**own[1], **more[1]}))
        except OSError as error:
            self._tell(f"no checkpoint could be written ({error.strerror or error}); training goes on")
        self._last = time.monotonic()
