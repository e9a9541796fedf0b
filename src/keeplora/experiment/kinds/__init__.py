"""What differs between runs that name pictures and runs that answer questions.

A `Kind` brings the data of a task to the model, trains on it and scores it; the runner, the methods, the ledger and the
report are the same for all. A new kind is one file here and one line in `KINDS`.
"""

from __future__ import annotations

import importlib
from typing import Any

from keeplora.experiment.kinds.base import Kind, Sets, TrainingObjective

#: `family.kind` -> module and class
KINDS: dict[str, tuple[str, str]] = {
    "classification": ("keeplora.experiment.kinds.classification", "Classification"),
    "generation": ("keeplora.experiment.kinds.generation", "Generation"),
}


def make_kind(name: str, *args: Any) -> Kind:
    """The kind of that name; see `Kind` for the arguments."""
    module, kind = KINDS[name]
    return getattr(importlib.import_module(module), kind)(*args)


__all__ = ["KINDS", "Kind", "Sets", "TrainingObjective", "make_kind"]
