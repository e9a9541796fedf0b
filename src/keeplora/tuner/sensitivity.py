"""Layer scales from what a step in each block does to its tower's output (`schedule: measured`; beyond the paper).

With f(x) what a tower returns for a sample (pooled, where it pools), and A a task's fixed factors, a block's drift is

    c_l² = Σ_{W in block l} Σ_n ‖∂f(x_n)/∂W · Aᵀ‖_F²

by how much, squared and to first order, the outputs move where every entry of the block's B moves by a unit at random: AdamW's
steps on B are of one size in all layers. Neither labels nor data of other tasks are asked for. One random sign per output number
of a sample, v, goes through one backward pass: E ‖∂(Σ_n v_n·f(x_n))/∂W · Aᵀ‖² is that sum, for the signs of different samples are
independent (Hutchinson's estimator). What is held is (out, r) per layer. The signs depend on how many processes share the data:
their scales agree with one process's within the estimate's error, which few samples make large, and with each other exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError, TargetError
from keeplora.math import MEASURED, measured_scales
from keeplora.tuner import ranks
from keeplora.tuner.allocation import by_tower
from keeplora.tuner.observers import GradientObserver
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner
    from keeplora.tuner.ledger import TaskRecord
    from keeplora.tuner.task import OpenTask

SCALES = "layer_scales"
"""Key of a task's info: per tower whose schedule is measured, the scale of each block that is adapted, by its depth."""


def scaled_targets(learner: ContinualLearner, task: OpenTask, A: Mapping[str, Tensor]) -> list[Target]:
    """The learner's targets as the task's adapter takes them: with measured scales where the schedule asks for them.

    The scales are in the task's info, and so in its record; a task that is opened again has them from there.
    """
    measured = [t for t in learner.targets if learner.config.for_tower("schedule", t.tower) == MEASURED]
    measured = [t for t in measured if t.depth is not None and A.get(t.name) is not None and len(A[t.name])]
    if not measured:
        return learner.targets
    if task.saved is not None:
        task.info[SCALES] = task.saved.values["info"][SCALES]
    else:
        task.info[SCALES] = ranks.agreed("the layer scales", _measure(learner, task, measured, A))
    told, among = task.info[SCALES], {t.name for t in measured}
    return [replace(t, scale=told[t.tower][str(t.depth)]) if t.name in among else t for t in learner.targets]


def _measure(
    learner: ContinualLearner, task: OpenTask, targets: Sequence[Target], A: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    squares = {name: float(M.square().sum()) for name, M in _responses(learner, task, targets, A).items()}
    found: dict[str, dict[str, float]] = {}
    for tower in by_tower(targets):
        linear: dict[int, float] = {t.depth: t.scale for t in tower if t.depth is not None}
        depths = sorted(linear)
        drifts = [sum(squares.get(t.name, 0.0) for t in tower if t.depth == depth) ** 0.5 for depth in depths]
        name = tower[0].tower
        if not max(drifts) > 0:
            raise TargetError(
                f"schedule: measured found no effect of the layers of tower {name!r} on its output in the feature pass; let "
                "forward_fn run the tower with gradients, or set schedule: linear for it"
            )
        scales = measured_scales(drifts, [linear[d] for d in depths], learner.config.for_tower("gamma", name))
        found[name] = {str(d): s for d, s in zip(depths, scales, strict=True)}
    return found


def latest_scale(records: Sequence[TaskRecord], target: Target) -> float:
    """The scale at which a target learned last: measured for the newest task that has such scales, or its own."""
    for record in reversed(records):
        told = record.info.get(SCALES, {}).get(target.tower, {})
        if (scale := told.get(str(target.depth))) is not None:
            return scale
    return target.scale


class _ResponseObserver(GradientObserver):
    """Accumulates gᵀ x Aᵀ (out, r) of every target."""

    def __init__(self, targets: Sequence[Target], store: WeightStore, A: Mapping[str, Tensor]) -> None:
        super().__init__(targets, store)
        self._A = A

    def _product(self, target: Target, g: Tensor, x: Tensor) -> Tensor:
        return g.T @ (x @ self._A[target.name].to(x.device).T)

    def require_all_fired(self, what: str) -> None:
        """A batch may feed one tower alone."""


def _responses(
    learner: ContinualLearner, task: OpenTask, targets: Sequence[Target], A: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """∂(Σ_n v_n·f(x_n))/∂W · Aᵀ of every target over the feature pass's data, divided by one number for all."""
    from keeplora.tuner.statistics import feature_batches

    if isinstance(task.feature_batches, Iterator):
        raise KeepLoraError(
            f"task {task.name!r}: feature_batches is a {type(task.feature_batches).__name__}, which can be gone through only "
            "once, but schedule: measured goes through it before training, and again after it; give a list or a DataLoader"
        )
    forward = task.forward_fn or task.loss_fn
    generator = torch.Generator().manual_seed(1009 * learner.config.seed + ranks.rank())
    with _outputs(learner.model, sorted({t.tower for t in targets})) as outputs:

        def response(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            outputs.clear()
            forward(model, batch)
            masks, total = task.mask_fn(batch), None
            for tower, y in outputs:
                if not y.requires_grad:
                    continue
                v = torch.randint(2, y.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).to(y.device)
                mask = masks.get(tower, masks.get("") if "vis" not in tower else None)
                if mask is not None and mask.shape == y.shape[:-1]:
                    v = v * (mask > 0).to(v).unsqueeze(-1)
                part = (v * y.float()).sum()
                total = part if total is None else total + part.to(total.device)
            if total is None:
                raise TargetError(
                    "schedule: measured found no tower's output that a target changes in the feature pass; let forward_fn run "
                    "the towers with gradients, or set schedule: linear"
                )
            return total, 1

        return collect_gradients(
            learner.model, targets, learner.store, feature_batches(learner, task), response, task.mask_fn, None,
            lambda some, store: _ResponseObserver(some, store, A),
        )  # fmt: skip


@contextlib.contextmanager
def _outputs(model: nn.Module, towers: Sequence[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """What the towers' modules return, as they return it, by tower."""
    found: list[tuple[str, Tensor]] = []

    def hook_of(tower: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if (y := _features(output)) is not None:
                found.append((tower, y))

        return hook

    handles = [model.get_submodule(tower).register_forward_hook(hook_of(tower)) for tower in towers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Any) -> Tensor | None:
    """A tower's features in what its module returned: pooled where it pools."""
    if isinstance(output, Tensor):
        return output
    for key in ("pooler_output", "last_hidden_state", "logits"):
        if isinstance(found := getattr(output, key, None), Tensor):
            return found
    if isinstance(output, (tuple, list)):
        return next((y for y in output if isinstance(y, Tensor) and y.is_floating_point()), None)
    return None
