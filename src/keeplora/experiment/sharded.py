"""A run whose base the processes hold together: ``accelerate launch --use_fsdp --fsdp_version 2``, or with DeepSpeed ZeRO-3.

What is sharded, and stays so for the whole run, are the encoder blocks that hold targets: nearly all of a large model. What lies
outside of them (embeddings, projections, towers without a target), free modules, heads and the task's own factors are whole
in every process: they are small, and what trains is added up as it is without sharding. So checkpoints, the ledger and results
are those of any other run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from keeplora.errors import ConfigError
from keeplora.experiment import zero
from keeplora.experiment.zero import said
from keeplora.tuner import KeepLoraConfig, ranks, zero3
from keeplora.tuner.free import FreeModules
from keeplora.tuner.targets import Target, resolve_targets

_ASKED = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params: weights stay on the devices that compute",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing: set training.gradient_checkpointing",
}


def asked_for() -> bool:
    """Whether the launcher asks for a sharded base, of several processes."""
    return (said(_ASKED) and ranks.active()) or zero.stage() == 3


def check_launcher() -> None:
    """Refuse what the launcher asks for and a run does not do; called before the processes are joined.

    Raises:
        ConfigError: FSDP1, or a setting of FSDP2 or DeepSpeed that is not followed.
    """
    zero.check_launcher()
    if not said(_ASKED):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(
            f"the launcher asks for FSDP {version}, which flattens weights so that no layer is left: add --fsdp_version 2"
        )
    for key, told in _REFUSED.items():
        if said(key):
            raise ConfigError(f"`keeplora run` does not follow {told}; leave it out")
    # transformers would read the checkpoint on rank 0 alone, and count on `accelerator.prepare` to send it on.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard_base(family: Any, config: KeepLoraConfig, device: torch.device) -> None:
    """Shard the blocks that hold targets, and put everything on ``device``. The model may come on the CPU."""
    model: nn.Module = family.model
    targets = resolve_targets(model, config)
    free = {model.get_parameter(name) for name in FreeModules(model, config, targets).parameters}
    # Each block for itself, and not the model: features are taken of parts of the model, beside its own forward.
    blocks = list(_blocks(model, targets, family.kind == "generation"))
    if zero.stage() == 3:
        zero3.divide((piece for block in blocks for piece in zero3.divisible(block, free)), zero.config_of(3))
    else:
        _fully_shard(blocks, device, free)
    family.to(device)
    family.in_step = True


def _fully_shard(blocks: Sequence[nn.Module], device: torch.device, free: set[nn.Parameter]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size(),))
    key = "FSDP_RESHARD_AFTER_FORWARD"
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=key not in os.environ or said(key), ignored_params=free)


def _blocks(model: nn.Module, targets: Sequence[Target], generation: bool) -> Iterator[nn.Module]:
    """The blocks of every tower that holds a target. A language model's pictures are not in every batch, and so not in every
    process's part of it: its vision tower is left whole."""
    seen: set[str] = set()
    for t in targets:
        if t.depth is None or (generation and "vis" in t.tower):
            continue
        above = _list_above(model, t)
        if above not in seen:
            seen.add(above)
            yield from model.get_submodule(above).children()


def _list_above(model: nn.Module, target: Target) -> str:
    parts, module = target.name.split("."), model
    for i, part in enumerate(parts):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and i > 0:
            return ".".join(parts[:i])
        module = module.get_submodule(part)
    raise AssertionError(f"{target.name} has a depth and no list of blocks above it")
