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


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def train_by_deepspeed(model: nn.Module, data: Samples, stage: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(ranks.rank()), "RANK": str(ranks.rank())}
    os.environ |= {"WORLD_SIZE": str(ranks.size()), "LOCAL_SIZE": str(ranks.size())}
    import deepspeed

    model.eval()
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
    for x, labels, weight in epochs(data):
        engine.backward(per_sample(engine, (x, labels)).sum() * weight)
        engine.step()
    engine.destroy()


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
            if how == "task":
                shard(model, model.base_model.model.encoder.layers)
            train(model, data, sgd(model))
    return told(learner)
