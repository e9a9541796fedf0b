"""How each kind of point is measured; every function takes the world and the point's values and returns JSON values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from keeplora.analysis.spectrum import captured
from keeplora.errors import CapacityError
from keeplora.experiment.progress import Progress
from keeplora.experiment.training import train_task
from keeplora.math import Subspace, new_directions, new_gradient_directions
from keeplora.math.subspace import right_vectors
from keeplora.study.analyze.measure_run import layers, undo
from keeplora.study.analyze.plan import WINDOWS, Point, in_part, window_of
from keeplora.study.analyze.world import World
from keeplora.tuner import KeepLoraConfig
from keeplora.tuner.basis_cache import weight_subspace
from keeplora.tuner.statistics import task_features, task_gradients
from keeplora.tuner.targets import Target
from keeplora.tuner.task import OpenTask

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
FEATURE_ENERGIES = (0.9, 0.95, 0.99, 0.999)
"""ε_f that are tried, and the configured ones."""
SAMPLED_BLOCKS = 4
"""Blocks of each tower, evenly over its depth, whose subspaces are grown over all tasks: each takes an eigendecomposition per
task and ε_f."""
PER_TOWER = ("energy_weights", "energy_features", "energy_general", "gamma", "r", "schedule")


def measure(world: World, point: Point) -> dict[str, Any]:
    """Measure a point; the model is afterwards as it was before."""
    return KINDS[point.kind](world, **point.values)


# ---- the spectrum -------------------------------------------------------------------------------------------------


def untouched(world: World) -> dict[str, Any]:
    """The model as it is."""
    return world.both()


def _truncated(world: World, targets: Sequence[Target], mode: str, share: float) -> dict[str, Any]:
    """Scores with ``targets`` rebuilt from the leading components that hold ``share``, or from the trailing ones that hold as
    much of Σσ² as those do, in every layer; what of Σσ² that is, and what share of the components."""
    chosen = {t.name for t in targets}
    kept: list[float] = []
    ranks: list[float] = []

    def change(target: Target, W: Tensor) -> Tensor | None:
        if target.name not in chosen:
            return None
        S = world.spectrum(target.name, W)
        k = S.rank_for(share, world.plan.by)
        kept.append(S.energy(k))
        if mode == "trailing":
            k, rest = S.trailing(W, S.energy(k))
        else:
            rest = S.leading(W, k)
        ranks.append(k / len(S))
        return rest

    with world.weights(change):
        found = world.both()
    return {**found, "energy": fmean(kept), "rank_share": fmean(ranks), "layers": len(kept)}


def intra(world: World, part: str, mode: str, share: float) -> dict[str, Any]:
    """One part's weights from their leading components, or from their trailing ones."""
    return _truncated(world, [t for t in world.targets if in_part(t, part)], mode, share)


def third(world: World, window: int, share: float) -> dict[str, Any]:
    """The weights of one third of the depth, in every tower, from their leading components."""
    return _truncated(world, [t for t in world.targets if window_of(t) == window], "leading", share)


# ---- one window of layers adapted ----------------------------------------------------------------------------------


def window(world: World, task: int, window: int, windows: int = WINDOWS) -> dict[str, Any]:
    """The task learned by the method with all layer scales at 1 and only one of so many windows of the depth adapted.

    What is judged are held-out training samples of the task and the general sets, before and after, sample by sample.
    """
    setup, kind = world.setup, world.kind
    data = setup.tasks[task - 1]
    held = {data.name: (data, world.data_set(data.validation))}
    before = world.scores(held)
    names = [t.name for t in world.targets if window_of(t, windows) == window]
    training = setup.config.training.for_task(data.name)
    config = _of_window(setup.tuner_config(data), [t for t in world.targets if t.name in set(names)])
    learner = setup.method.learner(world.family.model, config)
    seed = world.plan.seed * 100_003 + task
    torch.manual_seed(seed)
    objective = kind.objective(data)
    train = world.training_data(data)
    kind.prepare_head(objective, train, training)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = kind.statistics(objective, train, training, config, seed)
            model = learner.start_task(data.name, **arguments)
    except CapacityError as error:
        return {"not_learned": str(error)}
    try:
        # Only now, with B = 0: with `candidates: seen` the open task's classes are candidates before and after. Scoring draws
        # from the generator that training goes by.
        with torch.random.fork_rng(devices=[]):
            general_before = world.scores(world.general, learner)
        batches = kind.batches(objective, train, training, seed)
        with objective.training():
            train_task(
                model, objective, batches, training, hooks=learner, progress=Progress.silent(), on_epoch=lambda _: None
            )
        head = objective.head.detach() if objective.head is not None else None
        after = world.scores(held, learner, head=head), world.scores(world.general, learner)
    finally:
        learner.abort_task()
    return {
        "task_name": data.name, "before": before, "after": after[0], "general_before": general_before,
        "general_after": after[1], "layers": len(names), "trained": learner.planned_parameters(),
    }  # fmt: skip


