"""What a run's checkpoint belongs to, and what may change between an interruption and a resume."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError
from keeplora.experiment.checkpoint import Identity, digest, ledger_digest
from keeplora.experiment.config import ExperimentConfig

CHANGEABLE = frozenset(
    {
        "training.learning_rate",
        "training.grad_clip",
        "training.checkpoint_minutes",
        "training.checkpoint_steps",
        "training.workers",
    }
)
"""Settings that a resume may change; a checkpoint is used whatever they are."""
_ELSEWHERE = (
    "name",
    "auto",
    "output",
    "base_dir",
    "data_dir",
    "loggers",
    "threads",
    "device",
    "tasks",
    "probes",
    "reference",
    "order",
    "order_name",
    "first_tasks",
)
"""Settings that no number depends on, or that the rest of an `Identity` stands for."""
_PACKAGES = ("keeplora", "torch", "transformers", "peft", "numpy")


def identity_of(
    config: ExperimentConfig, ledger: Path, tasks: Sequence[Any], probes: Sequence[Any], index: int, device: str
) -> Identity:
    """Of a checkpoint of task ``index`` (from 1) of ``tasks``, on the ledger as it is now."""
    values = {key: value for key, value in config.model_dump().items() if key not in _ELSEWHERE}
    values["training"] = {k: v for k, v in values["training"].items() if f"training.{k}" not in CHANGEABLE}
    data = [[t.name, t.fingerprint] for t in [*tasks, *probes]]
    return Identity(
        tasks[index - 1].name, index, digest(values), ledger_digest(ledger), digest(data),
        {name: importlib.metadata.version(name) if _installed(name) else "" for name in _PACKAGES}, device,
    )  # fmt: skip


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return False
    return True


def is_changeable(key: str) -> bool:
    """Whether a resume may set a dotted key."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)


def check_changes(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that would make the run's tasks incomparable.

    >>> check_changes({"training.learning_rate": 1e-4})
    >>> check_changes({"tuner.r": 8})
    Traceback (most recent call last):
    ...
    keeplora.errors.ConfigError: -o tuner.r: a resume may change training.checkpoint_minutes, ...
    """
    for key in overrides:
        if not is_changeable(key):
            raise ConfigError(
                f"-o {key}: a resume may change {', '.join(sorted(CHANGEABLE))} and nothing else; start a new run for more"
            )
