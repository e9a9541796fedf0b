"""The task boundary's linear algebra, each way beside the other: pairs in turn in one process, medians of the ratio.

    python benchmarks/task_boundary.py            # widths 384, 768 and 4 : 1; two minutes on one core
    python benchmarks/task_boundary.py --repeat 9

- M1 and M4: singular vectors by the smaller Gram matrix (`right_vectors`) over an SVD, and how far apart the subspaces are;
- U₀ from the cache (hash of the weight, reading, checking) over decomposing it;
- M8 of q, k and v with one C and one U: once over three times;
- layers side by side (`over_layers`) over one after another: wall time, on as many threads as torch has;
- C of a wide layer (3072) in 384 rows over C itself: accumulating and M8, bytes, and the ε_t that is claimed beside the true one.

CPU seconds of the process, except where wall time is said. Random weights and inputs with a falling spectrum.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from machine import machine
from torch import Tensor

from keeplora.math import (
    FrequentDirections,
    Subspace,
    explained_share,
    new_directions,
    new_sketched_directions,
    weight_basis,
)
from keeplora.math.subspace import right_vectors
from keeplora.tuner.basis_cache import weight_subspace
from keeplora.tuner.layerwise import over_layers


def falling(n_out: int, n_in: int, decay: float = 2.0) -> Tensor:
    return torch.randn(n_out, n_in, dtype=torch.float64) * torch.logspace(0, -decay, n_in, dtype=torch.float64)


def pair(
    one: Callable[[], object], other: Callable[[], object], repeat: int, clock: Callable[[], float] = time.process_time
) -> str:
    """Median of ``one`` over ``other`` (least to most), and the median seconds of both."""
    ratios, seconds = [], []
    for _ in range(repeat):
        took = []
        for action in (one, other):
            started = clock()
            action()
            took.append(clock() - started)
        seconds.append(took)
        ratios.append(took[0] / took[1])
    a, b = (median(t[i] for t in seconds) for i in (0, 1))
    return f"{median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f}) | {a:.3f} / {b:.3f}"


def singular_vectors(repeat: int) -> None:
    for shape in ((384, 384), (768, 768), (3072, 768), (768, 3072)):
        M = falling(*shape)
        k = min(shape) // 3
        V, R = right_vectors(M)[1][:, :k], torch.linalg.svd(M, full_matrices=False).Vh[:k].T
        V = torch.linalg.qr(V).Q
        apart = float(torch.linalg.matrix_norm(R - V @ (V.T @ R), 2))
        found = pair(lambda M=M: right_vectors(M), lambda M=M: torch.linalg.svd(M, full_matrices=False), repeat)
        print(f"| singular vectors {shape[0]} × {shape[1]}, Gram / SVD (sine {apart:.0e}) | {found} |", flush=True)


def cached(repeat: int) -> None:
    for n in (384, 768):
        W = falling(n, n).float()
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"KEEPLORA_CACHE": folder, "KEEPLORA_NO_CACHE": "0"}
            weight_subspace(W, 0.85)
            found = pair(lambda W=W: weight_subspace(W, 0.85), lambda W=W: weight_basis(W, 0.85), repeat)
        print(f"| U₀ of {n} × {n}, cached / computed | {found} |", flush=True)


def shared(repeat: int) -> None:
    x = falling(2000, 768)
    C, S = x.T @ x, Subspace(torch.zeros(768, 0))
    found = pair(
        lambda: new_directions(S, C, 0.99), lambda: [new_directions(S, C, 0.99) for _ in range(3)], max(1, repeat // 2)
    )
    print(f"| M8 of q, k, v with one C and one U, once / three times | {found} |", flush=True)


def side_by_side(repeat: int) -> None:
    layers = [falling(600, 384) for _ in range(12)]
    S = Subspace(torch.zeros(384, 0))

    def work(x: Tensor) -> Tensor:
        return new_directions(S, x.T @ x, 0.99)[0]

    def one_by_one(threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for x in layers:
            work(x)
        torch.set_num_threads(before)

    threads = torch.get_num_threads()
    for n in sorted({1, threads}):
        found = pair(lambda: over_layers(work, layers), lambda n=n: one_by_one(n), repeat, time.perf_counter)
        print(
            f"| twelve layers of 384 on {threads} cores / one by one with {n} threads each, wall time | {found} |",
            flush=True,
        )


def sketched(repeat: int, n: int = 3072, rank: int = 384) -> None:
    batches = [falling(788, n).float() for _ in range(4)]  # four pictures of 197 positions a batch
    U = weight_basis(falling(n, n), 0.85)
    S = Subspace.of(U)

    def whole() -> tuple[Tensor, float]:
        C = torch.zeros(n, n, dtype=torch.float64)
        for x in batches:
            C += x.T @ x
        return new_directions(S, C, 0.99)

    def few() -> tuple[Tensor, float]:
        fd = FrequentDirections(rank, n)
        for x in batches:
            fd.add(x)
        return new_sketched_directions(S, fd.sketch(), 0.99)

    print(
        f"| C of width {n} in {rank} rows / itself, sums and M8 | {pair(few, whole, max(1, repeat // 3))} |", flush=True
    )
    C = sum((x.double().T @ x.double() for x in batches), torch.zeros(n, n, dtype=torch.float64))
    (V, claimed), (W, exact) = few(), whole()
    true = explained_share(torch.cat([S.basis(), V], dim=1), C)
    print(
        f"\nWidth {n}: {2 * rank * n * 8 / 2**20:.0f} MiB in place of {n * n * 8 / 2**20:.0f}; ε_t claimed {claimed:.4f}, true "
        f"{true:.4f}, with C {exact:.4f}; columns {V.shape[1]} and {W.shape[1]}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    torch.manual_seed(0)
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    print(f"{machine()}, {load}\n")
    print("| what | ratio, median (least – most) | seconds |\n| --- | --- | --- |")
    side_by_side(repeat)
    torch.set_num_threads(1)
    for measure in (singular_vectors, cached, shared, sketched):
        measure(repeat)
