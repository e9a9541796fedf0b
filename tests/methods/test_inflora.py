"""InfLoRA: A holds the new task's leading input directions outside the old space; the old space grows by DualGPM's rule."""

from __future__ import annotations

import math
import re

import pytest
import torch

from keeplora.errors import CapacityError, ConfigError, KeepLoraError
from keeplora.math import Subspace, complement, project_out
from keeplora.methods import get_method
from keeplora.methods.inflora import InfLoraOptions, interference_free_factor
from keeplora.tuner.basis import Bases
from keeplora.tuner.passes import collect_features
from tests.methods.lifecycle import check_lifecycle, learn, make_learner, train
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net

# A first task of the tiny data then leaves room for a second.
OPTIONS = {"eps_start": 0.7, "eps_end": 0.9, "tasks": 4}


def inflora(net, **options):
    return make_learner("inflora", net, TARGETS, energy_features=0.33, options={**OPTIONS, **options})


def basis(n, k, seed=0):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def covariance(n, seed=0):
    X = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X * torch.logspace(0, -1, n, dtype=torch.float64)
    return X, X.T @ X


@pytest.mark.parametrize("k", [0, 2, 5, 6, 7, 10])
def test_A_is_the_leading_part_of_the_projected_covariance(k):
    n, r = 12, 2
    X, C = covariance(n)
    U = basis(n, k, seed=3)
    A = interference_free_factor(C, U.float(), r)
    _, _, Vt = torch.linalg.svd(project_out(X, U), full_matrices=False)  # from the data, not from C
    wanted = Vt[:r].T @ Vt[:r]
    assert A.shape == (r, n)
    assert torch.allclose((3 * A.T @ A).double(), wanted, atol=1e-5)
    for i in range(r):  # row by row, in order
        assert abs(float(math.sqrt(3) * A[i].double() @ Vt[i])) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(A @ A.T, torch.eye(r) / 3, atol=1e-6)
    if k:
        assert float((A @ U.float()).abs().max()) < 1e-6


@pytest.mark.parametrize("k", [3, 9])
def test_out_of_one_is_into_the_other(k):
    X, _ = covariance(12, seed=1)
    U = basis(12, k)
    _, C = covariance(12, seed=1)
    by_columns, by_complement = Subspace(U.float()), Subspace(complement(U), True)
    A, other = (interference_free_factor(C, S, 2) for S in (by_columns, by_complement))
    assert torch.allclose(A.abs(), other.abs(), atol=1e-6)
    assert torch.allclose(by_complement.project_out(X), project_out(X, U), atol=1e-5)


def test_rank_ends_with_the_room_and_with_the_data():
    _, C = covariance(8)
    assert interference_free_factor(C, basis(8, 7).float(), 4).shape == (1, 8)
    assert interference_free_factor(C, torch.eye(8), 4).shape == (0, 8)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert interference_free_factor(x @ x.T, torch.zeros(8, 0), 4).shape == (2, 8)


def test_A_in_the_model_comes_from_the_tasks_own_inputs():
    net = make_net()
    learner = learn(inflora(net), "one", seed=1)
    assert any(0 < U.shape[1] for U in learner.U.values())
    batches = loader(seed=2)
    C = collect_features(net, learner.targets, learner.store, batches, loss_fn)
    model = learner.start_task("two", batches, loss_fn)
    A0 = {}
    for t in learner.targets:
        layer = net.get_submodule(t.name)
        A0[t.name] = layer.lora_A["default"].weight.detach().clone()
        U = learner.U[t.name].double()
        left = project_out(project_out(C.C(t.name), U).T, U)
        values, vectors = torch.linalg.eigh(left)
        top = vectors[:, -A0[t.name].shape[0] :]
        assert torch.allclose(3 * A0[t.name].T.double() @ A0[t.name].double(), top @ top.T, atol=1e-4)
        assert float((A0[t.name] @ learner.U[t.name]).abs().max()) < 1e-6
        assert float(values[-1]) > 0
        assert not layer.lora_A["default"].weight.requires_grad
        assert float(layer.lora_B["default"].weight.detach().abs().max()) == 0.0
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    train(learner, model, batches)
    record = learner.finish_task()
    assert all(torch.equal(f.A, A0[n]) for n, f in record.factors.items())
    assert learner.audit().passed


def test_protected_energy_rises_with_the_tasks():
    options = InfLoraOptions(eps_start=0.7, eps_end=0.9, tasks=4)
    assert [options.energy(t) for t in range(6)] == pytest.approx([0.7, 0.75, 0.8, 0.85, 0.9, 0.9])
    assert InfLoraOptions().energy(0) == 0.95
    assert InfLoraOptions().energy(10) == InfLoraOptions().energy(25) == 1.0
    net = make_net()
    learner = inflora(net)
    for i in range(3):
        learn(learner, f"task {i}", seed=i)
        goal = 0.7 + 0.05 * i
        record = learner.records[-1]
        C = collect_features(net, learner.targets, learner.store, loader(seed=i), loss_fn)
        for t in learner.targets:
            share = record.explained[t.name]
            assert share >= goal - 1e-6
            if record.basis[t.name].shape[1]:  # one direction fewer would not have been enough
                fewer = learner.U[t.name][:, :-1].double()
                M = C.C(t.name)
                assert float((fewer * (M @ fewer)).sum() / M.diagonal().sum()) < goal
    assert learner.config.energy_features == 0.33  # the user's, untouched


def test_state_is_the_smaller_side():
    learner = learn(inflora(make_net()), "one", seed=1)
    sizes = [(U.shape[0], U.shape[1]) for U in learner.U.values()]
    assert learner.state_bytes() == sum(4 * n * min(k, n - k) for n, k in sizes)
    learner._U = Bases.of({name: torch.eye(U.shape[0])[:, :-1] for name, U in learner.U.items()})
    assert learner.state_bytes() == sum(4 * n for n, _ in sizes)


def test_features_that_come_only_once_are_refused():
    learner = inflora(make_net())
    with pytest.raises(KeepLoraError, match="feature_batches is a list_iterator, which can be gone through only once"):
        learner.start_task("one", loader(), loss_fn, feature_batches=iter(list(loader())))
    assert learner._open is None


def test_full_old_space_is_an_error_with_a_remedy():
    net = make_net()
    learner = inflora(net, eps_start=1.0, eps_end=1.0)
    learner._U = Bases.of({t.name: torch.eye(t.n_in) for t in learner.targets})
    with pytest.raises(CapacityError, match=re.escape("set tuner.options.tasks to the number of tasks")):
        learner.start_task("one", loader(), loss_fn)


@pytest.mark.parametrize(("options", "message"), [
    ({"eps_start": 1.2}, "tuner.options.eps_start must lie between 0 and 1, got 1.2"),
    ({"tasks": 0}, "tuner.options.tasks must be at least 1, got 0"),
    ({"epsilon": 0.9}, "unknown option 'epsilon'"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        inflora(make_net(), **options)


def test_table():
    method = get_method("inflora")
    assert method.trained == "B of every target"
    assert "2404.00228" in method.paper


def test_lifecycle(clip_folder, tmp_path):
    check_lifecycle("inflora", clip_folder, tmp_path / "out", options=OPTIONS)
