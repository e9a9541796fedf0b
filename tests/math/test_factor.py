"""M4 and the layer's alpha: A stays in the residual space, and PEFT scales as s says."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from keeplora.math import factor, layer_alpha, lora_delta, residual_factor
from tests.math.strategies import (
    COSTLY,
    DTYPES,
    EPS32,
    PROPERTY,
    bases,
    dtypes,
    f64,
    generator,
    gram_error,
    matrices,
    orthonormal,
    same_bits,
    seeds,
    shapes,
    signs_are_fixed,
    with_spectrum,
)

# ---------------------------------------------------------------------------------------------------------------- M4


@PROPERTY
@given(st.data(), st.integers(1, 12))
def test_residual_factor(data: st.DataObject, rank: int) -> None:
    shape = n_out, n_in = data.draw(shapes())
    G, U = data.draw(matrices(shape)), data.draw(bases(n_in))
    A = residual_factor(G, U, rank)
    g, u = f64(G), f64(U)
    S = np.linalg.svd(g - g @ u @ u.T, compute_uv=False)
    numerical_rank = int((max(shape) * EPS32 * np.linalg.norm(g, 2) < S).sum())
    assert A.shape == (min(rank, n_out, n_in - U.shape[1], numerical_rank), n_in)
    assert A.dtype == torch.float32
    assert gram_error(A.T) <= 1e-6
    assert A.numel() == 0 or U.numel() == 0 or float((A.double() @ U.double()).abs().max()) <= 1e-6
    gains = np.linalg.norm(g @ f64(A).T, axis=0)  # rows come in order of what they hold of G
    assert all(a >= b * (1 - 1e-5) - 1e-6 * S[0] for a, b in itertools.pairwise(gains))


@PROPERTY
@given(st.data(), st.sampled_from([1.0, 1e-3, 1e-5, 1e-9, 1e-12, 0.0]), st.sampled_from([1.0, 1e-20, 1e20]))
def test_a_planted_residual_is_found_down_to_noise_which_is_measured_against_G(
    data: st.DataObject, residual: float, scale: float
) -> None:
    n_in = data.draw(st.integers(2, 12))
    k = data.draw(st.integers(1, n_in - 1))
    n_out = data.draw(st.integers(1, 12))
    planted = data.draw(st.integers(1, min(n_out, n_in - k)))
    rank = data.draw(st.integers(1, 12))
    rng = generator(data.draw(seeds))
    Q = orthonormal(n_in, n_in, rng)
    U, rest = Q[:, :k], Q[:, k : k + planted]
    inside = with_spectrum(n_out, k, torch.ones(min(n_out, k), dtype=torch.float64), rng)
    outside = with_spectrum(n_out, planted, torch.linspace(1, 2, planted, dtype=torch.float64), rng)
    G = scale * (inside @ U.T + residual * outside @ rest.T)

    A = residual_factor(G, U.to(torch.float32), rank)
    # 1e-9 of G is rounding noise in fp32 although Ĝ alone, seen against itself, has a clear rank.
    assert A.shape[0] == (min(rank, planted) if residual >= 1e-5 else 0)
    assert gram_error(A.T) <= 1e-6
    if len(A):
        assert float((A.double() @ U).abs().max()) <= 1.1e-6
        outside_rest = A.double() - A.double() @ rest @ rest.T
        assert float(outside_rest.abs().max()) <= 1e-6 + 1e-6 / residual  # U's rounding over the residual's size


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_overlap_stays_small_on_a_wide_layer_with_a_near_empty_residual(dtype: torch.dtype) -> None:
    rng = generator(11)
    Q = orthonormal(160, 160, rng)
    U, rest = Q[:, :120], Q[:, 120:]
    G = torch.randn(48, 120, generator=rng, dtype=torch.float64) @ U.T
    G = G + 1e-4 * torch.randn(48, 40, generator=rng, dtype=torch.float64) @ rest.T
    A = residual_factor(G.to(dtype), U.to(torch.float32), 16)
    assert A.shape == (16, 160)
    assert gram_error(A.T) <= 1e-6
    assert float((A.double() @ U).abs().max()) <= 1.1e-6


@PROPERTY
@given(shapes(), seeds, st.integers(1, 9))
def test_nothing_left_means_rank_zero_not_a_direction_of_noise(shape: tuple[int, int], seed: int, rank: int) -> None:
    n_out, n_in = shape
    rng = generator(seed)
    Q = orthonormal(n_in, n_in, rng).to(torch.float32)
    G = torch.randn(shape, generator=rng)
    assert residual_factor(G, Q, rank).shape == (0, n_in)  # everything protected
    assert residual_factor(torch.zeros(shape), Q[:, :0], rank).shape == (0, n_in)  # no gradient
    k = max(1, n_in // 2)
    inside = torch.randn(n_out, k, generator=rng).double() @ Q[:, :k].double().T
    assert residual_factor(inside, Q[:, :k], rank).shape == (0, n_in)  # a gradient that only touches protected inputs


def test_a_full_basis_leaves_nothing_although_it_is_orthonormal_only_to_its_tolerance() -> None:
    U = torch.eye(3) * (1 - 4e-6)  # ‖UᵀU − I‖ = 8e-6 is allowed; I − U Uᵀ is then more than rounding noise
    assert residual_factor(torch.eye(3), U, 2).shape == (0, 3)


@PROPERTY
@given(st.data(), st.integers(1, 9))
def test_residual_factor_is_deterministic_with_a_fixed_sign(data: st.DataObject, rank: int) -> None:
    shape = data.draw(shapes())
    G, U = data.draw(matrices(shape)), data.draw(bases(shape[1]))
    G_before, U_before = G.clone(), U.clone()
    A = residual_factor(G, U, rank)
    assert same_bits(A, residual_factor(G.clone(), U.clone(), rank))
    assert torch.equal(G, G_before)
    assert same_bits(U, U_before)
    assert signs_are_fixed(A.T)


def test_bf16_and_fp32_twins_give_the_same_factor_and_no_graph_is_kept() -> None:
    G = torch.randn(5, 7, generator=generator(2)).to(torch.bfloat16)
    U = orthonormal(7, 3, generator(3)).to(torch.float32)
    A = residual_factor(nn.Parameter(G), U, 3)
    assert same_bits(A, residual_factor(G.float(), U, 3))
    assert not A.requires_grad


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        residual_factor(torch.eye(2), torch.zeros(2, 0), rank)


@given(dtypes, st.sampled_from([math.nan, math.inf]))
def test_a_bad_gradient_is_refused(dtype: torch.dtype, value: float) -> None:
    G = torch.zeros(2, 3, dtype=dtype)
    G[1, 1] = value
    with pytest.raises(ValueError, match="G holds NaN or infinity"):
        residual_factor(G, torch.zeros(3, 0), 1)
    with pytest.raises(ValueError, match=r"G must be a matrix, got shape \(3,\)"):
        residual_factor(torch.zeros(3), torch.zeros(3, 0), 1)
    with pytest.raises(ValueError, match="G has 3 input dimensions but U has 2"):
        residual_factor(torch.zeros(2, 3), torch.zeros(2, 0), 1)


def test_a_basis_that_is_not_orthonormal_is_caught_by_the_assertion() -> None:
    U = torch.tensor([[1.0], [1.0], [0.0]])  # length sqrt(2): I − U Uᵀ reflects and projects nothing out
    with pytest.raises(ArithmeticError, match=r"the basis is not orthonormal: its QR's R is 4\.1"):
        residual_factor(torch.tensor([[1.0, 1.0, 0.0]]), U, 1)


# ------------------------------------------------------------------------------------------------- layer alpha in PEFT


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 3, bias=False)
        self.tall = nn.Linear(3, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(self.wide(x))


@COSTLY
@given(
    st.integers(1, 8), st.floats(0.1, 64), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 3), st.integers(1, 3)
)
def test_a_peft_layer_with_a_shrunk_rank_scales_by_the_configured_one(
    r: int, lora_alpha: float, scale_wide: float, scale_tall: float, r_wide: int, r_tall: int
) -> None:
    r = max(r, r_wide, r_tall)
    config = LoraConfig(
        r=r,
        lora_alpha=1,
        target_modules=["wide", "tall"],
        rank_pattern={"wide": r_wide, "tall": r_tall},
        alpha_pattern={
            "wide": layer_alpha(scale_wide, lora_alpha, r, r_wide),
            "tall": layer_alpha(scale_tall, lora_alpha, r, r_tall),
        },
    )
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers(), config)  # type: ignore[arg-type]
    for name, layer_scale, rank in (("wide", scale_wide, r_wide), ("tall", scale_tall, r_tall)):
        layer = getattr(model.base_model.model, name)
        s = layer_scale * lora_alpha / r
        assert layer.scaling["default"] == pytest.approx(s)
        A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        assert A.shape[0] == rank
        B.normal_()
        expected = layer.base_layer.weight.data + lora_delta(s, B, A)
        x = torch.randn(4, A.shape[1])
        assert torch.allclose(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_layer_alpha_and_delta_by_hand() -> None:
    assert layer_alpha(1.0, 16, 16, 16) == 16
    assert layer_alpha(0.2, 32, 16, 4) == pytest.approx(1.6)
    delta = lora_delta(0.5, torch.tensor([[2.0], [4.0]]).bfloat16(), torch.tensor([[1.0, 0.0, 3.0]]).bfloat16())
    assert torch.equal(delta, torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 6.0]]))
    assert delta.dtype == torch.float32


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(factor, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
