"""What a run's checkpoint belongs to, and what may change between an interruption and a resume."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError
from keeplora.experiment.checkpoint import Identity, digest, ledger_digest
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.run_directory import holds_out

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
_UNSEEN = ("name", "auto", "output", "base_dir", "data_dir", "loggers", "threads", "device", "order_name")
"""Settings that no number depends on."""
_ELSEWHERE = (*_UNSEEN, "tasks", "probes", "reference", "order", "first_tasks")
"""Those, and what the rest of an `Identity` stands for."""
_PACKAGES = ("keeplora", "torch", "transformers", "peft", "numpy")


def identity_of(
    config: ExperimentConfig, ledger: Path, tasks: Sequence[Any], probes: Sequence[Any], index: int, device: str
) -> Identity:
    """Of a checkpoint of task ``index`` (from 1) of ``tasks``, on the ledger as it is now."""
    whole = config.model_dump()
    values = {key: value for key, value in whole.items() if key not in _ELSEWHERE}
    if not holds_out(whole) or config.validation_seed == config.seed:  # as before there was one
        del values["validation_seed"]
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


_SECTIONS = ("model", "tuner", "tuner.parts", "tuner.token_weights", "training", "generation", "video", "judge")
_NO_NUMBER = (
    "training.workers", "training.checkpoint_minutes", "training.checkpoint_steps", "video.cache_mib", "judge.api_key_env",
    "judge.timeout", "judge.retries", "judge.concurrency", "judge.max_wait",
)  # fmt: skip


def changed_settings(was: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """``key old (now new)`` for each setting that numbers depend on and that both have with other values, but for the seed.

    Args:
        was: as a run's config.yaml says it. now: resolved settings. What one of them lacks came later or has gone. within: the
            section that they are of; empty: the whole configuration.

    >>> changed_settings({"seed": 1, "training": {"epochs": 10, "gone": 1}}, {"seed": 0, "training": {"epochs": 3, "new": 2}})
    ['training.epochs 10 (now 3)']
    """
    found: list[str] = []
    for name in sorted(was.keys() & now.keys()):
        key = f"{within}{name}"
        if key in ("seed", *_UNSEEN, *_NO_NUMBER) or was[name] == now[name]:
            continue
        if key in _SECTIONS and isinstance(was[name], Mapping) and isinstance(now[name], Mapping):
            found += changed_settings(was[name], now[name], f"{key}.")
        else:
            found.append(f"{key} {_short(was[name])} (now {_short(now[name])})")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


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
