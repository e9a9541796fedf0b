"""Layers side by side: the same bits on any number of threads, errors in order, torch's own setting as it was."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.math import Subspace, new_directions, residual_factor, weight_basis
from keeplora.tuner.layerwise import over_layers
from tests.tuner.blocks import config, loader, loss_fn, make_net, train


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def decompose(seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    W, x = torch.randn(150, 130, generator=rng), torch.randn(400, 130, generator=rng, dtype=torch.float64)
    U = weight_basis(W, 0.5)
    V, share = new_directions(Subspace.of(U), x.T @ x, 0.7)
    return [U, V, torch.tensor(share), residual_factor(W, U, 8)]


def test_same_bits_on_any_number_of_threads(threads):
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(over_layers(decompose, list(range(6))))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_as_many_as_there_are_threads_and_one_thread_each(threads):
    threads(3)
    barrier = threading.Barrier(3, timeout=20)

    def work(i: int) -> tuple[int, int]:
        barrier.wait()  # passes only where three are at work together
        return i, torch.get_num_threads()

    assert over_layers(work, range(3)) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3
    assert over_layers(lambda i: torch.get_num_threads(), [0]) == [1]


def test_the_first_error_comes_out(threads):
    threads(2)
    begun = []

    def work(i: int) -> None:
        begun.append(i)
        if i >= 1:
            raise ValueError(f"layer {i}")

    with pytest.raises(ValueError, match="layer 1"):
        over_layers(work, range(50))
    assert len(begun) < 50
    assert torch.get_num_threads() == 2


def learned(n: int) -> ContinualLearner:
    """The passes on one thread, since a product's bits may depend on it; the layers on n."""
    torch.set_num_threads(1)
    learner = ContinualLearner(make_net(), config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeplora.tuner.layerwise.one_thread", lambda: nullcontext(n))
        torch.manual_seed(0)  # dropout
        with learner.task("one", loader(), loss_fn) as model:
            train(model, loader())
    return learner


def test_a_task_has_the_same_bits(threads):
    one, three = learned(1), learned(3)
    assert one.records[0].factors.keys() == three.records[0].factors.keys()
    for name, f in one.records[0].factors.items():
        assert torch.equal(f.A, three.records[0].factors[name].A)
    for name in one.U:
        assert torch.equal(one.U[name], three.U[name])
