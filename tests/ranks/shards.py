"""Two tasks on models that their processes hold together, in each of the ways that a loop may shard them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
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
    with torch.no_grad():  # a look at how well it does, after which FSDP2 leaves some weights whole
        model(data.x)


def launched() -> None:
    """What a launcher would have said."""
    rank, size = str(ranks.rank()), str(ranks.size())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "DS_ACCELERATOR": "cpu",
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def train_by_deepspeed(model: nn.Module, data: Samples, stage: int) -> None:
    launched()
    import deepspeed

    model.eval()
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
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


def two_tasks(folder: str, how: str, feed: str = "loader", **settings: Any) -> dict[str, Any]:
    """``how``: the base sharded before the learner (by blocks, "base"; in one piece, "root"), or each task's model within it."""
    net = make_net()
    if how in ("base", "root"):
        shard(net, net.encoder.layers if how == "base" else [])
    learner = ContinualLearner(net, config(**settings), ledger=Path(folder, "ledger"))
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
            assert is_sharded(model)  # or the test would be of something else
            train(model, data, sgd(model))
        assert is_sharded(learner.model) == (how in ("base", "root"))
    return told(learner)


def with_free_modules(folder: str, how: str) -> dict[str, Any]:
    return two_tasks(folder, how, free_modules=["head"])


def bits(learner: ContinualLearner) -> dict[str, Tensor]:
    """The running weights of the targets, whole, as they are in the model."""
    return {name: learner.store.running(name).clone() for name in learner.store.names}


def history(folder: str) -> dict[str, Any]:
    """A base that stays sharded while tasks come and go, and what each state of it is."""
    net = make_net()
    shard(net, net.encoder.layers)
    learner, states = ContinualLearner(net, config(), ledger=Path(folder, "ledger")), {}
    states["start"] = bits(learner)
    for task, n in enumerate(SIZES):
        data = Samples(n, seed=task)
        with learner.task(f"task {task}", feeding("loader", data), loss_fn) as model:
            train(model, data, sgd(model))
        states[f"after {task}"] = bits(learner)
    try:
        with learner.task("undone", feeding("loader", Samples(6)), loss_fn) as model:
            train(model, Samples(6), sgd(model))
            raise StopIteration
    except StopIteration:
        states["undone"] = bits(learner)
    data = Samples(5, seed=9)
    model = learner.start_task("thrown away", feeding("loader", data), loss_fn)
    train(model, data, sgd(model))
    learner.finish_task()
    learner.rollback("task 1")
    states["back to 1"] = bits(learner)
    learner.remove("task 0")
    learner.restore("task 0")
    states["removed and restored"] = bits(learner)
    audit = learner.audit("exports")
    learner.rollback("task 0")
    states["back to 0"] = bits(learner)
    learner.save_pretrained(Path(folder, "saved"))
    again = make_net()
    shard(again, again.encoder.layers)
    states["opened sharded"] = bits(ContinualLearner.from_pretrained(Path(folder, "saved"), again))
    states["opened whole"] = bits(ContinualLearner.from_pretrained(Path(folder, "saved"), make_net()))
    held = sum(piece.numel() for piece in learner.store._kept.values())
    leak = (audit.factor_leak_max, max(row.weight_leak or 0.0 for row in audit.rows))
    return {"states": states, "held": held, "leak": leak}


def comes_back(folder: str) -> list[bool]:
    """Whether a model that was sharded within a task that failed is what it was: whole, bit for bit, without a hook."""
    from tests.tuner.blocks import hooks

    net = make_net()
    before, flags = [p.detach().clone() for p in net.parameters()], [p.requires_grad for p in net.parameters()]
    learner, objects, clean = ContinualLearner(net, config()), list(net.parameters()), hooks(net)
    try:
        with learner.task("first", feeding("loader", Samples(8)), loss_fn) as model:
            shard(model, model.base_model.model.encoder.layers)
            train(model, Samples(8), sgd(model))
            raise StopIteration
    except StopIteration:
        pass
    after = list(net.parameters())
    return [
        not is_sharded(net),
        all(a is b for a, b in zip(after, objects, strict=True)),
        all(torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        [p.requires_grad for p in after] == flags,
        hooks(net) == clean,
        all(type(m).__name__.startswith("FSDP") is False for m in net.modules()),
    ]


def refused(what: str) -> str:
    """The sentence for a sharded base that cannot be worked with."""
    from torch.distributed.fsdp import fully_shard

    net = make_net()
    settings: dict[str, Any] = {}
    try:
        if what == "columns":
            fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else Shard(0))
        elif what == "free":
            shard(net, net.encoder.layers)
            settings = {"free_modules": ["head"]}
        if what != "later":
            learner = ContinualLearner(net, config(**settings))
        else:
            learner = ContinualLearner(net, config())
            shard(net, net.encoder.layers)
        with learner.task("first", feeding("loader", Samples(8)), loss_fn):
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing(folder: str) -> str:
    """Rank 1 cannot read a sample in a pass in which the others wait for its part of the weights."""
    net = make_net()
    shard(net, net.encoder.layers)
    learner = ContinualLearner(net, config())

    def loss(model: nn.Module, batch: Any) -> Any:
        if ranks.rank() == 1:
            raise ValueError("this picture cannot be read")
        return loss_fn(model, batch)

    try:
        with learner.task("first", DataLoader(Samples(SIZES[0]), batch_size=BATCH), loss):
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def steps_by_zero(kind: str, resume: str = "", save: str = "") -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three steps of an optimiser that DeepSpeed divides, or, where a process is alone, of itself; from a state and to one."""
    from keeplora.experiment.zero import ZeroOptimizer, join, moments

    def make(parameters: Any) -> torch.optim.Optimizer:
        if kind == "adamw":
            return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    generator = torch.Generator().manual_seed(1 if resume else 0)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (7,), (4, 4))]
    optimizer: Any
    if ranks.active():
        launched()
        join(torch.device("cpu"))
        optimizer = ZeroOptimizer(parameters, make)
    else:
        optimizer = make(parameters)
    if resume:
        values, state = torch.load(resume)
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
        optimizer.load_state_dict(
            {"state": dict(enumerate(state)), "param_groups": optimizer.state_dict()["param_groups"]}
        )
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # as a schedule sets it
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) * 3
        optimizer.step()
    held = moments(optimizer)
    state = [{key: value.detach().clone() for key, value in held[p].items()} for p in parameters]
    if ranks.active():
        assert optimizer._part.numel() < sum(p.numel() for p in parameters) / ranks.size() + 16
        optimizer.close()
    values = [p.detach().clone() for p in parameters]
    if save and ranks.is_first():
        torch.save((values, state), save)
    return values, state


def divided_by_zero3() -> dict[str, Any]:
    """A base that ZeRO-3 divides for good: what it computes, and what of it is whole at which time."""
    launched()
    from keeplora.experiment.zero import config_of, join
    from keeplora.tuner.sharding import settle
    from keeplora.tuner.zero3 import divide

    join(torch.device("cpu"))
    data, net, plain = Samples(4), make_net(), make_net()
    for model in (net, plain):
        model.eval().requires_grad_(False)
    divide(net.encoder.layers, config_of(3))
    parts = list(net.encoder.layers.parameters())

    def whole() -> int:
        return sum(p.ds_status.name == "AVAILABLE" for p in parts)

    def gradient(model: nn.Module) -> Tensor:
        bias = nn.Parameter(torch.zeros(()))
        inner = model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: output + bias)  # type: ignore[union-attr, operator]
        per_sample(model, (data.x, torch.tensor(data.labels))).sum().backward()
        inner.remove()
        assert bias.grad is not None
        return bias.grad

    found = {"gradients": (gradient(net), gradient(plain))}
    settle(net)
    found["after a step"] = whole()
    first = next(m for m in net.encoder.layers.modules() if isinstance(m, nn.Linear))
    with mock.patch.object(first, "forward", side_effect=StopIteration), contextlib.suppress(StopIteration):
        net(data.x)
    found["after a failure"] = whole()
    settle(net)
    found["settled"] = whole()
    found["outputs"] = (net(data.x), plain(data.x))
    found["held"] = sum(p.ds_tensor.numel() for p in parts), sum(p.numel() for p in plain.encoder.layers.parameters())
    return found
