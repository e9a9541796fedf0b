"""The sketched residual gradient beside the exact one: the energy that A captures, bytes and seconds, and final accuracy.

    python benchmarks/sketch.py energy               # real gradients of the demo's towers: ten minutes on one core
    python benchmarks/sketch.py cost                 # one layer of width 4096: three minutes
    python benchmarks/sketch.py accuracy --seeds 0 1 # whole runs of demo-small, exact and sketched

energy: the tasks of a suite are learned one after another (two epochs each); as each begins, G of every target is taken, and of
Ĝ = G (I − P) the share ‖Ĝ Aᵀ‖² / (the most that any A of the same rank captures), over layers, tasks and seeds of Ψ. The
ways that were tried are compared at the same number of numbers per layer: Z alone, Gaussian rows, Z and Y (Tropp et al. 2017),
and two sketches with a core (2019).
cost: per layer and in turn, what the gradient pass sums and what M4 makes of it; the bytes are those of the tensors held.
accuracy: means and paired differences over seeds, with 95 % t intervals; a run that is there is read, or gone on with.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import machine as bench
import torch
from machine import machine
from torch import Tensor, nn

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.evaluation.stats import mean_interval, paired_difference
from keeplora.experiment import Experiment, load_config
from keeplora.experiment.config import parse_overrides
from keeplora.experiment.setup import prepare
from keeplora.math import Subspace, residual_factor, sketch_matrix, sketch_rows
from keeplora.methods import method_names
from keeplora.tuner.observers import GradientObserver
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.sampling import statistics_batches
from keeplora.tuner.sketching import SketchObserver

Way = Callable[[Tensor, int, int, int], Tensor]
"""way(Ĝ, r, numbers per layer, seed): A."""


# ---- energy ----------------------------------------------------------------------------------------------------------


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def leading(X: Tensor, r: int) -> Tensor:
    """The top r right singular vectors of X as rows, by the smaller Gram matrix: what matters here is energy alone."""
    _, vectors = torch.linalg.eigh(X @ X.T)
    return torch.linalg.qr(X.T @ vectors[:, -r:]).Q.T


def ours(G: Tensor, r: int, numbers: int, seed: int) -> Tensor:
    return leading(sketch_matrix(G.shape[0], min(G.shape[0], numbers // G.shape[1]), seed).double() @ G, r)


def gaussian_rows(G: Tensor, r: int, numbers: int, seed: int) -> Tensor:
    return leading(gaussian(numbers // G.shape[1], G.shape[0], torch.Generator().manual_seed(seed)) @ G, r)


def two_sided(share: float) -> Way:
    """Y = Ĝ Ω with ``share`` of the numbers, Z = Ψ Ĝ with the rest: Q = orth(Y), Ĝ ≈ Q (Ψ Q)⁺ Z (arXiv 1609.00048)."""

    def way(G: Tensor, r: int, numbers: int, seed: int) -> Tensor:
        (m, n), rng = G.shape, torch.Generator().manual_seed(seed)
        k = max(r, round(share * numbers / m))
        Y = G @ gaussian(n, k, rng)
        Psi = gaussian((numbers - k * m) // n, m, rng)
        Q = torch.linalg.qr(Y).Q
        return leading(torch.linalg.lstsq(Psi @ Q, Psi @ G).solution, r)

    return way


def with_core(G: Tensor, r: int, numbers: int, seed: int) -> Tensor:
    """X = Υ Ĝ, Y = Ĝ Ω of k each and the core Φ Ĝ Ψᵀ of s = 2 k (arXiv 1902.08651)."""
    (m, n), rng = G.shape, torch.Generator().manual_seed(seed)
    k = int((((m + n) ** 2 + 16 * numbers) ** 0.5 - (m + n)) / 8)  # k (m + n) + (2 k)² = numbers
    P = torch.linalg.qr((gaussian(k, m, rng) @ G).T).Q
    Q = torch.linalg.qr(G @ gaussian(n, k, rng)).Q
    Phi, Psi = gaussian(2 * k, m, rng), gaussian(2 * k, n, rng)
    half = torch.linalg.lstsq(Phi @ Q, Phi @ G @ Psi.T).solution
    return leading(torch.linalg.lstsq(Psi @ P, half.T).solution.T, r) @ P.T


WAYS: dict[str, Way] = {
    "Z, orthonormal Ψ (ours)": ours, "Z, Gaussian Ψ": gaussian_rows,
    "Y and Z, a quarter on Y": two_sided(0.25), "Y and Z, half on Y": two_sided(0.5), "X, Y and a core": with_core,
}  # fmt: skip


def real_residuals(suite: str, tasks: int, epochs: int = 2) -> Iterator[tuple[str, str, Tensor, int]]:
    """(task, layer, Ĝ float64, r) as each task begins."""
    config = load_config({"suite": suite, "method": "keeplora++"}, {"seed": 0}, known_methods=method_names())
    setup = prepare(config)
    learner = setup.method.learner(setup.family.model, setup.tuner_config())
    for i, task in enumerate(setup.tasks[:tasks]):
        objective, data = setup.kind.objective(task), setup.sets[task.name].train
        training = config.training.for_task(task.name)
        given = setup.kind.statistics(objective, data, training, learner.config, 0)
        batches = statistics_batches(given["batches"], None, 0, data.labels)
        G = collect_gradients(
            learner.model, learner.targets, learner.store, batches, given["loss_fn"], given["mask_fn"]
        )
        for t in learner.targets:
            yield task.name, t.name, learner.U.subspace(t.name).project_out(G.pop(t.name)), t.r
        if i + 1 < min(tasks, len(setup.tasks)):
            with learner.task(task.name, **given) as model:
                _train(model, given["batches"], objective, float(training.learning_rate), epochs)  # type: ignore[arg-type]


def _train(model: nn.Module, batches: Any, objective: Any, rate: float, epochs: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            objective.loss(model, batch).mean().backward()
            optimizer.step()


def energy(suite: str, tasks: int, seeds: Sequence[int]) -> None:
    shares: dict[tuple[str, str], list[float]] = {}
    first, layers = next(iter(WAYS)), 0
    for _, _, G, r in real_residuals(suite, tasks):
        layers += 1
        n_out, n_in = G.shape
        best = float(torch.linalg.svdvals(G)[:r].square().sum())
        if best == 0:
            continue
        tried = [(f"l = r + {p}r rows of in", first, ours, sketch_rows(n_out, r, p * r) * n_in) for p in (1, 2, 3, 7)]
        tried += [
            (f"(r + {p}r)(in + out)", name, way, (1 + p) * r * (n_in + n_out)) for p in (1, 2, 3) for name, way in WAYS.items()
        ]  # fmt: skip
        for budget, name, way, numbers in tried:
            for seed in seeds:
                A = way(G, r, numbers, seed * 1_000_003 + layers)
                shares.setdefault((budget, name), []).append(float((G @ A.T).square().sum()) / best)
    print(f"{suite}, {layers} layers of {tasks} tasks, seeds {list(seeds)} of Ψ; {machine()}\n")
    print("| numbers per layer | way | median | 1st percentile | worst |\n| --- | --- | ---: | ---: | ---: |")
    for (budget, name), found in shares.items():
        found.sort()
        print(f"| {budget} | {name} | {median(found):.4f} | {found[len(found) // 100]:.4f} | {found[0]:.4f} |")


# ---- cost ------------------------------------------------------------------------------------------------------------


def timed(action: Callable[[], object]) -> float:
    return bench.timed(action)[0]


@dataclass
class Cost:
    """Of one layer and rank: rows l; bytes of G, Z and Ψ; seconds of a batch's pass per round, and M4's (None: not taken)."""

    rank: int
    rows: int
    G: int
    Z: int
    Psi: int
    exact: list[float]
    sketched: list[float]
    factor: tuple[float, float] | None = None


def costs(
    width: int, ranks: Sequence[int], tokens: int, repeats: Iterable[int], factor: bool = False,
    device: torch.device = bench.HOST,
) -> Iterator[Cost]:  # fmt: skip
    """The gradient pass of one linear layer, exact and sketched in turn, after a batch of each that is not counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False, device=device))
    x = torch.randn(tokens, width, device=device)
    for r in ranks:
        learner = ContinualLearner(model, KeepLoraConfig(r=r, target_modules=["0"], energy_weights=0.0))
        exact = GradientObserver(learner.targets, learner.store)
        sketched = SketchObserver(learner.targets, learner.store)
        times: dict[GradientObserver, list[float]] = {exact: [], sketched: []}
        for _ in itertools.chain((None,), repeats):  # the first allocates and draws Ψ
            for observer, found in times.items():
                model.requires_grad_(False)
                with observer:
                    found.append(timed(lambda: model(x).square().sum().backward()))
        G, Z = exact.G["0"], sketched.G["0"]
        (Psi,) = sketched._Psi.values()
        cost = Cost(
            r, len(Z), *(t.numel() * t.element_size() for t in (G, Z, Psi)), times[exact][1:], times[sketched][1:]
        )
        if factor:
            U = Subspace(torch.linalg.qr(torch.randn(width, width // 4, device=device)).Q)
            cost.factor = timed(partial(residual_factor, G, U, r)), timed(partial(residual_factor, Z, U, r))
        yield cost


def cost(width: int, ranks: Sequence[int], tokens: int, repeats: int, factor: bool) -> None:
    print(f"one linear layer {width} → {width}, {tokens} tokens a batch, medians of {repeats}; {machine()}\n")
    print(
        "| r | l | G, MiB | Z, MiB | Ψ, MiB | Z / G | (Z + Ψ) / G | pass of G, s | pass of Z, s | ratio | M4 of G, s | of Z, s |"
        f"\n|{' ---: |' * 12}"
    )
    for c in costs(width, ranks, tokens, range(repeats), factor):
        seconds = [median(c.exact), median(c.sketched)]
        M4 = [f"{s:.2f}" for s in c.factor] if c.factor else ["–", "–"]
        print(
            f"| {c.rank} | {c.rows} | {' | '.join(f'{size / 2**20:.1f}' for size in (c.G, c.Z, c.Psi))} | 1/{c.G / c.Z:.1f} | "
            f"1/{c.G / (c.Z + c.Psi):.1f} | {seconds[0]:.3f} | {seconds[1]:.3f} | "
            f"{seconds[1] / seconds[0]:.2f} | {' | '.join(M4)} |", flush=True,
        )  # fmt: skip


# ---- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(suite: str, seeds: Sequence[int], output: Path, overrides: Sequence[str]) -> None:
    changes = parse_overrides(overrides)
    found: dict[str, list[dict[str, float]]] = {"exact": [], "sketch": []}
    for seed in seeds:
        for mode, rows in found.items():
            path = output / f"{mode}-seed{seed}"
            given = {**changes, "tuner": {**changes.get("tuner", {}), "residual_gradient": mode}}
            values = {"suite": suite, "method": "keeplora++"}
            config = load_config(values, {**given, "seed": seed, "output": str(path)}, known_methods=method_names())
            there = (path / "config.yaml").is_file()
            results = Experiment.resume(path, quiet=True) if there else Experiment(config, quiet=True).run()
            scores = [*results["accuracy"][-1], *results["probe_accuracy"][-1]]
            last = dict(zip([*results["tasks"], *results["probes"]], scores, strict=True))
            groups = {"mean of the tasks": results["tasks"], "mean of the probes": results["probes"]}
            rows.append({group: fmean(last[name] for name in names) for group, names in groups.items() if names})
            print(f"seed {seed}, {mode}: {rows[-1]}", flush=True)
    print(f"\n{suite}, seeds {list(seeds)}, accuracy after the last task in percent; {machine()}\n")
    print("| | exact | sketch | sketch − exact, paired |\n| --- | ---: | ---: | ---: |")
    for name in found["exact"][0]:
        one, other = ([row[name] for row in rows] for rows in found.values())
        cells = [mean_interval(one), mean_interval(other), paired_difference(other, one)]
        print(f"| {name} | {' | '.join(_interval(cell) for cell in cells)} |")


def _interval(found: Any) -> str:
    if found["low"] is None:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["energy", "cost", "accuracy"])
    parser.add_argument("--suite", default="demo-small")
    parser.add_argument("--tasks", type=int, default=5, help="energy: how many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--factor", action=argparse.BooleanOptionalAction, default=True, help="cost: M4 as well, once")
    parser.add_argument("--output", type=Path, default=Path("runs/sketch"))
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="a setting, as for keeplora run")
    given = parser.parse_args(arguments)
    if given.what == "energy":
        energy(given.suite, given.tasks, given.seeds)
    elif given.what == "cost":
        cost(given.width, given.ranks, given.tokens, given.repeats, given.factor)
    else:
        accuracy(given.suite, given.seeds, given.output, given.overrides)


if __name__ == "__main__":
    main()
