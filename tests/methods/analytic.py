"""A tiny encoder, tasks of noisy pictures for it, and the loop of the methods that train nothing by gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.methods import get_method
from keeplora.methods.rail import Rail

D, N = 6, 20  # feature dimension, pictures per task
CLASSES = {"one": ["cat", "dog", "owl"], "two": ["car", "bus"], "again": ["owl", "tram"]}
ROOT = {"r": 1, "target_modules": ["linear"]}


class Encoder(nn.Module):
    """Pictures [N, 8] -> unit features [N, D]; dropout shows whether the pass is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, D), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.dropout(self.linear(x)), dim=-1)


class Pictures:
    """A task of noise around one picture per class: batches, and the `Objective` of its classes."""

    def __init__(self, model: nn.Module, name: str, seed: int = 0) -> None:
        self.model = model
        self.classes: Sequence[str] = CLASSES[name]
        self.templates: Sequence[str] = ["{}"]
        self.text_batch: Mapping[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        labels = torch.arange(N) % len(self.classes)
        x = torch.randn(len(self.classes), 8, generator=generator)[labels] + 0.3 * torch.randn(
            N, 8, generator=generator
        )
        self.x, self.labels = x, labels
        self.batches = [{"pixel_values": x[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, N, 8)]

    def image_features(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        return (model or self.model)(batch["pixel_values"])

    def text_features(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        raise AssertionError("the regression needs no text")

    def logits_of(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        raise AssertionError("the regression needs no text")

    def logits(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        raise AssertionError("the regression needs no text")


def make_model(seed: int = 0) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder()


def make(name: str, model: nn.Module | None = None, seed: int = 0, **options: Any) -> Rail:
    if name == "rail-primal":
        options = {"hidden": 32, **options}
    method = get_method(name)
    learner = method.learner(model or make_model(), method.make_config({**ROOT, "seed": seed, "options": options}))
    assert isinstance(learner, Rail)
    return learner


def never(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("nothing is trained by gradient")


def learn(learner: Rail, name: str, seed: int = 0, **kwargs: Any) -> Pictures:
    task = Pictures(learner.model, name, seed)
    with learner.task(name, task.batches, never, objective=task, **kwargs):
        pass
    return task


@torch.no_grad()
def features(learner: Rail, task: Pictures) -> Tensor:
    learner.model.eval()
    found = task.image_features({"pixel_values": task.x})
    learner.model.train()
    return found
