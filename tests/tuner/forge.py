"""Changing a ledger's files the way damage does, and the way a forger does who hashes everything anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from keeplora.files import sha256_file
from keeplora.tuner.ledger_files import seal


def entry(ledger: Path, index: int) -> Path:
    (found,) = ledger.glob(f"{index:04d}-*")
    return found


def write(file: Path, value: dict[str, Any], *, sealed: bool = True) -> None:
    if sealed:
        value = {**value, "seal": seal(value)}
    file.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def edit(file: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    """A JSON file, with its own seal made anew."""
    value = json.loads(file.read_text())
    change(value)
    write(file, value, sealed=sealed)


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)


def hash_anew(ledger: Path) -> None:
    """Every hash, seal and parent, and the end: what only the contents can tell against."""
    head = ledger / "ledger.json"
    edit(head, lambda v: v.update(tensors_sha256=sha256_file(ledger / "base.safetensors")))
    parent = sha256_file(head)
    folders = sorted(p for p in ledger.iterdir() if p.name[:4].isdigit())
    for folder in folders:
        file, tensors = folder / "record.json", folder / "tensors.safetensors"
        value = json.loads(file.read_text())
        value["parent"] = parent
        if tensors.is_file() and value.get("tensors_sha256") is not None:
            value["tensors_sha256"] = sha256_file(tensors)
        write(file, value)
        parent = sha256_file(file)
        if (metrics := folder / "metrics.json").is_file():
            edit(metrics, lambda v, parent=parent: v.update(record=parent))
    if (end := ledger / "HEAD.json").is_file():
        edit(end, lambda v: v.update(entries=len(folders), last=parent))
