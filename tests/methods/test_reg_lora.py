"""RegLoRA: what is marked, what the penalty and its gradient are, and that marks pile up and hold the entries still."""

from __future__ import annotations

import re

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods.reg_lora import MARKS, largest, marked_sum, pack, unpack
from tests.methods.lifecycle import learn, make_learner, train
from tests.methods.steps import check_resumes
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net

UP = "encoder.layers.0.up"


def reglora(net, **options):
    return make_learner("reglora", net, TARGETS, options=options)


def test_the_largest_entries():
    update = torch.tensor([[1.0, -9.0, 3.0], [0.5, 7.0, -8.0]])
    assert largest(update, 50).tolist() == [1, 4, 5]
    assert largest(update, 49).tolist() == [1, 5]  # rounded down
    assert largest(update, 1).tolist() == []
    assert largest(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 100).tolist() == [1]  # what never moved is not marked
    assert len(largest(torch.rand(10, 10), 58)) == 58  # 0.58 · 100 is a little less than 58 in floating point


@pytest.mark.parametrize("n", [1, 7, 8, 9, 250])
def test_marks_are_one_bit_each(n):
    positions = torch.randperm(n, generator=torch.Generator().manual_seed(n))[: max(1, n // 3)]
    bits = pack(positions, n)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-n // 8)
    found = unpack(bits, n)
    assert found.shape == (n,)
    assert found.nonzero().flatten().tolist() == sorted(positions.tolist())


def test_penalty_and_gradient_by_hand():
    """B A = [[2, −1], [6, −3]]; marked are the entries (0, 0) and (1, 1): |2| + |−3|."""
    A, B = torch.tensor([[2.0, -1.0]], requires_grad=True), torch.tensor([[1.0], [3.0]], requires_grad=True)
    found = marked_sum(A, B, pack(torch.tensor([0, 3]), 4))
    assert found.item() == 5.0
    (3 * found).backward()
    # ∂/∂A = Bᵀ S, ∂/∂B = S Aᵀ with S = [[1, 0], [0, −1]]
    assert A.grad.tolist() == [[3.0, -9.0]]
    assert B.grad.tolist() == [[6.0], [3.0]]


def test_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 11, generator=generator), torch.randn(7, 3, generator=generator)
    positions = torch.randperm(77, generator=generator)[:20]
    mine, theirs = [(A.clone().requires_grad_(), B.clone().requires_grad_()) for _ in range(2)]
    marked_sum(*mine, pack(positions, 77)).backward()
    (theirs[1] @ theirs[0]).flatten()[positions].abs().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_penalty_of_a_learner_is_the_weighted_mean_over_all_layers():
    net = make_net()
    learner = learn(reglora(net, lam=7.0, share=10.0), "one", seed=1)
    learner.start_task("two", loader(seed=2), loss_fn)
    total = count = 0.0
    with torch.no_grad():
        for t in learner.targets:
            A, B = learner._open.adapter.weights(t.name)
            B.normal_(generator=torch.Generator().manual_seed(t.n_in))
            marked = learner.marks(t.name)
            assert len(marked) == t.n_in * t.n_out // 10
            total += float((B @ A).flatten()[marked].abs().sum())
            count += len(marked)
    penalty = learner.penalty(None, None)
    assert penalty.item() == pytest.approx(7.0 * total / count, rel=1e-5)
    penalty.backward()
    assert all(learner._open.adapter.weights(t.name)[1].grad.any() for t in learner.targets)
    learner.abort_task()
    assert learner._held == ()


def test_marks_pile_up_and_each_counts_once():
    net = make_net()
    learner = reglora(net, share=20.0, lam=0.0)
    learn(learner, "one", seed=1)
    one = learner.marks(UP)
    f = learner.records[0].factors[UP]
    size = (f.B @ f.A).abs().flatten()
    assert len(one) == 216 // 5
    assert float(size[one].min()) >= float(size.sort().values[-len(one)])
    learn(learner, "two", seed=2)
    both = learner.marks(UP)
    second = learner.records[1].tensors[MARKS + UP]
    assert second.dtype == torch.int32
    assert both.tolist() == [*one.tolist(), *second.tolist()]
    assert len(both.unique()) == len(both)
    assert 0 < len(second) <= 43
    f = learner.records[1].factors[UP]
    assert set(largest(f.B @ f.A, 20.0).tolist()) <= set(both.tolist())
    state = sum(4 * len(learner.marks(t.name)) for t in learner.targets)
    assert learner.state_bytes() == state


def test_first_task_has_no_penalty_and_marks_hold_the_second_still():
    moved = {}
    for lam in (0.0, 2500.0):
        net = make_net()
        learner = reglora(net, lam=lam, share=10.0)
        assert learner.start_task("one", loader(seed=1), loss_fn) is not None
        assert learner.penalty(None, None) is None
        torch.manual_seed(0)
        train(learner, net, loader(seed=1))
        learner.finish_task()
        torch.manual_seed(0)
        learn(learner, "two", seed=2, steps=8)
        marked = {t.name: learner.records[0].tensors[MARKS + t.name].long() for t in learner.targets}
        deltas = learner.records[1].deltas
        moved[lam] = sum(float(deltas[n].flatten()[m].abs().sum()) for n, m in marked.items())
    assert moved[2500.0] < 0.5 * moved[0.0]


def test_a_task_that_never_trained_marks_nothing():
    learner = reglora(make_net())
    learner.start_task("one", loader(), loss_fn)
    learner.finish_task()
    assert learner.state_bytes() == 0
    learner.start_task("two", loader(), loss_fn)
    assert learner.penalty(None, None) is None
    learner.abort_task()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1}, "tuner.options.lam must be a finite number of at least 0, got -1.0"),
        ({"share": 0}, "tuner.options.share must lie above 0 and up to 100 percent, got 0.0"),
        ({"share": 101.0}, "tuner.options.share must lie above 0 and up to 100 percent, got 101.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        reglora(make_net(), **options)


def test_resumes(clip_folder, tmp_path):
    penalties = check_resumes("reglora", clip_folder, tmp_path / "out", {"lam": 100.0}, lr=1e-2)
    assert max(penalties) > 0