def _of_window(config: KeepLoraConfig, targets: Sequence[Target]) -> KeepLoraConfig:
    """The settings with these targets alone, each at layer scale 1."""
    towers = list(dict.fromkeys(t.tower for t in targets))
    # Per tower by its own name: the keys of a tower that is not among the targets would be refused.
    own = {name: {tower: config.for_tower(name, tower) for tower in towers} for name in PER_TOWER}
    own |= {"gamma": dict.fromkeys(towers, 1.0), "schedule": dict.fromkeys(towers, "constant")}
    return replace(config, target_modules=[t.name for t in targets], exclude_modules=None, free_modules=None, **own)


# ---- gradients and features of the tasks -----------------------------------------------------------------------------


def spectra(world: World) -> dict[str, Any]:
    """Of the untouched model: the residual gradient's spectrum per task and layer, and what protecting tasks leaves: their
    features (M8), or with ``memory: gradients`` their gradients (M8g).

    The features and gradients of later tasks are those of the untouched model too, which a run's will differ from.
    """
    config, learner = world.setup.tuner_config(), world.learner
    r_of = {t.name: t.r for t in world.targets}
    U0 = {
        t.name: weight_subspace(learner.store.W0[t.name], config.for_tower("energy_weights", t.tower))
        for t in world.targets
    }
    sampled = _sampled(world.targets)
    energies = sorted({*FEATURE_ENERGIES, *(config.for_tower("energy_features", t.tower) for t in world.targets)})
    U: dict[float, dict[str, Subspace]] = {}
    rows: list[dict[str, Any]] = []
    last: dict[str, Tensor] = {}
    for task in world.setup.tasks:
        opened = _opened(world, task)
        G = task_gradients(learner, opened)
        for target in world.targets:
            M = G[target.name].cpu()
            total = float(M.square().sum())
            residual = U0[target.name].project_out(M)
            sigma, _ = right_vectors(residual)
            rows.append({
                "task": task.name, "layer": target.name, "tower": target.tower, "depth": target.depth, "r": r_of[target.name],
                "outside": float(residual.square().sum()) / total if total > 0 else 0.0,
                "captured": [round(v, 5) for v in captured(sigma, RANKS)],
            })  # fmt: skip
        by_features = config.memory == "features"
        features = task_features(learner, opened, exact=True) if by_features else None
        leaders = [t for t in sampled if features is None or features.leader[t.name] == t.name]
        last = {t.name: G[t.name].cpu() for t in leaders}
        for energy in energies:
            grown = U.setdefault(energy, {t.name: U0[t.name] for t in leaders})
            if task is not world.setup.tasks[-1]:  # nothing is learned after the last
                for t in leaders:
                    if features is None:
                        V, _ = new_gradient_directions(grown[t.name], last[t.name], energy)
                    else:
                        V, _ = new_directions(grown[t.name], features.C(t.name).cpu(), energy)  # type: ignore[union-attr]  # exact
                    grown[t.name] = grown[t.name].extended(V)
    protected = [
        {
            "energy": energy, "room": [S.n_in - S.k for S in grown.values()],
            "left": [_outside(last[name], S) for name, S in grown.items()],
            "start": [_outside(last[name], U0[name]) for name in grown],
            "layers": list(grown),
        }
        for energy, grown in U.items()
    ]  # fmt: skip
    return {
        "ranks": list(RANKS), "rows": rows, "protected": protected, "tasks": len(world.setup.tasks), "memory": config.memory,
    }  # fmt: skip


def _outside(G: Tensor, S: Subspace) -> float:
    """Share of ‖G‖² outside span(U)."""
    total = float(G.square().sum())
    return float(S.project_out(G).square().sum()) / total if total > 0 else 0.0


def _sampled(targets: Sequence[Target]) -> list[Target]:
    """The targets of a few blocks of each tower, its first and last among them."""
    chosen: set[tuple[str, int | None]] = set()
    for tower in {t.tower for t in targets}:
        depths = sorted({t.depth for t in targets if t.tower == tower and t.depth is not None})
        n = min(SAMPLED_BLOCKS, len(depths))
        chosen |= {(tower, depths[round(i * (len(depths) - 1) / max(1, n - 1))]) for i in range(n)}
        chosen |= {(tower, None)}
    return [t for t in targets if (t.tower, t.depth) in chosen]


def _opened(world: World, task: Any) -> OpenTask:
    """The task's data as the statistics passes take it."""
    training = world.setup.config.training.for_task(task.name)
    objective = world.kind.objective(task)
    data = world.training_data(task)
    world.kind.prepare_head(objective, data, training)
    arguments = world.kind.statistics(objective, data, training, world.learner.config, world.plan.seed)
    return OpenTask(task.name, **arguments)


KINDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "untouched": untouched, "intra": intra, "third": third, "window": window, "spectra": spectra,
    "layers": layers, "undo": undo,
}  # fmt: skip
"""One function per kind of point."""
