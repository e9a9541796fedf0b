"""Learners with a few tasks, and the audit's definitions written out on whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from keeplora import ContinualLearner
from keeplora.tuner.leaks.rows import ExportRow
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, train

LAYER = "encoder.layers.1.up"
TASKS = ("a", "b", "c")


def three_tasks(dtype: torch.dtype = torch.float32, **kwargs) -> ContinualLearner:
    learner = ContinualLearner(make_net(dtype=dtype), config(**{"energy_features": 0.9, **kwargs}), base_name="net")
    torch.manual_seed(0)  # the net has dropout
    if dtype == torch.float32:
        for i, name in enumerate(TASKS):
            learn(learner, name, i)
        return learner
    cast = lambda m, b: loss_fn(m, (b[0].to(dtype), b[1]))  # noqa: E731
    for i, name in enumerate(TASKS):
        with learner.task(name, loader(seed=i), cast) as model:
            train(model, loader(seed=i), loss=cast)
    return learner


def ends(learner: ContinualLearner, layer: str) -> list[int]:
    """Columns of U before the first task and after each."""
    out = [learner.start_bases()[layer].shape[1]]
    for record in learner.history:
        out.append(out[-1] + record.basis[layer].shape[1])
    return out


def total(learner: ContinualLearner, layer: str, upto: int) -> Tensor:
    """Σ ΔW of the first tasks, float32, in order."""
    out = torch.zeros_like(learner.store.W0[layer], dtype=torch.float32)
    for record in learner.records[:upto]:
        f = record.factors[layer]
        out = out + f.s * (f.B @ f.A)
    return out


def merged(learner: ContinualLearner, layer: str, upto: int, dtype: torch.dtype) -> Tensor:
    return (learner.store.W0[layer].float() + total(learner, layer, upto)).to(dtype).double()


def row_of(rows, export: str, layer: str, basis: str | None) -> ExportRow:
    (row,) = [r for r in rows if (r.export, r.layer, r.basis) == (export, layer, basis)]
    return row
