"""KeepLoRA (arXiv 2601.19659: every layer at one scale) and KeepLoRA++ (arXiv 2606.16256: shallow layers move less)."""

from __future__ import annotations

from keeplora.methods.registry import ONE_SCALE, Method, register
from keeplora.tuner import ContinualLearner

register(
    Method("keeplora", "KeepLoRA (γ = 1)", ContinualLearner, "residual-gradient LoRA, one scale for all layers",
           config=ONE_SCALE)
)  # fmt: skip
register(Method("keeplora++", "KeepLoRA++", ContinualLearner, "residual-gradient LoRA, layer scales from γ up to 1"))
register(
    Method("keeplora-cls", "KeepLoRA (γ = 1), cls", ContinualLearner, "KeepLoRA with a trained class-weight head per task",
           config=ONE_SCALE, classifier=True)
)  # fmt: skip
register(
    Method("keeplora++-cls", "KeepLoRA++, cls", ContinualLearner, "KeepLoRA++ with a trained class-weight head per task",
           classifier=True)
)  # fmt: skip
