"""KeepLoRA (arXiv 2601.19659: every layer at one scale) and KeepLoRA++ (arXiv 2606.16256: shallow layers move less)."""

from __future__ import annotations

from typing import Any

from keeplora.methods.registry import CLASSIFICATION, LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.tuner import ContinualLearner

ONE: dict[str, Any] = {
    "learner": ContinualLearner, "config": ONE_SCALE, "trained": "B of every target", "state": "basis U per target",
    "paper": "KeepLoRA, arXiv 2601.19659",
}  # fmt: skip
SCALED: dict[str, Any] = {
    "learner": ContinualLearner, "trained": "B of every target", "state": "basis U per target",
    "paper": "KeepLoRA++, arXiv 2606.16256", "search": {**LEARNING_RATE, "tuner.gamma": ("choice", [0.2, 0.5])},
}  # fmt: skip
HEAD: dict[str, Any] = {
    "classifier": True, "task_identity": True, "kinds": CLASSIFICATION, "trained": "B of every target, one weight per class",
    "state": "basis U per target, a head per task", "inference": "one product per picture with the task's head",
}  # fmt: skip

register(Method("keeplora", "KeepLoRA (γ = 1)", summary="residual-gradient LoRA, one scale for all layers", **ONE))
register(Method("keeplora++", "KeepLoRA++", summary="residual-gradient LoRA, layer scales from γ up to 1", **SCALED))
register(
    Method("keeplora-cls", "KeepLoRA (γ = 1), cls", summary="KeepLoRA with a trained class-weight head per task",
           **{**ONE, **HEAD})
)  # fmt: skip
register(
    Method("keeplora++-cls", "KeepLoRA++, cls", summary="KeepLoRA++ with a trained class-weight head per task",
           **{**SCALED, **HEAD})
)  # fmt: skip
