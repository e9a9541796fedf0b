"""Two tasks on models that their processes hold together, in each of the ways that a loop may shard them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora import ContinualLearner
from keeplora.tuner import ranks
from keeplora.tuner.sharding import is_sharded
from tests.ranks.work import BATCH, SIZES, feeding, told
from tests.tuner.blocks import Samples, config, loss_fn, make_net, per_sample


def shard(model: nn.Module, blocks: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks.size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def epochs(data: Samples, steps: int = 6) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This rank's part of the whole batch, and the factor that makes the mean of the ranks' losses that of the batch."""
    rank, size = ranks.rank(), ranks.size()
    x, labels = data.x[rank::size], torch.tensor(data.labels)[rank::size]
    for _ in range(steps):
        yield x, labels, size / len(data)


def train(model: nn.Module, data: Samples, optimizer: torch.optim.Optimizer) -> None:
    model.eval()
    for x, labels, weight in epochs(data):
        optimizer.zero_grad()
        (per_sample(model, (x, labels)).sum() * weight).backward()
        optimizer.step()


def launched() -> None:
    """What a launcher would have said."""
    rank, size = str(ranks.rank()), str(ranks.size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "DS_ACCELERATOR": "cpu"}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def train_by_deepspeed(model: nn.Module, data: Samples, stage: int) -> None:
    launched()
    import deepspeed

    model.eval()
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
    assert is_sharded(model) == (stage == 3)
    for x, labels, weight in epochs(data):
        engine.backward(per_sample(engine, (x, labels)).sum() * weight)
        engine.step()


def train_by_accelerate(model: nn.Module, data: Samples, how: str) -> None:
    """`accelerator.prepare` within the task: "accelerate", and with "-lean" as it loads large models, through the meta device."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=how.endswith("-lean"), state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    launched()
    accelerator = Accelerator(cpu=True)
    # On processes without a GPU accelerate turns to DDP whatever it is asked for; everything behind this choice is its own.
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    assert is_sharded(prepared), accelerator.distributed_type
    prepared.eval()
    for x, labels, weight in epochs(data):
        optimizer.zero_grad()
        accelerator.backward(per_sample(prepared, (x, labels)).sum() * weight)
        optimizer.step()


def two_tasks(folder: str, how: str, feed: str = "loader") -> dict[str, Any]:
    """``how``: the base sharded before the learner ("base"), or each task's model within it ("task")."""
    net = make_net()
    if how == "base":
        shard(net, net.encoder.layers)
    learner = ContinualLearner(net, config(), ledger=Path(folder, "ledger"))
    for task, n in enumerate(SIZES):
        data = Samples(n, seed=task)
        with learner.task(f"task {task}", feeding(feed, data), per_sample if task else loss_fn) as model:
            if how.startswith("zero"):
                train_by_deepspeed(model, data, stage=int(how[-1]))
                continue
            if how.startswith("accelerate"):
                train_by_accelerate(model, data, how)
                continue
            if how == "task":
                shard(model, model.base_model.model.encoder.layers)
            assert is_sharded(model)
            train(model, data, sgd(model))
        assert is_sharded(learner.model) == (how == "base")
    return told(learner)
