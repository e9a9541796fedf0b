"""What A is taken from: the gradient of every target (exact), or a sketch of it: l · in numbers in place of out · in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keeplora.math import sketch, sketch_matrix, sketch_rows
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.convergence import Enough
from keeplora.tuner.observers import GradientObserver
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.task import OpenTask

EXACT_BYTES = 4 * 2**30
"""``residual_gradient: auto`` is exact where G of all targets, in float64, takes at most this much. A constant, and not the
machine's memory, which would make results depend on the machine."""


def gradient_mode(config: KeepLoraConfig, shapes: Iterable[tuple[int, int]]) -> str:
    """ "exact" or "sketch".

    Args:
        shapes: (in, out) of every target.

    >>> gradient_mode(KeepLoraConfig(), [(768, 768)] * 96), gradient_mode(KeepLoraConfig(), [(4096, 4096)] * 128)
    ('exact', 'sketch')
    """
    if config.residual_gradient != "auto":
        return config.residual_gradient
    # M8g holds all G after the task in any case.
    small = sum(8 * n_in * n_out for n_in, n_out in shapes) <= EXACT_BYTES
    return "exact" if small or config.memory == "gradients" else "sketch"


class SketchObserver(GradientObserver):
    """Accumulates Z = Ψ G in ``G[name]``, float64, (l, in). Ψ is one for all targets of the same height and l.

    Args:
        oversampling: p, None for 3 r. key: what Ψ is drawn from, with out and l.
    """

    def __init__(
        self, targets: Sequence[Target], store: WeightStore, *, oversampling: int | None = None, key: str = ""
    ) -> None:
        super().__init__(targets, store)
        self.oversampling, self.key = oversampling, key
        self._Psi: dict[tuple[int, int, torch.device], Tensor] = {}

    def _matrix(self, target: Target, device: torch.device) -> Tensor:
        rows = sketch_rows(target.n_out, target.r, self.oversampling)
        where = (target.n_out, rows, device)
        if where not in self._Psi:
            digest = hashlib.sha256(f"{self.key}/{target.n_out}/{rows}".encode()).digest()
            self._Psi[where] = sketch_matrix(target.n_out, rows, int.from_bytes(digest[:7])).to(device)
        return self._Psi[where]

    def _product(self, target: Target, g: Tensor, x: Tensor) -> Tensor:
        return sketch(self._matrix(target, g.device), g, x)


def gradients_for_factor(
    learner: ContinualLearner, task: OpenTask, targets: Sequence[Target], batches: Iterable[Any],
    enough: Enough | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Per target what `residual_factor` takes: G (out, in) (M2), or Z = Ψ G (l, in); the task's info says which.

    With ``enough`` the pass may end before the last batch. Ψ follows from the config's seed and the task's name: every process
    draws the same, and no task the one before it.
    """
    config = learner.config
    mode = gradient_mode(config, [(t.n_in, t.n_out) for t in learner.targets])
    task.info["residual_gradient"] = mode
    observe: Callable[[Sequence[Target], WeightStore], GradientObserver] = GradientObserver
    if mode == "sketch":
        observe = partial(
            SketchObserver, oversampling=config.sketch_oversampling, key=f"{config.seed}/{task.name}"
        )  # fmt: skip
    return collect_gradients(
        learner.model, targets, learner.store, batches, task.loss_fn, task.mask_fn, enough, observe
    )
