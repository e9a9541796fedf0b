"""Weights from part of their singular components: the ends are exact, the middle is the best approximation there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.analysis.spectrum import Spectrum, captured

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def weight(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, shape[1])
    return (torch.randn(shape, generator=generator) * scales).to(dtype)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["energy", "sum"]))
def test_everything_kept_and_nothing_dropped_is_the_weight_itself(shape, seed, dtype, by):
    W = weight(shape, seed, dtype)
    S = Spectrum.of(W)
    assert torch.equal(S.leading(W, S.rank_for(1.0, by)), W)
    assert torch.equal(S.trailing(W, 1.0)[1], W)
    assert not S.leading(W, S.rank_for(0.0, by)).any()
    assert not S.trailing(W, 0.0)[1].any()


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.floats(0, 1), st.sampled_from(["energy", "sum"]))
def test_a_share_is_reached_by_the_fewest_components(shape, seed, share, by):
    S = Spectrum.of(weight(shape, seed))
    k = S.rank_for(share, by)
    parts = S.sigma.square() if by == "energy" else S.sigma
    total = float(parts.sum())
    assert float(parts[:k].sum()) >= share * total * (1 - 1e-5)
    if 0 < share < 1 and k > 0:
        assert float(parts[: k - 1].sum()) < share * total
    assert S.energy(k) == pytest.approx(float(S.sigma[:k].square().sum() / S.sigma.square().sum()))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.integers(0, 24))
def test_the_two_halves_add_up_and_the_leading_one_is_the_svd(shape, seed, k):
    W = weight(shape, seed)
    S = Spectrum.of(W)
    k = min(k, len(S))
    low, (left, rest) = S.leading(W, k), S.trailing(W, 1.0 - S.energy(k))
    assert left >= len(S) - k  # components of no energy may stay or go
    assert torch.allclose(low + rest, W, atol=1e-5)
    L, sigma, Rt = torch.linalg.svd(W.double(), full_matrices=False)
    assert torch.allclose(low.double(), (L[:, :k] * sigma[:k]) @ Rt[:k], atol=1e-4)
    assert float(rest.double().square().sum()) == pytest.approx(float(sigma[k:].square().sum()), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.floats(1e-3, 1.0))
def test_both_ends_hold_as_much(shape, seed, share):
    """In every layer exactly, however coarse its spectrum is: else what is compared is how much is kept, and not what."""
    W = weight(shape, seed)
    S = Spectrum.of(W)
    k = S.rank_for(share)
    left, rest = S.trailing(W, S.energy(k))
    held = float(rest.double().square().sum() / W.double().square().sum())
    assert held == pytest.approx(S.energy(k), abs=1e-4)
    # Of the right vectors the last ones alone are there, the first of them in part.
    inside = (rest.double() @ S.V.double()).square().sum(0)
    assert float(inside[: len(S) - left].sum()) <= 1e-9 * float(W.double().square().sum()) + 1e-12


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_energies_rise_with_the_rank(values):
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    shares = captured(sigma, [1, 2, 4, 8, 16, 32])
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Spectrum.of(torch.eye(2)).rank_for(share)


def test_another_measure_is_refused():
    with pytest.raises(ValueError, match="energy, sum"):
        Spectrum.of(torch.eye(2)).rank_for(0.5, "max")
