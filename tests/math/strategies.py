"""Random matrices, subspaces and energies for the property tests of the math."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

EPS32 = float(np.finfo(np.float32).eps)
SLACK = 1e-6
"""Relative slack of every energy comparison (M1)."""

# hypothesis loads its own "ci" profile (derandomised) wherever the environment says CI; these two inherit it.
PROPERTY = settings(deadline=None, max_examples=60)
COSTLY = settings(deadline=None, max_examples=25)

SPECTRA = ("even", "random", "spread", "deficient", "zero")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
energies = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.85, 0.99, 1.0]), st.floats(1e-6, 1.0))
inner_energies = st.one_of(st.sampled_from([0.2, 0.5, 0.85, 0.99]), st.floats(0.01, 0.9999))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(n: int, k: int, rng: torch.Generator) -> Tensor:
    """(n, k) float64 with orthonormal columns."""
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q[:, :k].contiguous()


def with_spectrum(n_out: int, n_in: int, values: Tensor, rng: torch.Generator) -> Tensor:
    """(out, in) float64 with these singular values and random singular vectors."""
    p = len(values)
    return orthonormal(n_out, p, rng) @ torch.diag(values) @ orthonormal(n_in, p, rng).T


def spectrum(kind: str, p: int, rng: torch.Generator) -> Tensor:
    """p singular values of the kind, float64."""
    if kind == "even":
        return torch.ones(p, dtype=torch.float64)
    if kind == "spread":
        return torch.logspace(0, -4, p, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros(p, dtype=torch.float64)
    values = torch.rand(p, generator=rng, dtype=torch.float64) + 0.1
    if kind == "deficient":
        values[int(torch.randint(0, p, (1,), generator=rng)) :] = 0
    return values


@st.composite
def shapes(draw: st.DrawFn, most: int = 9) -> tuple[int, int]:
    """(out, in): square, wide and tall, one-dimensional sides included."""
    kind = draw(st.sampled_from(["square", "wide", "tall"]))
    short = draw(st.integers(1, most - 1))
    long = draw(st.integers(short + 1, most))
    return {"square": (long, long), "wide": (short, long), "tall": (long, short)}[kind]


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int] | None = None, spectra: tuple[str, ...] = SPECTRA) -> Tensor:
    """A weight or gradient of any shape, dtype, scale and kind of spectrum."""
    n_out, n_in = shape or draw(shapes())
    rng = generator(draw(seeds))
    values = spectrum(draw(st.sampled_from(spectra)), min(n_out, n_in), rng)
    scale = draw(st.sampled_from([1.0, 1.0, 1e-12, 1e8]))
    return (scale * with_spectrum(n_out, n_in, values, rng)).to(draw(dtypes))


@st.composite
def bases(draw: st.DrawFn, n: int) -> Tensor:
    """U (n, k) float32: empty, full and anything between."""
    k = draw(st.one_of(st.sampled_from([0, n]), st.integers(0, n)))
    return orthonormal(n, k, generator(draw(seeds))).to(torch.float32)


@st.composite
def covariances(draw: st.DrawFn, n: int) -> Tensor:
    """C = Σ x xᵀ (n, n) float64 of a few or many samples, full or deficient in rank, any scale."""
    rng = generator(draw(seeds))
    samples = draw(st.integers(1, 3 * n))
    X = torch.randn(samples, n, generator=rng, dtype=torch.float64)
    X = X @ torch.diag(spectrum(draw(st.sampled_from(["even", "random", "deficient"])), n, rng))
    return draw(st.sampled_from([1.0, 2.0**-40, 1e9])) * (X.T @ X)


def f64(M: Tensor) -> np.ndarray:
    return M.detach().to(torch.float64).numpy()


def gram_error(U: Tensor) -> float:
    """max |UᵀU − I| by numpy, independently of the library's own measure."""
    u = f64(U)
    return float(np.abs(u.T @ u - np.eye(u.shape[1])).max()) if u.shape[1] else 0.0


def signs_are_fixed(columns: Tensor) -> bool:
    """Each column's entry of largest magnitude is positive; of several that fp32 cannot tell apart, one of them."""
    return all(float(c[c.abs() >= c.abs().max() * (1 - 1e-6)].max()) > 0 for c in columns.T)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )
