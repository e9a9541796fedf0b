"""How much of the probes' features lies in what a run protects: what general knowledge the method can see.

    python benchmarks/probe_coverage.py runs/study-demo-small/tuned/keeplora++-seed0

For the untouched model's inputs C of every target on the probe pictures and prompts: the share of tr C inside U₀ (weights, M1),
inside U₀ and the directions that ``energy_general`` takes of drawn pictures, and inside U after the last task; the mean and
the lowest over the layers of each tower, in percent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from keeplora.experiment.config import load_config
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.pictures import Collate, DrawnPictures, loader
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import prepare
from keeplora.math import Subspace, explained_share
from keeplora.tuner import ContinualLearner
from keeplora.tuner.convergence import growth
from keeplora.tuner.passes import collect_features

DRAWN = (0.95, 0.99)
"""ε_g."""


def main(path: str) -> None:
    torch.set_num_threads(1)
    setup = prepare(load_config(RunDirectory(Path(path)).read_config()))
    learner = ContinualLearner.from_pretrained(path, setup.family.model)
    learner.store.restore({})  # the untouched weights; U stays as the last task left it
    start = learner.start_bases()
    objectives = [TaskObjective(setup.family, probe, setup.precision) for probe in setup.probes]

    def features(batches: object, objective: TaskObjective) -> dict[str, Tensor]:
        found = collect_features(
            setup.family.model, learner.targets, learner.store, batches, objective.forward, objective.masks, all_fire=False
        )  # fmt: skip
        return {name: found.C(name) for name in found.fired}

    drawn = features(loader(DrawnPictures(setup.family), 64, Collate()), objectives[0])

    def grown(energy: float) -> Callable[[str], Tensor]:
        bases = {}
        for name, C in drawn.items():
            S = Subspace.of(start[name])
            bases[name] = S.extended(growth(S, C, energy).V.cpu()).basis()
        return lambda name: bases.get(name, start[name])

    spaces = {"U₀": start.__getitem__}
    spaces |= {f"U₀ and drawn pictures, ε_g {e}": grown(e) for e in DRAWN}
    spaces["the last U"] = learner.U.__getitem__
    print("| features of | tower |" + "".join(f" in {name}, mean | lowest |" for name in spaces))
    print("|--|--|" + "--:|--:|" * len(spaces))
    for objective in objectives:
        pictures = loader(setup.sets[objective.task.name].test, 64, Collate())
        C = features(objective.feature_batches(pictures), objective)
        for tower in sorted({t.tower for t in learner.targets}):
            names = [t.name for t in learner.targets if t.tower == tower]
            cells = []
            for basis in spaces.values():
                shares = [100 * explained_share(basis(name), C[name]) for name in names]
                cells += [f"{sum(shares) / len(shares):.1f}", f"{min(shares):.1f}"]
            print(f"| {objective.task.name} | {tower} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1])
