"""How few samples a statistics pass needs (`statistics_tolerance`), and what is lost against all of them.

    python benchmarks/enough.py                                # the statistics of the demo suite's tasks: ten minutes
    python benchmarks/enough.py --tasks 2                      # of its first two tasks
    python benchmarks/enough.py --suite demo-small --tasks 1 --rows 96    # covariances in 96 rows in place of 384 × 384
    python benchmarks/enough.py --accuracy 0 1 2 --output runs/enough     # and whole runs on demo, paired by seed (hours)

For every task on the untouched model and every tolerance:

- used: samples of the pass, of all;
- gain: Σ s² ‖G Aᵀ‖² of the A found, over that of the A of all samples, both by the G of all samples (Prop 3.1: the share of the
  first step's gain that is kept); over all layers, and at the worst;
- ε_t: the share of the energy of *all* samples' C that [U, V] explains at the worst layer, beside the ε that the pass itself
  claims there, and beside ε_f; the columns V has, of those from all samples;
- time: CPU seconds of pass and comparisons (and of A, or V), over those from all samples, in turn in the same process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from keeplora.evaluation.stats import mean_interval, paired_difference
from keeplora.experiment import Experiment, load_config
from keeplora.experiment.setup import prepare
from keeplora.math import explained_share, residual_factor
from keeplora.methods import method_names
from keeplora.tuner.convergence import BasisChange, Enough, FactorChange, growth
from keeplora.tuner.passes import collect_features, collect_gradients
from keeplora.tuner.sampling import statistics_batches

TOLERANCES = (0.3, 0.1, 0.03)


class Statistics:
    """The statistics of one task on the untouched model, from all samples or fewer."""

    def __init__(self, setup: Any, task: Any) -> None:
        config = setup.tuner_config(task)
        self.learner = setup.method.learner(setup.family.model, config)
        self.objective = setup.kind.objective(task)
        self.data = setup.sets[task.name].train
        self.given = setup.kind.statistics(self.objective, self.data, setup.config.training, config, 0)
        self.U = self.learner.U
        self.vision = [t for t in self.learner.targets if "vis" in t.tower]

    def batches(self, tolerance: float | None) -> Any:
        return statistics_batches(
            self.given["batches"], None, self.learner.config.seed, self.data.labels, endable=tolerance is not None
        )

    def factors(self, tolerance: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor], int, float]:
        """(G, A, samples, CPU seconds)."""
        started, learner = time.process_time(), self.learner
        enough = None if tolerance is None else Enough(tolerance, FactorChange(learner.targets, self.U.subspace))
        G = collect_gradients(
            learner.model, learner.targets, learner.store, self.batches(tolerance), self.given["loss_fn"],
            self.given["mask_fn"], enough,
        )  # fmt: skip
        A = {t.name: residual_factor(G[t.name], self.U.subspace(t.name), t.r) for t in learner.targets}
        return G, A, len(self.data) if enough is None else enough.samples, time.process_time() - started

    def basis(self, tolerance: float | None) -> tuple[Any, dict[str, tuple[Tensor, float]], int, float]:
        """(C, V and claimed ε, samples, CPU seconds) of the vision tower: what a sample more changes."""
        started, learner = time.process_time(), self.learner
        change = BasisChange(self.U.subspace, learner.feature_energy)
        enough = None if tolerance is None else Enough(tolerance, change)
        features = collect_features(
            learner.model, self.vision, learner.store, self.batches(tolerance), self.objective.forward,
            self.given["mask_fn"], enough,
        )  # fmt: skip
        found = {}
        for t in self.vision:
            grown = growth(self.U.subspace(t.name), features.C(t.name), learner.feature_energy(t.name))
            found[t.name] = grown.V, grown.share
        return features.C, found, len(self.data) if enough is None else enough.samples, time.process_time() - started


def one_task(setup: Any, task: Any) -> list[list[Any]]:
    statistics = Statistics(setup, task)
    G, A_all, n, whole = statistics.factors(None)
    C, V_all, _, whole_basis = statistics.basis(None)
    targets = statistics.learner.targets

    def gains(A: dict[str, Tensor]) -> list[float]:
        return [t.s**2 * float((G[t.name] @ A[t.name].double().T).square().sum()) for t in targets]

    best, rows = gains(A_all), []
    for tolerance in TOLERANCES:
        _, A, used, seconds = statistics.factors(tolerance)
        kept = gains(A)
        worst = min(a / b for a, b in zip(kept, best, strict=True) if b > 0)
        _, V, used_basis, seconds_basis = statistics.basis(tolerance)
        true = {name: explained_share(torch.cat([statistics.U[name], v], dim=1), C(name)) for name, (v, _) in V.items()}
        low = min(true, key=true.__getitem__)
        columns = sum(v.shape[1] for v, _ in V.values()) / sum(v.shape[1] for v, _ in V_all.values())
        rows.append(
            [task.name, tolerance, f"{used} of {n}", f"{sum(kept) / sum(best):.3f}", f"{worst:.3f}", f"{seconds / whole:.2f}",
             f"{used_basis} of {n}", f"{true[low]:.4f}", f"{median(true.values()):.4f}", f"{V[low][1]:.4f}", f"{columns:.3f}",
             f"{seconds_basis / whole_basis:.2f}"]
        )  # fmt: skip
        print("|" + "|".join(f" {cell} " for cell in rows[-1]) + "|", flush=True)
    return rows


def in_few_rows(setup: Any, task: Any, rows: int) -> None:
    """What a sketch of ``rows`` rows claims to explain, and what its directions truly do, beside C itself."""
    statistics = Statistics(setup, task)
    learner, U = statistics.learner, statistics.U
    C, exact, _, _ = statistics.basis(None)
    features = collect_features(
        learner.model, statistics.vision, learner.store, statistics.batches(None), statistics.objective.forward,
        statistics.given["mask_fn"], sketch=rows,
    )  # fmt: skip
    claimed, true, columns = [], [], []
    for name, (v, _) in exact.items():
        grown = growth(U.subspace(name), features.C(name), learner.feature_energy(name))
        V = grown.V
        claimed.append(grown.share)
        true.append(explained_share(torch.cat([U[name], V], dim=1), C(name)))
        columns.append(V.shape[1] / max(1, v.shape[1]))
    for what, values in (("ε_t claimed", claimed), ("true", true), ("columns, of those from C", columns)):
        print(f"{task.name}, {rows} rows: {what}: least {min(values):.3f}, median {median(values):.3f}", flush=True)


def accuracy(suite: str, seeds: list[int], output: Path) -> None:
    """Final accuracy and statistics seconds of whole runs, with and without a tolerance, paired by seed."""
    found: dict[float | None, list[dict[str, Any]]] = {}
    for seed in seeds:
        for tolerance in (None, *TOLERANCES[:2]):
            folder = output / f"{'all' if tolerance is None else tolerance}-seed{seed}"
            values = {"suite": suite, "method": "keeplora++", "seed": seed}
            changes = {"output": str(folder), "tuner": {"statistics_tolerance": tolerance}}
            if (folder / "config.yaml").is_file():
                results = Experiment.resume(folder, quiet=True)
            else:
                results = Experiment(load_config(values, changes, known_methods=method_names()), quiet=True).run()
            found.setdefault(tolerance, []).append(results)
    print("\n| tolerance | last accuracy, mean [95 %] | less all samples, paired [95 %] |\n| --- | --- | --- |")
    base = [fmean(r["accuracy"][-1]) for r in found[None]]
    for tolerance, runs in found.items():
        last = [fmean(r["accuracy"][-1]) for r in runs]
        print(
            f"| {tolerance} | {mean_interval(last)} | {paired_difference(last, base) if tolerance is not None else ''} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--tasks", type=int, default=None, help="the first so many tasks; default: all")
    parser.add_argument("--rows", type=int, default=None, help="only compare sketches of so many rows with C")
    parser.add_argument("--accuracy", type=int, nargs="*", metavar="SEED", help="whole runs under these seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/enough"))
    given = parser.parse_args()
    if given.accuracy is None:
        torch.set_num_threads(1)
        config = load_config({"suite": given.suite, "method": "keeplora++"}, {}, known_methods=method_names())
        setup = prepare(config)
        if given.rows is not None:
            for task in setup.tasks[: given.tasks]:
                in_few_rows(setup, task, given.rows)
            parser.exit()
        columns = ("task", "tolerance", "used for A", "gain", "worst layer", "time", "used for U", "ε_t worst layer", "median",
                   "claimed there", "columns", "time")  # fmt: skip
        print(f"ε_f: {config.tuner.energy_features}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for task in setup.tasks[: given.tasks]:
            one_task(setup, task)
    else:
        accuracy(given.suite, given.accuracy, given.output)
