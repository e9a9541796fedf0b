"""Tiny models, data and loops for the tuner's tests: residual blocks of linears, most of them not square."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from keeplora import KeepLoraConfig

TARGETS = ["q", "k", "v", "up", "down"]
WIDTH, CLASSES = 12, 3


class Block(nn.Module):
    """q, k and v read one tensor; up and down are wide and tall."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.up, self.down = nn.Linear(width, width + 6), nn.Linear(width + 6, width)
        self.mix = nn.Linear(width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + torch.tanh(q) * self.mix(k * torch.sigmoid(v))
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """(N, T, WIDTH) -> (N, CLASSES); positions whose mask is 0 do not reach the output."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Block(WIDTH) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for layer in self.encoder.layers:
            x = layer(x)
        x = self.dropout(x)
        weight = torch.ones(x.shape[:2], dtype=x.dtype) if mask is None else mask.to(x.dtype)
        return self.head((x * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True))


class TwoTowers(nn.Module):
    """A picture tower of three blocks and a text tower of two over the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model, self.text_model = Net(3), Net(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_model(x) + self.text_model(x)


def make_towers(seed: int = 0) -> TwoTowers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TwoTowers()


def make_net(seed: int = 0, blocks: int = 2, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(blocks)
    return net.to(dtype)


class Samples(Dataset):
    """Items (x, label); ``labels`` is there for the stratified choice."""

    def __init__(self, n: int = 10, seed: int = 0, tokens: int = 4, rank: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Inputs of a low-dimensional subspace of their own, so that a second task has room.
        basis = torch.randn(rank, WIDTH, generator=generator)
        self.x = torch.randn(n, tokens, rank, generator=generator) @ basis / rank**0.5
        self.labels = [i % CLASSES for i in range(n)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], self.labels[i]


def loader(n: int = 10, seed: int = 0, batch_size: int = 4, **kwargs) -> DataLoader:
    return DataLoader(Samples(n, seed), batch_size=batch_size, **kwargs)


def loss_fn(model: nn.Module, batch) -> Tensor:
    x, labels = batch
    return nn.functional.cross_entropy(model(x).float(), labels)


def per_sample(model: nn.Module, batch) -> Tensor:
    x, labels = batch
    return nn.functional.cross_entropy(model(x).float(), labels, reduction="none")


def config(**kwargs) -> KeepLoraConfig:
    return KeepLoraConfig(**{"r": 3, "lora_alpha": 3, "target_modules": TARGETS, "energy_weights": 0.3,
                             "energy_features": 0.8, **kwargs})  # fmt: skip


def train(model: nn.Module, batches, steps: int = 4, lr: float = 0.05, weight_decay: float = 0.0, loss=loss_fn) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def hooks(model: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [f"{name}.{kind}" for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]


def learn(learner, name: str, seed: int, **kwargs):
    batches = loader(seed=seed)
    with learner.task(name, batches, loss_fn, **kwargs) as model:
        train(model, batches)
    return learner
