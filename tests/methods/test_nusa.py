"""NuSA-CL: an update has nothing in common with the weight's leading singular directions, on either side."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import CapacityError, ConfigError
from keeplora.methods import get_method
from keeplora.methods.nusa import null_directions
from tests.methods.lifecycle import check_lifecycle, learn, make_learner, train
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net

OPTIONS = {"energy": 0.8, "max_rank": 5}


def nusa(net, **options):
    return make_learner("nusa-cl", net, TARGETS, options={**OPTIONS, **options})


def leading(W, energy):
    """(U, V) of the fewest singular directions that hold ``energy``, and how many there are in all."""
    L, S, Rt = torch.linalg.svd(W.double(), full_matrices=False)
    p = int((torch.cumsum(S**2, 0) < energy * (S**2).sum()).sum()) + 1
    return L[:, :p], Rt[:p].T, len(S)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5)])
@pytest.mark.parametrize("max_rank", [2, 100])
def test_null_directions(shape, max_rank):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    top_U, top_V, total = leading(W, 0.7)
    U, V = null_directions(W, 0.7, max_rank)
    assert U.shape[1] == V.shape[1] == min(max_rank, total - top_U.shape[1])
    assert float((top_U.T @ U.double()).abs().max()) < 1e-6
    assert float((top_V.T @ V.double()).abs().max()) < 1e-6
    assert torch.allclose(U.T @ U, torch.eye(U.shape[1]), atol=1e-6)
    inside = U.double().T @ W.double() @ V.double()  # in pairs: Σ of the lowest, in falling order
    S = torch.linalg.svdvals(W.double())[-U.shape[1] :]
    assert torch.allclose(inside, torch.diag(S), atol=1e-6)


def test_no_energy_protects_nothing_and_all_of_it_leaves_the_kernel():
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    assert null_directions(W, 0.0, 100)[1].shape == (6, 6)
    assert null_directions(W, 1.0, 100)[1].shape == (6, 0)
    W[:, 0] = 0
    _, V = null_directions(W, 1.0, 100)
    assert V.shape == (6, 1)
    assert float((W @ V).abs().max()) < 1e-6


def test_update_stays_out_of_the_leading_directions_of_the_present_weight():
    net = make_net()
    learner = nusa(net)
    for i, name in enumerate(("one", "two")):
        before = {t.name: learner.store.current(t.name).clone() for t in learner.targets}
        learn(learner, name, seed=i, steps=8, weight_decay=0.1)
        for layer, f in learner.records[-1].factors.items():
            delta = learner.store.current(layer) - before[layer]
            U, V, _ = leading(before[layer], 0.8)
            norm = float(delta.norm())
            assert norm > 1e-2
            assert float((U.T @ delta.double()).norm()) / norm < 1e-5
            assert float((delta.double() @ V).norm()) / norm < 1e-5
            assert f.s == 1.0
            assert f.A.shape[0] <= 5


def test_what_trains_and_how_it_merges():
    net, batches = make_net(), loader()
    net.eval()
    learner = nusa(net)
    x = torch.randn(5, 4, 12)
    plain = net(x)
    model = learner.start_task("one", batches, loss_fn)
    assert torch.equal(net(x), plain)  # M = 0
    branches = learner.open_branches()
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {f"{n}.keeplora_branch.M" for n in branches}
    assert all(b.M.shape == (b.U.shape[1], b.V.shape[1]) for b in branches.values())
    assert learner._open.info["trained_parameters"] == sum(b.M.numel() for b in branches.values())
    assert learner._open.info["trained_parameters"] <= learner.planned_parameters() == 25 * len(learner.targets)
    U = {n: b.U.clone() for n, b in branches.items()}
    train(learner, model, batches, weight_decay=0.1)
    assert all(torch.equal(U[n], b.U) for n, b in branches.items())
    net.eval()
    live = net(x).detach()
    assert not torch.allclose(live, plain, atol=1e-3)
    learner.finish_task()
    assert torch.allclose(net(x), live, atol=1e-5)
    assert learner.state_bytes() == 0


def test_layers_without_low_energy_directions_sit_out():
    net = make_net()
    with torch.no_grad():
        net.get_submodule("encoder.layers.0.q").weight.copy_(torch.eye(12))  # all alike: 0.95 of 12 needs all 12
    learner = nusa(net, energy=0.95)
    with pytest.warns(UserWarning, match=r"no residual space is left in 1 of 10 targets.*encoder\.layers\.0\.q"):
        learner.start_task("one", loader(), loss_fn)
    assert "encoder.layers.0.q" not in learner.open_branches()
    assert learner._open.info["not_adapted"] == ["encoder.layers.0.q"]
    train(learner, net, loader())
    assert "encoder.layers.0.q" not in learner.finish_task().factors
    with pytest.raises(CapacityError, match=re.escape("lower tuner.options.energy, or add targets")):
        nusa(net, energy=1.0).start_task("one", loader(), loss_fn)


@pytest.mark.parametrize(("options", "message"), [
    ({"energy": -0.1}, "tuner.options.energy must lie between 0 and 1, got -0.1"),
    ({"max_rank": 0}, "tuner.options.max_rank must be at least 1, got 0"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        nusa(make_net(), **options)


def test_table():
    method = get_method("nusa-cl")
    assert (method.trained, method.state) == ("M (r × r) of every target", "nothing")
    assert "2510.21175" in method.paper


def test_lifecycle(clip_folder, tmp_path):
    check_lifecycle("nusa-cl", clip_folder, tmp_path / "out", options={"energy": 0.8})
