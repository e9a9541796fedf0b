"""Joint training: one LoRA on the data of all tasks at once, the upper bound of learning them one after another."""

from __future__ import annotations

from typing import ClassVar

from keeplora.methods.lora import SequentialLora
from keeplora.methods.registry import ONE_SCALE, Method, register


class Joint(SequentialLora):
    """Sequential LoRA's adapter (Hu et al., 2106.09685), trained once on all tasks, when the last one has come.

    The tasks before the last are records without an update. It is no continual learner: it shows what the adapter could
    hold if nothing were taken away. Each batch is of one task, against that task's class prompts; the mixture visits
    every picture as often as sequential training does.
    """

    schedule: ClassVar[str] = "joint"
    irremovable: ClassVar[str] = "trains once on the data of all tasks, so that no part of it belongs to one task"


register(
    Method("joint", "Joint training", Joint, "upper bound: one LoRA on the data of all tasks at once", config=ONE_SCALE,
           state="the data of every task", extra_data="all tasks at once", paper="Hu et al., arXiv 2106.09685")
)  # fmt: skip
