"""Validated configuration → runner → run directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keeplora.experiment.config import ExperimentConfig, load_config
    from keeplora.experiment.entry import Experiment
    from keeplora.experiment.serving import TrainedModel

__all__ = ["Experiment", "ExperimentConfig", "TrainedModel", "load_config"]


def __getattr__(name: str) -> Any:  # torch and transformers load when they are needed, not for `keeplora --help`
    import importlib

    homes = {
        "Experiment": "entry", "ExperimentConfig": "config", "load_config": "config", "TrainedModel": "serving",
    }  # fmt: skip
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
