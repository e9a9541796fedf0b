"""A stream of little classification tasks that fill a net's layers bit by bit, so that a test can go on until all are full."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from keeplora import ContinualLearner, KeepLoraConfig
from tests.tuner.blocks import train

WIDE, SAMPLES, LABELS = 32, 10, 3


class Wide(nn.Module):
    """(N, WIDE) -> (N, LABELS); two blocks, one of them into a wider layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(WIDE, WIDE + 8), "down": nn.Linear(WIDE + 8, WIDE)})
                                     for _ in range(2)])  # fmt: skip
        self.head = nn.Linear(WIDE, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def make_wide() -> Wide:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide()


def batch(task: int) -> tuple[Tensor, Tensor]:
    """The pictures of one task: few enough that their inputs span few dimensions."""
    generator = torch.Generator().manual_seed(100 + task)
    return torch.randn(SAMPLES, WIDE, generator=generator), torch.randint(LABELS, (SAMPLES,), generator=generator)


def loss_fn(model: nn.Module, item) -> Tensor:
    return nn.functional.cross_entropy(model(item[0]), item[1])


def settings(**more) -> KeepLoraConfig:
    return KeepLoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["up", "down"], "energy_weights": 0.1,
                             "energy_features": 1.0, "gamma": 1.0, **more})  # fmt: skip


def learn(learner: ContinualLearner, task: int, steps: int = 25) -> list[str]:
    """Learn one task; the warnings it gave."""
    item = batch(task)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with learner.task(f"task {task}", [item], loss_fn) as model:
            train(model, [item], steps=steps, lr=0.02, loss=loss_fn)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@torch.no_grad()
def logits(learner: ContinualLearner, task: int) -> Tensor:
    return learner.model(batch(task)[0])


def accuracy(learner: ContinualLearner, task: int) -> float:
    return float((logits(learner, task).argmax(1) == batch(task)[1]).float().mean())
