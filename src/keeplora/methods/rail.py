"""RAIL (Xu et al., NeurIPS 2024, 2406.18868): the model stays untouched, a ridge regression on its image features learns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.methods.registry import CLASSIFICATION, Method, register
from keeplora.methods.zero_shot import ZeroShot
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.observers import quiet_model
from keeplora.tuner.options import option
from keeplora.tuner.sampling import statistics_batches, to_device

ROWS = 1024
"""Pictures whose random features are held at a time."""
SMALLEST = torch.finfo(torch.float32).tiny
Learned = list[tuple[list[str], dict[str, Tensor]]]
"""Per task: its class names, and what its record keeps."""


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"tuner.options.{name} must be a finite number above 0, got {value!r}")


def ridge(G: Tensor, C: Tensor, lam: float) -> Tensor:
    """(G + λI)⁻¹ C: [n, n] symmetric float64, [n, k] -> [n, k]. λ is added in place: G may be most of the memory.

    >>> ridge(torch.eye(2, dtype=torch.float64), torch.ones(2, 1), 3.0).flatten().tolist()
    [0.25, 0.25]
    """
    G.diagonal().add_(lam)
    return torch.cholesky_solve(C.to(G.dtype), torch.linalg.cholesky(G))


def rbf(X: Tensor, Z: Tensor, gamma: float) -> Tensor:
    """exp(−γ ‖x − z‖²): [n, d], [m, d] -> [n, m], float64.

    >>> rbf(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), 0.5).log().tolist()
    [[-2.0]]
    """
    X, Z = X.double(), Z.double()
    squared = (X @ Z.T).mul_(-2.0).add_(X.square().sum(1, keepdim=True)).add_(Z.square().sum(1))
    return squared.clamp_(min=0.0).mul_(-gamma).exp_()


@dataclass(frozen=True)
class RailOptions:
    """Settings of both forms."""

    lam: float = option(0.1, "λ of the ridge regression")
    beta: float = option(0.8, "share of the regression in the fused scores, 0 to 1; the rest is zero-shot's")

    def __post_init__(self) -> None:
        _positive("lam", self.lam)
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"tuner.options.beta must lie between 0 and 1, got {self.beta!r}")


@dataclass(frozen=True)
class _Fit:
    """The regression over all learned tasks: the column of each class, scores of image features, and what it is made of."""

    columns: dict[str, int]
    scores: Callable[[Tensor], Tensor]
    source: list[Tensor]
    device: torch.device

    def holds(self, source: list[Tensor], device: torch.device) -> bool:
        """Whether it was made from just these tensors (records never write into them), for this device."""
        same = len(source) == len(self.source) and all(a is b for a, b in zip(source, self.source, strict=True))
        return same and device == self.device


class Rail(ZeroShot):
    """What both forms share: one pass over a task's features when it ends, and the fusion with zero-shot at inference.

    A picture whose zero-shot class is a learned one gets (1 − β) · softmax(zero-shot) + β · regression, any other picture
    its zero-shot logits. Classes are columns by name: a class that two tasks share is one column, fed by both.

    As in the authors' code the regression's outputs enter the sum as they are: they are fitted to one-hot labels, so
    they are scores already, and a softmax over many numbers between 0 and 1 would flatten them to nothing. Where ours
    differs: zero-shot's softmax and arg-max run over the candidates of the evaluation, not always over the classes of
    every domain; everything is solved in float64; and fused scores below 0, which the regression can give, count as 0, so
    that the result is a distribution (a picture without any above 0 keeps its zero-shot logits).
    """

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    Options: ClassVar[type[Any]] = RailOptions
    unmergeable: ClassVar[str] = "answers through a regression beside the model, which no adapter or checkpoint holds"
    _fitted: _Fit | None = None

    def _attach(self, task: OpenTask) -> nn.Module:
        if task.objective is None:
            raise KeepLoraError(
                f"task {task.name!r}: this method regresses on image features, so start_task() needs `objective=` beside "
                "the loss (an Experiment gives it by itself)"
            )
        return super()._attach(task)

    def _detach(self, task: OpenTask) -> TaskRecord:
        # Here and not in _remember, so that what `accept` measures knows the task already.
        assert task.objective is not None
        started = time.perf_counter()
        classes = list(task.objective.classes)
        features, labels = self._features(task, len(classes))
        if not torch.isfinite(features).all():
            raise FloatingPointError(f"task {task.name!r}: the image features hold NaN or infinity; nothing is kept")
        statistics = self._statistics(task, features, labels, len(classes))
        task.info["rail_classes"] = classes
        task.tensors |= {key: value.cpu() for key, value in statistics.items()}
        task.statistics_seconds += time.perf_counter() - started
        return super()._detach(task)

    @torch.no_grad()
    def _features(self, task: OpenTask, classes: int) -> tuple[Tensor, Tensor]:
        """[N, D] float32 and [N] of the task's pictures, each once, in the order of the data."""
        assert task.objective is not None
        device = next(self.model.parameters()).device
        batches = statistics_batches(task.batches, self._cap(classes), self.config.seed, task.labels)
        features, labels = [], []
        with quiet_model(self.model):
            for batch in batches:
                batch = to_device(batch, device)
                features.append(task.objective.image_features(batch).float())
                labels.append(batch["labels"])
        if not features:
            raise KeepLoraError(f"task {task.name!r} has no training picture to regress on")
        return torch.cat(features), torch.cat(labels).long()

    def _cap(self, classes: int) -> int | None:
        """Most pictures of a task to read; None: all."""
        return None

    def _statistics(self, task: OpenTask, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _solve(self, learned: Learned, columns: dict[str, int], device: torch.device) -> Callable[[Tensor], Tensor]:
        """From the learned tasks to a function: features [N, D] -> scores [N, columns], float64."""
        raise NotImplementedError

    def _learned(self) -> Learned:
        # The open task counts from `_detach` on, and is forgotten with it when it is undone.
        held = [(record.info, record.tensors) for record in self.records]
        if self._open is not None:
            held.append((self._open.info, self._open.tensors))
        found = [(info, {k: v for k, v in tensors.items() if k.startswith("rail/")}) for info, tensors in held]
        return [(info["rail_classes"], tensors) for info, tensors in found if tensors]

    def _fit(self, device: torch.device) -> _Fit | None:
        """The regression on what is learned now; solved anew when that has changed."""
        learned = self._learned()
        if not learned:
            return None
        source = [tensor for _, tensors in learned for tensor in tensors.values()]
        if self._fitted is None or not self._fitted.holds(source, device):
            columns: dict[str, int] = {}
            for classes, _ in learned:
                for name in classes:
                    columns.setdefault(name, len(columns))
            self._fitted = _Fit(columns, self._solve(learned, columns, device), source, device)
        return self._fitted

    @torch.no_grad()
    def scores(self, image_features: Tensor) -> tuple[list[str], Tensor]:
        """Names of the learned classes, K of them, and the regression's outputs: [N, D] -> [N, K] float64."""
        fit = self._fit(image_features.device)
        if fit is None:
            return [], image_features.new_zeros(len(image_features), 0, dtype=torch.float64)
        return list(fit.columns), fit.scores(image_features)  # in float64, which autocast leaves alone

    @torch.no_grad()
    def readout(self, image_features: Tensor, logits: Tensor, classes: Sequence[str]) -> Tensor:
        """Fused scores as logarithms, so that arg-max and softmax serve them like logits; else ``logits``, unchanged."""
        known, scores = self.scores(image_features)
        columns = {name: i for i, name in enumerate(known)}
        learned = torch.tensor([name in columns for name in classes], device=logits.device)
        if not learned.any():
            return logits
        zero_shot = logits.double().softmax(dim=1)
        fused = (1.0 - self.options.beta) * zero_shot
        fused[:, learned] += self.options.beta * scores[:, [columns[name] for name in classes if name in columns]]
        use = learned[zero_shot.argmax(dim=1)] & (fused.amax(dim=1) > 0)
        return torch.where(use.unsqueeze(1), fused.clamp(min=SMALLEST).log().to(logits.dtype), logits)


@dataclass(frozen=True)
class PrimalOptions(RailOptions):
    """Settings of ``rail-primal``."""

    hidden: int = option(2048, "h, the number of random ReLU features; 15000 in the authors' code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise ConfigError(f"tuner.options.hidden must be at least 1, got {self.hidden!r}")


class RailPrimal(Rail):
    """Ridge regression on random ReLU features φ = max(0, Px): W = (Σ_t Φ_tᵀΦ_t + λI)⁻¹ Σ_t Φ_tᵀY_t.

    A record keeps its own ΦᵀΦ [h, h] and ΦᵀY [h, C] in float64, and W is solved from their sums. The paper instead updates
    (… + λI)⁻¹ and W with every batch by the Woodbury identity, which is the same W without keeping the terms apart; the
    sums lose no digits over many tasks, and a task can be taken out. P is drawn as `nn.Linear` starts, from the seed.
    h is 2048 by default and 15000 in the authors' code, where a record takes 1.8 GB.
    """

    Options = PrimalOptions
    _P: Tensor | None = None

    def projection(self, dimension: int) -> Tensor:
        """P: [D, h] float64, uniform within ±1/√D, fixed by the config's seed."""
        if self._P is None or len(self._P) != dimension:
            bound = 1 / math.sqrt(dimension)
            generator = torch.Generator().manual_seed(self.config.seed)
            P = torch.empty(dimension, self.options.hidden).uniform_(-bound, bound, generator=generator)
            self._P = P.double()
        return self._P

    def _statistics(self, task: OpenTask, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        P = self.projection(features.shape[1]).to(features.device)
        G = torch.zeros(P.shape[1], P.shape[1], dtype=torch.float64, device=P.device)
        C = torch.zeros(P.shape[1], classes, dtype=torch.float64, device=P.device)
        for x, y in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            phi = (x.double() @ P).relu_()
            G += phi.T @ phi
            C += phi.T @ nn.functional.one_hot(y, classes).to(phi.dtype)
        return {"rail/G": G, "rail/C": C}

    def weights(self, learned: Learned, columns: dict[str, int], device: torch.device) -> Tensor:
        """W over the learned tasks: [h, K] float64."""
        h = len(learned[0][1]["rail/G"])
        G = torch.zeros(h, h, dtype=torch.float64, device=device)
        C = torch.zeros(h, len(columns), dtype=torch.float64, device=device)
        for classes, tensors in learned:
            G += tensors["rail/G"].to(device)
            C.index_add_(1, torch.tensor([columns[n] for n in classes], device=device), tensors["rail/C"].to(device))
        return ridge(G, C, self.options.lam)

    def _solve(self, learned: Learned, columns: dict[str, int], device: torch.device) -> Callable[[Tensor], Tensor]:
        W = self.weights(learned, columns, device)
        return lambda x: (x.double() @ self.projection(x.shape[1]).to(device)).relu_() @ W

    def state_bytes(self) -> int:
        """One ΦᵀΦ, which is all that goes on to the next task, and the ΦᵀY of every class."""
        tensors = [tensors for _, tensors in self._learned()]
        sizes = [{key: t.numel() * t.element_size() for key, t in each.items()} for each in tensors]
        return max((s["rail/G"] for s in sizes), default=0) + sum(s["rail/C"] for s in sizes)


@dataclass(frozen=True)
class DualOptions(RailOptions):
    """Settings of ``rail-dual``."""

    lam: float = option(1e-3, "λ of the ridge regression")
    gamma: float = option(0.1, "γ of the kernel exp(−γ ‖x − x'‖²)")
    samples_per_class: int = option(0, "pictures kept per class, on average over a task's classes; 0: all")
    max_samples: int = option(
        30_000, "refuse to fit more pictures than this: solving takes 16 bytes times their square"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("gamma", self.gamma)
        if self.samples_per_class < 0:
            raise ConfigError(
                f"tuner.options.samples_per_class must be at least 1, or 0 for all, got {self.samples_per_class!r}"
            )
        if self.max_samples < 1:
            raise ConfigError(f"tuner.options.max_samples must be at least 1, got {self.max_samples!r}")


class RailDual(Rail):
    """Kernel ridge regression over every picture seen so far: α = (K + λI)⁻¹ Y, scores K(x, X) α, K = exp(−γ ‖x − x'‖²).

    A record keeps the features of the task's pictures (float32) and their labels: the method does not forget because it
    forgets nothing. The paper grows K task by task; like the authors' code we solve the whole system anew.
    """

    Options = DualOptions

    def _cap(self, classes: int) -> int | None:
        return self.options.samples_per_class * classes or None

    def _statistics(self, task: OpenTask, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        n = len(features) + sum(len(tensors["rail/labels"]) for _, tensors in self._learned())
        if n > self.options.max_samples:
            raise KeepLoraError(
                f"task {task.name!r}: the kernel regression would be over {n} pictures, more than tuner.options.max_samples "
                f"({self.options.max_samples}), and would need {16 * n * n / 2**30:.0f} GiB; keep fewer with "
                "tuner.options.samples_per_class, raise the limit, or use rail-primal"
            )
        return {"rail/features": features, "rail/labels": labels.to(torch.int32)}

    def _solve(self, learned: Learned, columns: dict[str, int], device: torch.device) -> Callable[[Tensor], Tensor]:
        X = torch.cat([tensors["rail/features"] for _, tensors in learned]).to(device)
        place = [
            torch.tensor([columns[n] for n in classes])[tensors["rail/labels"].long()] for classes, tensors in learned
        ]
        Y = nn.functional.one_hot(torch.cat(place), len(columns)).to(device)
        gamma = self.options.gamma
        alpha = ridge(rbf(X, X, gamma), Y, self.options.lam)
        return lambda x: rbf(x, X, gamma) @ alpha


register(
    Method("rail-primal", "RAIL (primal)", RailPrimal, "untouched model, ridge regression on random features of its images",
           trained="nothing by gradient: one regression", state="ΦᵀΦ (h × h) and ΦᵀY", paper="Xu et al., arXiv 2406.18868",
           inference="h random features, one product with W", kinds=CLASSIFICATION, learns_from_batches=True,
           search={"tuner.options.lam": ("log", 1e-3, 1e1), "tuner.options.beta": ("uniform", 0.5, 1.0)})
)  # fmt: skip
register(
    Method("rail-dual", "RAIL (dual)", RailDual, "untouched model, kernel ridge regression on its image features",
           trained="nothing by gradient: one regression", state="the features of every training picture",
           paper="Xu et al., arXiv 2406.18868", inference="a kernel against every training picture",
           kinds=CLASSIFICATION, learns_from_batches=True,
           search={"tuner.options.lam": ("log", 1e-5, 1e-1), "tuner.options.gamma": ("log", 1e-2, 1e1),
                   "tuner.options.beta": ("uniform", 0.5, 1.0)})
)  # fmt: skip
