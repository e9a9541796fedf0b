"""A randomised sketch of the gradient: Z = Ψ G, a few random mixtures of G's rows in place of all of them.

Ψ of shape (l, out) has random orthonormal rows times √(out/l), so that E[ΨᵀΨ] = I and ZᵀZ is an unbiased estimate of GᵀG,
whose eigenvectors M4 asks for. What A is taken from, with `residual_factor`, is Z as if it were G:

- It is linear in G, so sketches of batches, micro-batches and ranks add up, and a batch's is (Ψ gᵀ) x of the output gradients
  g (T, out) and inputs x (T, in): no matrix of G's size is ever formed.
- Ψ and the projection act on different sides: (Ψ G)(I − P) = Ψ (G (I − P)) = Ψ Ĝ exactly (M3). The sum is projected once, in
  float64, and the inputs need not be; what the sketch is accurate to is Ĝ, however small it is beside G.
- ‖Z‖_F² is an unbiased estimate of ‖G‖_F², and the tolerance of M4 that is relative to ‖G‖₂ is taken from ‖Z‖₂.
- If rank Ĝ ≤ l, Z (I − P) has the row space of Ĝ with probability one, so that where r' reaches the rank nothing is lost.

This is the range finder of Halko, Martinsson & Tropp (SIAM Review 2011, arXiv 0909.4061) for the row space, with l = r + p
rows, p the oversampling; ZᵀZ as the estimate of the Gram matrix is the Johnson–Lindenstrauss step of Woodruff (2014,
arXiv 1411.4357). A second sketch of the columns, Y = Ĝ Ω (Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1609.00048), or a
second and a core (the same, 2019, arXiv 1902.08651), rebuilds G itself. For the leading right singular vectors alone, rows
spent on Z captured more than rows shared with Y at the same number of numbers, and Y would need (I − P) Ω beside it in
every layer (benchmarks/sketch.py compares them).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sketch_rows(n_out: int, rank: int, oversampling: int | None = None) -> int:
    """l = min(out, r + p), p = 3 r where ``oversampling`` is None.

    >>> sketch_rows(768, 16), sketch_rows(768, 16, 8), sketch_rows(40, 16)
    (64, 24, 40)
    """
    return min(n_out, rank + (3 * rank if oversampling is None else oversampling))


def sketch_matrix(n_out: int, rows: int, seed: int) -> Tensor:
    """Ψ (rows, out) float32 with Ψ Ψᵀ = (out/rows) I; for ``rows`` = out the identity, so that Z = G.

    Args:
        n_out: rows of G. rows: l, from 1 to ``n_out``. seed: fixes Ψ, which is made on the CPU whatever device it is used on.

    Orthonormal rows, not independent Gaussian ones: at l = out/3 their estimate varies by a third less.

    >>> Psi = sketch_matrix(6, 2, seed=0)
    >>> torch.allclose(Psi @ Psi.T, 3 * torch.eye(2), atol=1e-6)
    True
    """
    if not 1 <= rows <= n_out:
        raise ValueError(f"a sketch of {n_out} rows has 1 to {n_out} rows, got {rows}")
    if rows == n_out:
        return torch.eye(n_out)
    normal = torch.randn(n_out, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (math.sqrt(n_out / rows) * torch.linalg.qr(normal).Q.T).to(torch.float32).contiguous()


def sketch(Psi: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """Ψ G of what G = gᵀ x is the sum of, without forming G: (l, in).

    Args:
        Psi: (l, out). g: (T, out), gradients of a layer's outputs. x: (T, in), its inputs.

    >>> Psi, g, x = sketch_matrix(5, 3, seed=0), torch.randn(7, 5), torch.randn(7, 4)
    >>> torch.allclose(sketch(Psi, g, x), Psi @ (g.T @ x), atol=1e-5)
    True
    """
    return (Psi @ g.T) @ x
