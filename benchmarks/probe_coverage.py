"""How much of the probes' features lies in the protected subspaces of a run: what general knowledge the method can see.

    python benchmarks/probe_coverage.py runs/study-demo-small/tuned/keeplora++-seed0

For the untouched model's inputs C of every target on the probe pictures and prompts: the share of tr C inside U₀ (weights, M1)
and inside U after the last task, the mean and the lowest over the layers of each tower, in percent.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from keeplora.experiment.config import load_config
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.pictures import Collate, loader
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import prepare
from keeplora.math import explained_share
from keeplora.tuner import ContinualLearner
from keeplora.tuner.passes import collect_features


def main(path: str) -> None:
    torch.set_num_threads(1)
    setup = prepare(load_config(RunDirectory(Path(path)).read_config()))
    learner = ContinualLearner.from_pretrained(path, setup.family.model)
    learner.store.restore({})  # the untouched weights; U stays as the last task left it
    start = learner.start_bases()
    print(
        "| features of | tower | in U₀, mean | in U₀, lowest | in the last U, mean | in the last U, lowest |\n|--|--|--|--|--|--|"
    )
    for probe in setup.probes:
        objective = TaskObjective(setup.family, probe, setup.precision)
        pictures = loader(setup.sets[probe.name].test, 64, Collate())
        observer = collect_features(
            setup.family.model, learner.targets, learner.store, objective.feature_batches(pictures), objective.forward,
            objective.masks,
        )  # fmt: skip
        for tower in sorted({t.tower for t in learner.targets}):
            cells = []
            for U in (start, learner.U):
                shares = [
                    100 * explained_share(U[t.name], observer.C(t.name)) for t in learner.targets if t.tower == tower
                ]
                cells += [f"{sum(shares) / len(shares):.1f}", f"{min(shares):.1f}"]
            print(f"| {probe.name} | {tower} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1])
