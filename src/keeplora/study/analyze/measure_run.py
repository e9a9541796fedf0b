"""Points of a finished run: every layer after each task, and updates undone over the depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.analysis.likeness import linear_cka
from keeplora.experiment.gradients import starting_gradient, weights_after
from keeplora.study.analyze.world import World
from keeplora.tuner.adapter import Factors
from keeplora.tuner.observers import quiet_model
from keeplora.tuner.persistence import all_updates
from keeplora.tuner.sampling import batch_size, to_device
from keeplora.tuner.similarity import gradient_inside
from keeplora.tuner.targets import Target

CKA_BATCH = 32


def layers(world: World, task: int) -> dict[str, Any]:
    """Every layer after task ``task`` (from 1): size of its update, feature drift, and the energy of the residual gradient.

    ‖ΔW‖/‖W₀‖ of the task and of all up to it; linear CKA between the layer's inputs in the untouched model and now, on the
    general sets; ‖G (I − P)‖²/‖G‖² of the task's gradient at the weights it found, with what its own A took of that, and the
    share of it that lies inside each earlier task's features (`gradient_inside`), where the ledger knows them.
    """
    learner, name = world.learner, world.learner.records[task - 1].name
    records = learner.records[:task]
    sizes = _sizes(world, task)
    with weights_after(learner, 0):
        start = _pooled(world)
    with weights_after(learner, task):
        now = _pooled(world)
    drift = {t: linear_cka(start[t], now[t]) for t in start}
    taken = learner.protects and records[-1].factors
    if taken or world.features:
        data = next(t for t in world.setup.tasks if t.name == name)
        G = starting_gradient(world.setup, learner, task, data, world.training_data(data))
    gradient = _residual(world, task, G) if taken else {}
    inside = {r.name: gradient_inside(G, world.features[r.name]) for r in records[:-1] if r.name in world.features}
    rows = []
    for t in world.targets:
        rows.append({
            "layer": t.name, "tower": t.tower, "depth": t.depth, "blocks": t.blocks, **sizes[t.name], "cka": drift.get(t.name),
            **gradient.get(t.name, {}),
        })  # fmt: skip
    samples = {layer: len(found) for layer, found in start.items()}
    return {"task_name": name, "rows": rows, "inside": inside, "samples": samples}


def undo(world: World, first: str, steps: int, total: int) -> dict[str, Any]:
    """Scores with all updates of the first ``steps`` of ``total`` steps of the depth taken out, from the ``first`` end."""
    learner = world.learner
    gone = {t.name for t in world.targets if undone(t, first, steps, total)}
    kept = {name: us for name, us in all_updates(learner.records).items() if name not in gone}
    before = learner.store.snapshot()
    try:
        learner.store.restore(kept)
        return {**world.both(), "layers": len(gone), "of": len(world.targets)}
    finally:
        learner.store.restore(before)


def undone(target: Target, first: str, steps: int, total: int) -> bool:
    """Whether a target's update is out after so many steps; one without depth goes with the deepest.

    >>> shallow, deep = (Target("a", "v", d, 12, 4, 4, 1.0, 4, 4.0) for d in (0, 11))
    >>> undone(shallow, "shallow", 1, 12), undone(deep, "shallow", 11, 12), undone(deep, "deep", 1, 12)
    (True, False, True)
    """
    place = (target.depth + 0.5) / target.blocks if target.depth is not None else 1.0
    return place <= steps / total if first == "shallow" else place > 1 - steps / total


def _sizes(world: World, task: int) -> dict[str, dict[str, float]]:
    """‖ΔW‖/‖W₀‖ of the task's update, and of the sum up to it, per target."""
    learner, found = world.learner, {}
    for t in world.targets:
        base = float(learner.store.W0[t.name].float().norm()) or 1.0
        total: Tensor | None = None
        own = 0.0
        for record in learner.records[:task]:
            update = record.updates.get(t.name)
            if update is None:
                continue
            delta = update.delta if isinstance(update, Factors) else update.float()
            total = delta if total is None else total + delta
            if record is learner.records[task - 1]:
                own = float(delta.norm())
        found[t.name] = {"update": own / base, "total": float(total.norm()) / base if total is not None else 0.0}
    return found


@torch.no_grad()
def _pooled(world: World) -> dict[str, Tensor]:
    """Per target the mean of its inputs over the positions that count, one row per general sample, float32.

    A dual encoder's text tower has a row per class prompt. A layer whose inputs are not one row per sample (towers that lay all
    patches of a batch in one row) is left out.
    """
    rows: dict[str, list[Tensor]] = {}
    handles = []
    masks: dict[str, Any] = {}
    count = 0

    def hook_of(target: Target) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            if x.ndim < 3 or x.shape[0] != count:
                return
            mask = masks.get(target.tower, masks.get(""))
            if mask is not None and mask.shape == x.shape[:-1]:
                weights = mask.to(x.device, torch.float32).flatten(1).unsqueeze(-1)
            else:
                weights = torch.ones((*x.flatten(1, -2).shape[:2], 1), device=x.device)
            total = weights.sum(1).clamp(min=1e-9)
            rows.setdefault(target.name, []).append(((x.flatten(1, -2) * weights).sum(1) / total).cpu())

        return hook

    with quiet_model(world.family.model):
        try:
            for t in world.targets:
                handles.append(world.learner.store.module(t.name).register_forward_pre_hook(hook_of(t)))
            for objective, batch in _batches(world):
                batch = to_device(batch, world.family.device)
                masks, count = dict(objective.masks(batch)), batch_size(batch)
                objective.forward(world.family.model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _batches(world: World) -> Iterator[tuple[Any, Any]]:
    """(objective, batch): the general samples, and of a dual encoder their class prompts."""
    for task, data in world.general.values():
        objective = world.kind.objective(task)
        items: Sequence[Any] = [data[i] for i in range(len(data))]
        for start in range(0, len(items), CKA_BATCH):
            part = items[start : start + CKA_BATCH]
            if world.kind.name == "classification":
                yield objective, {"pixel_values": torch.stack([item["pixel_values"] for item in part])}
            else:
                yield objective, world.family.join(part)
        if world.kind.name == "classification":
            prompts = world.family.class_prompts(task.classes, task.templates[:1])
            for start in range(0, len(prompts), CKA_BATCH):
                yield objective, dict(world.family.tokenize(prompts[start : start + CKA_BATCH]))


def _residual(world: World, task: int, G: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Per target: share of the task's gradient energy outside U as the task found it, and what of that its A took."""
    learner = world.learner
    record = learner.records[task - 1]
    place = next(i for i, r in enumerate(learner.history) if r is record or r.entry == record.entry)
    found: dict[str, dict[str, float]] = {}
    for t in world.targets:
        M = G[t.name].cpu()
        U = learner.U.after(t.name, place).to(M.dtype)
        residual = M - (M @ U) @ U.T
        total, left = float(M.square().sum()), float(residual.square().sum())
        factors = record.factors.get(t.name)
        A = factors.A.to(M.dtype) if factors is not None else None
        taken = float((residual @ A.T).square().sum()) if A is not None else 0.0
        found[t.name] = {"outside": left / total if total > 0 else 0.0, "taken": taken / left if left > 0 else 0.0}
    return found
