"""What of a ledger may leave the machine: no samples of the training data, no paths; the rest as it was learned."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora.errors import HubError
from keeplora.files import atomic_dir
from keeplora.hub import is_repo_id
from keeplora.tuner import TaskRecord
from keeplora.tuner.ledger import Ledger

LEARNED = ("head", "fisher/", "reglora/", "moelora/", "sd_lora/", "rail/G", "rail/C")
"""Names (or their beginnings, up to the slash) of ``extra/`` tensors that are learned or summed over a whole task. Whatever
else a method keeps may be its training data, and stays here unless it is asked for."""
NEEDED = ("rail/features", "rail/labels")
"""Training data without which the method cannot answer."""
WORDS = ("classes", "templates", "prompt", "scorer")
"""Entries of ``info`` that the model is asked with: never touched, whatever they look like."""
_PATH = re.compile(r"(?<![\w:/.])(?:~|/[\w.@+-]+|[A-Za-z]:[\\/][\w.@+ -]+|\\\\[\w.-]+)(?:[\\/][\w.@+-]+)+[\\/]?")
_SECRET = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})\b")
TEXT = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".model", ".py")


def without_paths(value: Any) -> Any:
    """The value with every path of a machine in its texts cut down to its last part.

    >>> without_paths({"model": "/home/ann/models/clip", "why": ["no file ~/data/a b", "50 / 50", "openai/clip"]})
    {'model': 'clip', 'why': ['no file a b', '50 / 50', 'openai/clip']}
    """
    if isinstance(value, str):
        return _PATH.sub(lambda m: re.split(r"[\\/]", m[0].rstrip("\\/"))[-1], value)
    if isinstance(value, Mapping):
        return {key: entry if key in WORDS else without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    return value


def is_learned(name: str) -> bool:
    """Whether an ``extra/`` tensor is known to hold no training data.

    >>> [is_learned(name) for name in ("head", "rail/G", "replay/pixels", "rail/features", "mine/memory")]
    [True, True, False, False, False]
    """
    return any(name == known or (known.endswith("/") and name.startswith(known)) for known in LEARNED)


def portable_name(name: str, base_dir: str | os.PathLike[str] | None = None) -> str:
    """A model's name as others may read it: of a local folder its last part."""
    local = Path(base_dir or ".", name).is_dir() or Path(name).expanduser().is_dir()
    return Path(name).name if local or not (is_repo_id(name) or re.fullmatch(r"[\w.-]*", name)) else name


def portable_records(
    records: Sequence[TaskRecord], base_name: str, with_samples: bool
) -> tuple[list[TaskRecord], list[str]]:
    """The records as they may be published, and what was left out, one phrase each.

    Raises:
        HubError: what would be left out is what the method answers with.
    """
    out, samples, covariances, paths = [], set(), False, False
    for record in records:
        dropped = set() if with_samples else {name for name in record.tensors if not is_learned(name)}
        if needed := sorted(name for name in dropped if name in NEEDED):
            raise HubError(
                f"task {record.name!r}: the method answers with its training data ({needed[0]}), so without it the ledger is "
                "of no use: publish it with --with-samples, or use a method that keeps none"
            )
        info = without_paths(record.info)
        if "model" in info:
            info["model"] = base_name
        covariance = record.covariance if with_samples else {}
        samples |= {name.split("/")[0] for name in dropped}
        covariances |= len(covariance) < len(record.covariance)
        paths |= json.dumps(info, sort_keys=True) != json.dumps(record.info, sort_keys=True)
        tensors = {name: value for name, value in record.tensors.items() if name not in dropped}
        out.append(dataclasses.replace(record, tensors=tensors, covariance=covariance, info=info))
    left_out = []
    if samples:
        left_out.append(
            f"what the method keeps of its training data ({', '.join(sorted(samples))}), so going on here does without it"
        )
    if covariances:
        left_out.append("the covariances of the training data's features, which only an audit reads")
    if paths:
        left_out.append("paths and the local name of the base model, in the ledger's settings")
    return out, left_out


@dataclass(frozen=True)
class Kept:
    """A task whose directions are in U: in force, or taken out while later ones rely on it. ``metrics`` are those that the
    ledger keeps beside it."""

    record: TaskRecord
    active: bool = True
    metrics: Mapping[str, Any] | None = None


def history(ledger: Ledger) -> list[Kept]:
    """The tasks whose directions are in U, in order."""
    state, entries = ledger.state(), ledger.entries()
    return [Kept(r, r.entry in state.active, entries[r.entry - 1].metrics()) for r in ledger.history()]


def write_portable(ledger: Ledger, target: Path, base_name: str, with_samples: bool = False) -> list[str]:
    """The ledger as it may be published, into the new folder ``target``; returns what was left out.

    Where nothing has to be left out the files are copied as they are, hashes and all; else they are written and sealed
    anew, from the tasks that are in force. Of a task that was taken out, its directions alone go along, and those only
    where later tasks rely on them.
    """
    kept = history(ledger)
    clean, left_out = portable_records([each.record for each in kept], base_name, with_samples)
    base = {**ledger.head["base"], "name": base_name}
    whole = len(kept) == len(ledger.folders()) and all(each.active for each in kept)
    if not left_out and base == ledger.head["base"] and whole:
        _copy(ledger, target)
        return []
    head = ledger.head
    told = {"learner": head["learner"]} if "learner" in head else {}
    new: Any = Ledger.create(
        target, base=base, targets=head["targets"], config=head["config"], bases=ledger.bases(),
        versions=head["versions"], **told,
    )  # fmt: skip
    out = []
    for i, (record, each) in enumerate(zip(clean, kept, strict=True), 1):
        new.append(record, **({} if each.active else {"purged": True}))
        if each.metrics is not None:
            new.write_metrics(i, each.metrics)
        if not each.active:
            out.append(i)
    for i in out:
        new.remove(i)
        new.purge(i)
    return left_out


def _copy(ledger: Ledger, target: Path) -> None:
    """The ledger's own files, and nothing else that lies beside them."""
    with atomic_dir(target) as part:
        for folder in (ledger.path, *ledger.folders()):
            for file in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
                copy = part / file.relative_to(ledger.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def check_clean(folder: Path, machine: Iterable[str | os.PathLike[str]], secrets: Iterable[str] = ()) -> None:
    """The last look before anything leaves: no text file names a path of this machine or holds a token.

    Raises:
        HubError: the file, and what it holds.
    """
    told = [str(path) for path in machine]
    hidden = [secret for secret in secrets if secret]
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in TEXT):
        text = file.read_text(encoding="utf-8", errors="replace")
        where = file.relative_to(folder).as_posix()
        for path in told:
            if len(path) > 1 and re.search(rf"(?<![\w/]){re.escape(path.rstrip('/'))}(?![\w.-])", text):
                raise HubError(f"{where} would tell a path of this machine ({path}): nothing was published")
        if _SECRET.search(text) or any(secret in text for secret in hidden):
            raise HubError(f"{where} would tell what looks like a token or key: nothing was published")
