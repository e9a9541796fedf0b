"""Quadratic regularisers on full fine-tuning of the target weights: L2 and online EWC."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.methods.full_finetuning import FullFineTuning
from keeplora.methods.registry import FULL_LEARNING_RATE, ONE_SCALE, Method, register
from keeplora.methods.samples import is_generative, single_batches
from keeplora.tuner.learner import OpenTask
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.observers import LossFn, quiet_model
from keeplora.tuner.options import option
from keeplora.tuner.passes import sum_and_count
from keeplora.tuner.sampling import batch_size, statistics_batches, to_device
from keeplora.tuner.weights import WeightStore

FISHER = "fisher/"
"""Prefix of a target's Fisher information among a record's tensors."""


def singles(batches: Iterable[Any], shared: Iterable[str] = ()) -> Iterator[Any]:
    """Every sample as a batch of one.

    A tensor is cut where its first dimension is the number of samples. In a mapping, the keys in ``shared`` (class
    prompts, which serve all samples) stay whole.

    >>> x = torch.arange(2)
    >>> [b["labels"].tolist() for b in singles([{"labels": x, "prompts": x}], shared=["prompts"])]
    [[0], [1]]
    """
    shared = set(shared)

    def cut(value: Any, i: int, n: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and len(value) == n else value
        if isinstance(value, Mapping):
            return {key: item if key in shared else cut(item, i, n) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [cut(item, i, n) for item in value]
        return value

    for batch in batches:
        n = batch_size(batch)
        for i in range(n):
            yield cut(batch, i, n)


def empirical_fisher(
    model: nn.Module, store: WeightStore, samples: Iterable[Any], loss_fn: LossFn
) -> dict[str, Tensor]:  # fmt: skip
    """F of every weight in the store: mean over the samples of (∂ log p(y|x) / ∂θ)², y the true label.

    Args:
        samples: batches of one sample each. Squares of one sample's gradient cannot be had from a batch's backward
            pass: in a dual encoder, every sample's loss runs through the same class prompts.
        loss_fn: −log p(y|x) of a batch of one.

    Returns:
        Per name a float32 tensor of the weight's shape, on the CPU; zeros where no gradient arrives. Gradients that the
        model holds are not touched.
    """
    weights = {name: store.parameter(name) for name in store.names}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    device = next(iter(weights.values())).device
    n = 0
    with quiet_model(model), torch.enable_grad():
        for p in weights.values():
            p.requires_grad_(True)
        for sample in samples:
            sample = to_device(sample, device)
            loss, _ = sum_and_count(loss_fn(model, sample), sample)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in the Fisher pass, after {n} samples")
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, g in zip(weights, gradients, strict=True):
                if g is not None:
                    total[name].addcmul_(g.float(), g.float())
            n += 1
    if n == 0:
        raise ValueError("the Fisher pass was given no sample: the loader is empty")
    return {name: (F / n).cpu() for name, F in total.items()}


@dataclass(frozen=True)
class L2Options:
    """Settings of ``l2``."""

    lam: float = option(1.0, "λ of λ Σ (θ − θ*)²")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ConfigError(f"tuner.options.lam must be a finite number of at least 0, got {self.lam!r}")


class L2(FullFineTuning):
    """λ Σ (θ − θ*)², θ* the weights before the task: all directions weigh the same.

    The baseline of Kirkpatrick et al. (1612.00796) beside EWC, and the "weight consolidation" of ZSCL (2303.06628) with
    its λ = 1. As in the latter, and unlike the former, the first task is held to the pretrained weights too: they are
    what a vision-language model has to lose.
    """

    single_process: ClassVar[str] = "is not yet taught to divide its work among processes"

    Options = L2Options
    _held: Sequence[tuple[nn.Parameter, Tensor, Tensor | float]] = ()

    def _importance(self) -> Mapping[str, Tensor | float]:
        """F per weight; a weight without one is free."""
        return dict.fromkeys(self.store.names, 1.0)

    def _attach(self, task: OpenTask) -> nn.Module:
        held = []
        for name, f in self._importance().items():
            p = self.store.parameter(name)
            held.append((p, p.detach().to(torch.float32, copy=True), f.to(p.device) if isinstance(f, Tensor) else f))
        model = super()._attach(task)
        self._held = held
        task.when_released(held.clear)
        return model

    def penalty(self, batch: Any, logits: Tensor | None) -> Tensor | None:
        if not self._held:
            return None
        terms = [(f * (p.to(torch.float32) - anchor).square()).sum() for p, anchor, f in self._held]
        return self.options.lam * torch.stack(terms).sum()


@dataclass(frozen=True)
class EWCOptions(L2Options):
    """Settings of ``ewc``."""

    lam: float = option(1000.0, "λ of λ Σ F (θ − θ*)²")
    decay: float = option(0.9, "what is kept of the earlier F when a task's own is added, 0 to 1")
    fisher_samples: int = option(256, "samples that a task's F is taken over, stratified by class; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"tuner.options.decay must lie between 0 and 1, got {self.decay!r}")
        if self.fisher_samples < 0:
            raise ConfigError(
                f"tuner.options.fisher_samples must be at least 1, or 0 for all, got {self.fisher_samples!r}"
            )


class EWC(L2):
    """Online elastic weight consolidation: λ Σ F (θ − θ*)², F ← decay · F + F_task after each task.

    Kirkpatrick et al. (1612.00796) with one running F and the last weights as θ*, the online form of Schwarz et al.
    (1805.06370). F_task is the empirical Fisher at the task's final weights: the mean over its training samples of the
    squared gradient of log p(y|x) with the true label y (of a generative model: the whole answer), sample by sample,
    where the papers draw y from the model or leave it open. λ stands without their factor ½, and F is not normalised.
    There is no F of the pretraining, so the first task is plain fine-tuning.
    """

    Options = EWCOptions

    def fisher(self) -> dict[str, Tensor]:
        """The running F per weight, float32 on the CPU; empty before the first task."""
        F: dict[str, Tensor] = {}
        for record in self.records:
            for name in self.store.names:
                if (new := record.tensors.get(FISHER + name)) is not None:
                    F[name] = self.options.decay * F[name] + new if name in F else new
        return F

    def _importance(self) -> Mapping[str, Tensor | float]:
        return self.fisher()

    def _attach(self, task: OpenTask) -> nn.Module:
        if is_generative(task):
            single_batches(task)  # asked for now, needed when the task ends
        return super()._attach(task)

    def _remember(self, task: OpenTask, record: TaskRecord) -> None:
        cap = self.options.fisher_samples or None
        generative = is_generative(task)
        source = single_batches(task) if generative else task.batches
        samples: Iterable[Any] = statistics_batches(source, cap, self.config.seed, task.labels)
        if not generative:
            samples = singles(samples, task.objective.text_batch if task.objective is not None else ())
        F = empirical_fisher(self.model, self.store, itertools.islice(samples, cap), task.loss_fn)
        record.tensors |= {FISHER + name: f for name, f in F.items()}

    def state_bytes(self) -> int:
        return sum(F.numel() * F.element_size() for F in self.fisher().values())


register(
    Method("l2", "L2", L2, "full fine-tuning, λ Σ (θ − θ*)² towards the weights before the task", config=ONE_SCALE,
           trained="all target weights", paper="Kirkpatrick et al., arXiv 1612.00796",
           search={**FULL_LEARNING_RATE, "tuner.options.lam": ("log", 1e-2, 1e3)})
)  # fmt: skip
register(
    Method("ewc", "EWC (online)", EWC, "full fine-tuning, λ Σ F (θ − θ*)² with a running Fisher information F",
           config=ONE_SCALE, trained="all target weights", state="F: one number per target weight",
           paper="Kirkpatrick et al., arXiv 1612.00796; Schwarz et al., arXiv 1805.06370",
           search={**FULL_LEARNING_RATE, "tuner.options.lam": ("log", 1e-1, 1e6)})
)  # fmt: skip
