"""The theorems of the method as numbers: what one step does, what A is best at, and what cannot change or little."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from keeplora.math import (
    backward_bound,
    extend_basis,
    extend_basis_with_gradient,
    factor_leak,
    layer_alpha,
    lora_delta,
    project_out,
    residual_factor,
    weight_basis,
)
from tests.math.strategies import (
    COSTLY,
    PROPERTY,
    bases,
    f64,
    generator,
    inner_energies,
    matrices,
    orthonormal,
    seeds,
    shapes,
    with_spectrum,
)

# ------------------------------------------------------------------------------------------------------------ Prop 3.1


@PROPERTY
@given(st.data(), st.integers(1, 6), st.floats(1e-3, 2), st.floats(1e-3, 1), st.booleans())
def test_one_sgd_step_on_B_moves_the_weight_by_the_gradient_projected_on_A(
    data: st.DataObject, rank: int, s: float, eta: float, fresh: bool
) -> None:
    n_out, n_in = data.draw(shapes())
    U = data.draw(bases(n_in))
    rng = generator(data.draw(seeds))
    W = torch.randn(n_out, n_in, generator=rng, dtype=torch.float64)
    x = torch.randn(7, n_in, generator=rng, dtype=torch.float64)
    y = torch.randn(7, n_out, generator=rng, dtype=torch.float64)

    def loss_of(weight: Tensor) -> Tensor:
        return ((x @ weight.T).tanh() - y).square().mean()

    first = W.clone().requires_grad_()
    loss_of(first).backward()
    assert first.grad is not None
    A = residual_factor(first.grad, U, rank).to(torch.float64)
    start = torch.zeros if fresh else torch.ones
    B = nn.Parameter(start(n_out, A.shape[0], dtype=torch.float64))
    before = (W + s * B @ A).detach().requires_grad_()
    loss_of(before).backward()
    G = before.grad
    assert G is not None

    optimiser = torch.optim.SGD([B], lr=eta)
    loss_of(W + s * B @ A).backward()
    assert B.grad is not None
    assert torch.allclose(B.grad, s * G @ A.T, rtol=1e-9, atol=1e-12)
    optimiser.step()
    change = (W + s * B @ A).detach() - before.detach()
    assert torch.allclose(change, -eta * s**2 * G @ A.T @ A, rtol=1e-9, atol=1e-12)
    assert U.shape[1] == 0 or float((change @ U.double()).abs().max()) <= 1e-6 * max(1.0, float(change.norm()))


@COSTLY
@given(st.data(), st.floats(0.1, 4), st.sampled_from(["AdamW", "SGD"]))
def test_where_B_starts_changes_nothing_if_it_is_taken_off_W(data: st.DataObject, s: float, optimiser: str) -> None:
    """M5: A is frozen, so W − s B₀ A with B₀ and W with zero are one function of B − B₀, and train alike."""
    n_out, n_in = data.draw(shapes(8))
    rng = generator(data.draw(seeds))
    W = torch.randn(n_out, n_in, generator=rng, dtype=torch.float64)
    x, y = (torch.randn(16, n, generator=rng, dtype=torch.float64) for n in (n_in, n_out))
    A = residual_factor(torch.randn(n_out, n_in, generator=rng), torch.zeros(n_in, 0), 3).double()
    ends = []
    for start in (torch.zeros(n_out, len(A)).double(), torch.randn(n_out, len(A), generator=rng, dtype=torch.float64)):
        B, rest = nn.Parameter(start.clone()), W - s * start @ A
        steps = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimiser]([B], lr=0.01, weight_decay=0.0)
        for _ in range(20):
            steps.zero_grad()
            ((x @ (rest + s * B @ A).T).tanh() - y).square().mean().backward()
            steps.step()
        ends.append((rest + s * B @ A).detach())
    assert float((ends[0] - W).norm()) > 1e-4
    assert torch.allclose(ends[0], ends[1], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ Prop 3.2


def _error(G_hat: Tensor, A: Tensor) -> float:
    A = A.to(torch.float64)
    return float((G_hat - G_hat @ A.T @ A).norm())


@PROPERTY
@given(st.data(), st.integers(1, 6))
def test_A_keeps_more_of_the_residual_gradient_than_any_other_factor(data: st.DataObject, rank: int) -> None:
    shape = data.draw(shapes())
    G = data.draw(matrices(shape, spectra=("even", "random", "spread", "deficient"))).double()
    U = data.draw(bases(shape[1]))
    rng = generator(data.draw(seeds))
    A = residual_factor(G, U, rank)
    r = A.shape[0]
    G_hat = project_out(G, U.double())
    S = np.linalg.svd(f64(G_hat), compute_uv=False)
    norm = float(G.norm())
    best = _error(G_hat, A)
    assert best == pytest.approx(math.sqrt((S[r:] ** 2).sum()), abs=2e-6 * norm)  # Eckart–Young's least error
    # Rivals have orthonormal rows and A U = 0 too: random ones, and A itself turned a little.
    rest = torch.linalg.svd(torch.eye(shape[1], dtype=torch.float64) - U.double() @ U.double().T).U
    rest = rest[:, : shape[1] - U.shape[1]]
    for turn in (1e-3, 0.1, None):
        noise = torch.randn(rest.shape[1], r, generator=rng, dtype=torch.float64)
        seed = noise if turn is None else rest.T @ A.double().T + turn * noise
        rival = (rest @ torch.linalg.qr(seed).Q).T
        assert best <= _error(G_hat, rival) + 2e-6 * norm


@COSTLY
@given(st.data(), seeds, st.sampled_from([(0, 1), (0, 2), (1, 1)]))
def test_brute_force_over_three_inputs_finds_nothing_better(
    data: st.DataObject, seed: int, case: tuple[int, int]
) -> None:
    k, r = case
    rng = generator(seed)
    n_out = data.draw(st.integers(2, 4))
    G = torch.randn(n_out, 3, generator=rng, dtype=torch.float64)
    Q = orthonormal(3, 3, rng)
    U, rest = Q[:, :k].to(torch.float32), Q[:, k:]
    G_hat = project_out(G, U.double())
    if k:  # a residual plane: every direction in it
        angles = torch.linspace(0, math.pi, 721, dtype=torch.float64)
        lines = torch.stack([angles.cos(), angles.sin()], 1) @ rest.T
    else:  # every direction of the sphere: A itself, or what A of rank 2 leaves out
        grid = itertools.product(np.linspace(0, math.pi, 61), np.linspace(0, math.pi, 61))
        lines = torch.tensor([[math.sin(t) * math.cos(p), math.sin(t) * math.sin(p), math.cos(t)] for t, p in grid])
        lines = lines.double()
    held = (lines @ G_hat.T).square().sum(1)
    errors = (G_hat.square().sum() - held if r == 1 else held).clamp(min=0).sqrt()
    least = float(errors.min())
    best = _error(G_hat, residual_factor(G, U, r))
    assert best <= least + 1e-5
    assert best == pytest.approx(least, abs=0.06 * float(G.norm()))  # the grid comes close: the comparison has teeth


# --------------------------------------------------------------------------------------------------- forward stability


@COSTLY
@given(st.data(), st.floats(0.1, 4), st.floats(0, 0.5), st.sampled_from(["AdamW", "SGD"]))
def test_protected_inputs_keep_their_outputs_through_training(
    data: st.DataObject, s: float, weight_decay: float, optimiser: str
) -> None:
    n_out, n_in = data.draw(shapes(8).filter(lambda shape: shape[1] > 1))
    k = data.draw(st.integers(1, n_in - 1))
    rng = generator(data.draw(seeds))
    W = torch.randn(n_out, n_in, generator=rng)
    U = orthonormal(n_in, k, rng).to(torch.float32)
    x, y = torch.randn(16, n_in, generator=rng), torch.randn(16, n_out, generator=rng)
    first = W.clone().requires_grad_()
    (x @ first.T - y).square().mean().backward()
    assert first.grad is not None
    A = residual_factor(first.grad, U, 4)
    assert len(A) > 0
    B = nn.Parameter(torch.zeros(n_out, len(A)))
    chosen = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimiser]
    steps = chosen([B], lr=0.05, weight_decay=weight_decay)
    losses = []
    for _ in range(40):
        steps.zero_grad()
        loss = (x @ (W + s * B @ A).T - y).square().mean()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    W_new = W + lora_delta(s, B.detach(), A)
    inside = torch.randn(30, k, generator=rng) @ U.T
    size = float(W.norm() + (W_new - W).norm())
    assert float((inside @ W_new.T - inside @ W.T).abs().max()) <= 5e-6 * size * float(inside.norm(dim=1).max())
    assert float((W_new - W).norm()) > 1e-3 * s  # it did learn, and other inputs do change
    assert len(set(losses)) > 1


def test_protected_inputs_keep_their_outputs_through_a_merged_peft_adapter() -> None:
    torch.manual_seed(0)
    rng = generator(0)
    base = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 20))  # wide and tall: no square to hide behind
    W = {name: base.get_submodule(name).weight.detach().clone() for name in ("0", "2")}
    U = {name: weight_basis(weight, 0.7) for name, weight in W.items()}
    x, y = torch.randn(64, 20, generator=rng), torch.randn(64, 20, generator=rng)
    loss = (base(x) - y).square().mean()
    grads = torch.autograd.grad(loss, [base.get_submodule(name).weight for name in W])
    A = {name: residual_factor(G, U[name], 5) for name, G in zip(W, grads)}
    ranks = {name: len(factor) for name, factor in A.items()}
    alphas = {name: layer_alpha(1.0, 10, 5, rank) for name, rank in ranks.items()}
    model = get_peft_model(
        base,  # type: ignore[arg-type]
        LoraConfig(r=5, target_modules=list(W), rank_pattern=ranks, alpha_pattern=alphas),
    )
    for name in W:
        weight = model.base_model.model.get_submodule(name).lora_A["default"].weight
        weight.data.copy_(A[name])
        weight.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        new = (model(x) - y).square().mean()
        new.backward()
        optimiser.step()
    assert float(new.detach()) < 0.8 * float(loss.detach())
    merged = model.merge_and_unload()
    for name in W:
        change = merged.get_submodule(name).weight.detach() - W[name]
        assert float(change.norm()) > 0.5
        inside = torch.randn(50, U[name].shape[1], generator=rng) @ U[name].T
        assert float((inside @ change.T).abs().max()) <= 1e-5


# -------------------------------------------------------------------------------------------------- backward stability


def _harm(D: Tensor, X: Tensor) -> float:
    """Σ_x ‖D x‖², summed over the inputs themselves, not through C."""
    return float((X @ D.double().T).square().sum())


def _rounding(s: float, B: Tensor, trace: float) -> float:
    """What the fp32 rounding of U and A may add: ε_t itself is known to about 1e-7."""
    return 1e-6 * backward_bound(s, B, 0.0, trace)


@PROPERTY
@given(st.data(), inner_energies, st.integers(1, 5), st.floats(0.1, 3))
def test_later_tasks_harm_an_earlier_one_no_more_than_the_bound(
    data: st.DataObject, energy: float, rank: int, s: float
) -> None:
    n_out, n_in = data.draw(shapes())
    rng = generator(data.draw(seeds))
    budget = data.draw(st.one_of(st.none(), st.integers(1, n_in)))
    decay = torch.logspace(0, -data.draw(st.integers(0, 3)), n_in, dtype=torch.float64)
    U = weight_basis(torch.randn(n_out, n_in, generator=rng), data.draw(st.sampled_from([0.0, 0.3, 0.6])))
    past: list[tuple[Tensor, float, float]] = []  # (inputs, ε_t, tr C_t)
    updates: list[tuple[int, Tensor]] = []  # (task, ΔW)
    for task in range(3):
        A = residual_factor(torch.randn(n_out, n_in, generator=rng), U, rank)
        B = torch.randn(n_out, len(A), generator=rng)  # whatever training makes of it
        updates.append((task, lora_delta(s, B, A)))
        for X, share, trace in past:
            assert _harm(updates[-1][1], X) <= backward_bound(s, B, share, trace) + _rounding(s, B, trace)
        X = torch.randn(12, n_in, generator=rng, dtype=torch.float64) @ torch.diag(decay) @ orthonormal(n_in, n_in, rng)
        C = X.T @ X
        U, share = extend_basis(U, C, energy, max_dim=budget)
        past.append((X, share, float(C.diagonal().sum())))
    for earlier, (X, share, trace) in enumerate(past[:-1]):
        total = torch.stack([delta for task, delta in updates if task > earlier]).sum(0)
        assert _harm(total, X) <= backward_bound(1.0, total, share, trace) + _rounding(1.0, total, trace)


def test_the_bound_is_reached_by_the_worst_update() -> None:
    X = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    U, share = extend_basis(torch.zeros(3, 0), X.T @ X, 0.85)
    assert (U.shape, share) == ((3, 1), pytest.approx(0.9))
    A = residual_factor(torch.tensor([[7.0, 1.0, 0.0], [7.0, 2.0, 0.0]]), U, 1)  # learns on what was left unprotected
    B = torch.tensor([[2.0], [1.0]])
    assert _harm(lora_delta(0.5, B, A), X) == pytest.approx(backward_bound(0.5, B, share, 10.0))


# ---------------------------------------------------------------------------------------------- the whole life of U


@COSTLY
@given(st.data(), st.booleans())
def test_a_stream_of_tasks_never_leaks_into_what_any_earlier_one_protected(data: st.DataObject, memory: bool) -> None:
    n_out, n_in = data.draw(shapes(10).filter(lambda shape: shape[1] >= 3))
    rng = generator(data.draw(seeds))
    W = W0 = torch.randn(n_out, n_in, generator=rng).to(torch.bfloat16).float()
    U = weight_basis(W0, 0.4)
    protected = [(U, W0)]
    for _ in range(4):
        rank = int(torch.randint(1, 4, (1,), generator=rng))
        G = with_spectrum(n_out, n_in, torch.logspace(0, -3, min(n_out, n_in), dtype=torch.float64), rng)
        A = residual_factor(G, U, rank)
        B = torch.randn(n_out, len(A), generator=rng)
        assert factor_leak(B, A, U) <= 1e-5
        W = W + lora_delta(0.5, B, A)
        if memory:
            U, _ = extend_basis_with_gradient(U, G, 0.5)
        else:
            X = torch.randn(2, n_in, generator=rng, dtype=torch.float64)
            U, _ = extend_basis(U, X.T @ X, 0.9)
        protected.append((U, W))
    for basis, weight in protected:  # every later weight acts on a protected input as the weight of that time did
        assert float(((W - weight) @ basis).abs().max() if basis.numel() else 0.0) <= 1e-5
