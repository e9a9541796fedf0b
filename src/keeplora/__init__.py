"""keeplora teaches a pretrained vision-language model one task after another without forgetting, and can prove it.

>>> from keeplora import ContinualLearner, KeepLoraConfig
>>> KeepLoraConfig(r=16, target_modules=["q_proj", "v_proj"]).gamma
0.2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keeplora.errors import KeepLoraError
    from keeplora.experiment import Experiment, TrainedModel
    from keeplora.experiment.publish import publish
    from keeplora.tuner import ContinualLearner, KeepLoraConfig

__version__ = "0.1.0"
__all__ = [
    "ContinualLearner", "Experiment", "KeepLoraConfig", "KeepLoraError", "TrainedModel", "__version__", "publish",
]  # fmt: skip

_HOMES = {
    "ContinualLearner": "keeplora.tuner", "KeepLoraConfig": "keeplora.tuner", "KeepLoraError": "keeplora.errors",
    "Experiment": "keeplora.experiment", "TrainedModel": "keeplora.experiment",
    "publish": "keeplora.experiment.publish",
}  # fmt: skip


def __getattr__(name: str) -> Any:  # so that `import keeplora` is quick
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
