"""What the protected subspaces take, by their columns and by their smaller side, and what working with either side takes.

    python benchmarks/basis_bytes.py            # a tiny stream of tasks, and widths 768 and 3072: two minutes on one core
    python benchmarks/basis_bytes.py --no-wide  # without 3072: seconds

Bytes are those of the tensors that are held. Seconds are CPU time, the best of three (of one at width 3072), for the steps of a
task at one layer: A from the gradient (M4), what the features add (M8), and the subspace that follows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.math import Subspace, complement, new_directions, residual_factor

SHARES = (0.25, 0.5, 0.75, 0.9, 0.97)
VIT = {768: 60, 3072: 12}
"""Targets of a ViT-B tower by width: q, k, v, o and the first MLP linear read 768, the second 3072, in 12 blocks."""


def orthonormal(n: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(0))).Q


def best(action: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found)


def steps(S: Subspace, times: int) -> list[float]:
    n = S.n_in
    generator = torch.Generator().manual_seed(1)
    G, x = torch.randn(n, n, generator=generator), torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, n, dtype=torch.float64)
    C = x.T @ x
    V, _ = new_directions(S, C, 0.99)
    return [
        best(lambda: residual_factor(G, S, 16), times),
        best(lambda: new_directions(S, C, 0.99), times),
        best(lambda: S.extended(V), times),
    ]


def widths(wide: bool) -> None:
    print("\nheld for one target, MiB, and seconds for M4, M8 and the subspace that follows\n")
    timed = " | ".join(f"{step} columns | {step} smaller" for step in ("M4", "M8", "next"))
    print(f"| width | k / width | columns | smaller side | {timed} |\n|{' ---: |' * 10}")
    total = dict.fromkeys(SHARES, (0, 0))
    for n, count in VIT.items():
        for share in SHARES:
            k = round(share * n)
            U = orthonormal(n, k)
            by_columns, smaller = Subspace(U), Subspace.of(U)
            total[share] = (total[share][0] + count * by_columns.bytes, total[share][1] + count * smaller.bytes)
            cells = ["–"] * 6
            if n == 768 or (wide and share == 0.9):
                a, b = steps(by_columns, 3 if n == 768 else 1), steps(smaller, 3 if n == 768 else 1)
                cells = [f"{value:.2f}" for pair in zip(a, b, strict=True) for value in pair]
            sizes = [f"{S.bytes / 2**20:.2f}" for S in (by_columns, smaller)]
            print(f"| {n} | {share:.0%} | {' | '.join(sizes)} | {' | '.join(cells)} |", flush=True)
    print(
        "\nheld for a ViT-B tower (72 targets), MiB\n\n| k / width | columns | smaller side |\n| ---: | ---: | ---: |"
    )
    for share, (columns, smaller) in total.items():
        print(f"| {share:.0%} | {columns / 2**20:.1f} | {smaller / 2**20:.1f} |")


def stream(tasks: int = 6) -> None:
    """A learner of two small blocks whose layers fill up."""
    width = 64
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(
            torch.nn.Sequential(torch.nn.Linear(width, 96), torch.nn.Tanh(), torch.nn.Linear(96, width))
            for _ in range(2)
        )
    )
    config = KeepLoraConfig(r=2, target_modules=["0.0", "0.2", "1.0", "1.2"], energy_weights=0.3, energy_features=0.999)
    learner = ContinualLearner(model, config)
    print("a stream of tasks, bytes after each\n")
    print("| after | columns | smaller side | dimensions used |\n| --- | ---: | ---: | ---: |")
    for task in range(tasks + 1):
        if task:
            x = torch.randn(10, width)
            with learner.task(f"task {task}", [x], lambda m, x: m(x).square().mean()) as peft_model:
                optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
                peft_model(x).square().mean().backward()
                optimizer.step()
        sizes, dims = learner.U.start_dims(), learner.U.dims()
        columns = sum(4 * n * dims[name] for name, (n, _) in sizes.items())
        used = f"{sum(dims.values())} of {sum(n for n, _ in sizes.values())}"
        print(f"| {f'task {task}' if task else 'the start'} | {columns} | {learner.U.bytes} | {used} |")


def lossless() -> None:
    """The largest difference between projecting by the one and by the other."""
    worst = 0.0
    for share in SHARES:
        U = orthonormal(768, round(share * 768))
        X = torch.randn(64, 768, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        X = X / X.norm(dim=1, keepdim=True)
        worst = max(
            worst, float((Subspace(U).project_out(X) - Subspace(complement(U), True).project_out(X)).norm(dim=1).max())
        )
    print(f"\nprojections of unit vectors, width 768: at most {worst:.1e} apart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wide", action=argparse.BooleanOptionalAction, default=True, help="time width 3072 as well")
    stream()
    widths(parser.parse_args().wide)
    lossless()
