"""A GPU whose memory is full: the statistics are taken again in smaller batches, and come out the same."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from keeplora import ContinualLearner, KeepLoraError
from keeplora.tuner.memory import Pieces, full_float32, halved
from keeplora.tuner.passes import collect_features, collect_gradients
from tests.tuner.blocks import Samples, config, loader, loss_fn, make_net


class Memory:
    """A loss whose memory holds ``most`` samples, and which fails in the backward pass of a larger batch."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, []

    def __call__(self, model, batch):
        loss = loss_fn(model, batch)
        n = len(batch[0] if isinstance(batch, (list, tuple)) else next(iter(batch.values())))
        self.sizes.append(n)
        if n > self.most and loss.requires_grad:

            def full(gradient):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

            # Half-way back: the targets behind it have their share of this batch already.
            middle = loss.grad_fn
            for _ in range(4):
                middle = next(f for f, _ in middle.next_functions if f is not None)
            middle.register_hook(lambda inputs, outputs: full(inputs))
        elif n > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return loss


def parts():
    learner = ContinualLearner(make_net(blocks=3), config())
    return learner.model, learner.targets, learner.store


def test_gradients_are_those_of_a_large_memory():
    model, targets, store = parts()
    data = DataLoader(Samples(12, 4), batch_size=12)
    whole = collect_gradients(model, targets, store, data, loss_fn)
    memory = Memory(3)
    with pytest.warns(UserWarning, match="the gradient pass did not fit the memory and was taken again") as told:
        small = collect_gradients(model, targets, store, data, memory)
    assert memory.sizes == [12, 6, 3, 3, 3, 3]
    assert len(told) == 2
    for name, G in whole.items():
        torch.testing.assert_close(G, small[name], rtol=1e-5, atol=1e-8)


def test_features_are_those_of_a_large_memory():
    model, targets, store = parts()
    data = DataLoader(Samples(12, 4), batch_size=12)
    whole = collect_features(model, targets, store, data, loss_fn)
    with pytest.warns(UserWarning, match="the feature pass did not fit the memory"):
        small = collect_features(model, targets, store, data, Memory(5))
    for t in targets:
        torch.testing.assert_close(whole.C(t.name), small.C(t.name), rtol=1e-5, atol=1e-8)


def test_a_task_is_begun_with_the_same_factors_and_the_warning_is_told_once():
    def begun(loss):
        learner = ContinualLearner(make_net(blocks=3), config())
        learner.start_task("a", loader(), loss)
        assert learner._open is not None
        assert learner._open.adapter is not None
        return learner._open.adapter.A0

    n = loader().batch_size
    assert n is not None
    whole = begun(loss_fn)
    with pytest.warns(UserWarning, match="the gradient pass") as told:
        small = begun(Memory(n // 2))
    assert len(told) == 1
    for name, A in whole.items():
        torch.testing.assert_close(A.T @ A, small[name].T @ small[name], rtol=0, atol=1e-4)


def test_batches_that_cannot_be_cut_are_a_sentence():
    model, targets, store = parts()
    batch = next(iter(DataLoader(Samples(12, 4), batch_size=12)))
    for batches in ([batch], DataLoader(Samples(12, 4), batch_size=1)):
        with pytest.raises(
            KeepLoraError, match=r"the gradient pass does not fit the memory \(CUDA out of memory.*smaller"
        ):
            collect_gradients(model, targets, store, batches, Memory(0))


def test_a_shuffled_loader_is_not_cut():
    assert halved(DataLoader(range(4), batch_size=4, shuffle=True)) is None
    assert halved(DataLoader(range(4), batch_sampler=[[0, 1], [2, 3]])) is None


def test_pieces_cover_everything_in_order_and_remember_what_fits():
    pieces, tried = Pieces("evaluation of 'pets'"), []

    def work(start, end):
        tried.append(end - start)
        if end - start > 3:
            raise torch.OutOfMemoryError
        return list(range(start, end))

    with pytest.warns(
        UserWarning, match=r"evaluation of 'pets': the memory did not hold 10 samples at once; .* at most 5"
    ):
        found = pieces(10, work)
    assert list(chain.from_iterable(found)) == list(range(10))
    assert tried == [10, 5, 3, 3, 3, 1]
    tried.clear()
    assert list(chain.from_iterable(pieces(4, work))) == [0, 1, 2, 3]
    assert tried == [3, 1]

    def never(start, end):
        raise torch.OutOfMemoryError("full")

    with (
        pytest.warns(UserWarning, match="at most 1"),
        pytest.raises(KeepLoraError, match=r"not even one sample fits the memory \(full\)"),
    ):
        Pieces("evaluation")(2, never)


def test_torch_before_the_precision_of_each_backend_has_the_one_switch(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
