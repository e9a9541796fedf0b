"""A base that DeepSpeed ZeRO-3 divides for good, as FSDP2's ``fully_shard`` does: frozen weights, put together layer by layer.

DeepSpeed's own engine is made for a model that trains, and for as long as it does. What is used of it here is the part that
holds weights (`DeepSpeedZeRoOffload`, which its engine uses by itself where there is no optimiser): hooks on every module fetch
its parameters before its forward and backward pass and release them after.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_RELEASE = "keeplora_release_zero3"


def divisible(module: nn.Module, whole: set[nn.Parameter]) -> Iterator[nn.Module]:
    """The largest modules within ``module`` that hold none of the parameters ``whole``.

    Attention of `torch.nn.MultiheadAttention` is left out: it reads its output projection's weight without calling it, so that
    nothing would fetch it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> [type(m).__name__ for m in divisible(net, {net[0].weight})]
    ['Sequential']
    """
    if isinstance(module, nn.MultiheadAttention):
        return
    if not any(p in whole for p in module.parameters()) and not any(
        isinstance(m, nn.MultiheadAttention) for m in module.modules()
    ):
        if any(True for _ in module.parameters()):
            yield module
        return
    for child in module.children():
        yield from divisible(child, whole)


def divide(pieces: Iterable[nn.Module], config: dict[str, Any]) -> None:
    """Leave every process one part in n of each parameter of ``pieces``; their forward and backward passes see the whole.

    All processes call it at once, with the same values in the parameters. No parameter is fetched before its module is called,
    and none is kept after.

    Args:
        pieces: modules none of which lies in another; they must be called as modules, not by reading their weights.
        config: DeepSpeed's, for stage 3.
    """
    pieces = list(pieces)
    if not pieces:
        return
    hooks: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    timer: Any = importlib.import_module("deepspeed.utils.timer")
    # A list is never called, so DeepSpeed never records in which order modules follow on each other: it would fetch ahead by
    # that order, and here prompts, pictures and answers go through parts of a model in turn.
    offload = hooks.DeepSpeedZeRoOffload(
        nn.ModuleList(pieces), timer.NoopTimer(), config, overlap_comm=False, prefetch_bucket_size=0,
        param_persistence_threshold=0,
    )  # fmt: skip

    def forget(*_: Any) -> None:
        # A module whose input needs no gradient is fetched in a backward pass and not released: its own hook does not fire.
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass that computes a checkpointed block again
            offload.release_backward_leftovers()

    for piece in pieces:
        piece.register_forward_pre_hook(forget, prepend=True)
        setattr(piece, _RELEASE, forget)


def is_divided(model: nn.Module) -> bool:
    """Whether `divide` has been here.

    >>> is_divided(nn.Linear(2, 2))
    False
    """
    return any(_RELEASE in vars(m) for m in model.modules())


def release(model: nn.Module) -> None:
    """Give back what is still whole, also after a pass that failed; without any message."""
    for module in model.modules():
        if (forget := vars(module).get(_RELEASE)) is not None:
            forget()
            for p in module.parameters():
                _let_go(p)


def _let_go(p: Tensor) -> None:
    if getattr(getattr(p, "ds_status", None), "name", "") == "AVAILABLE":
        p.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        p.partition()  # type: ignore[attr-defined]
