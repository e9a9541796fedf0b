"""torch.compile: a compiled model learns what a plain one does, and the statistics' hooks see every layer.

Traced and differentiated by torch's compiler ("aot_eager") without code being generated, which takes a C++ compiler and minutes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from tests.tuner.blocks import TARGETS, config, hooks, loader, loss_fn, make_net, train


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    """In evaluation mode, where its dropout does nothing."""
    return make_net(blocks=1).eval()


def learn(model: nn.Module, learner: ContinualLearner, *, compile_adapted: bool = False) -> ContinualLearner:
    for seed, name in enumerate("ab"):
        batches = list(loader(seed=seed, n=8))
        with learner.task(name, batches, loss_fn) as peft_model:
            trained: Any = torch.compile(peft_model, backend="aot_eager") if compile_adapted else peft_model
            train(trained, batches, steps=1)
    return learner


@pytest.fixture(scope="module")
def plain():
    model = net()
    return learn(model, ContinualLearner(model, config())).records


def assert_same(records, expected) -> None:
    assert [r.name for r in records] == [r.name for r in expected]
    for found, wanted in zip(records, expected, strict=True):
        assert found.factors.keys() == wanted.factors.keys()
        for name, factors in wanted.factors.items():
            assert torch.allclose(found.factors[name].A, factors.A, atol=1e-5), name
            assert torch.allclose(found.factors[name].B, factors.B, atol=1e-5), name
            assert factors.B.abs().max() > 1e-3


def test_the_adapted_model_compiled(plain):
    model = net()
    before = hooks(model)
    assert_same(learn(model, ContinualLearner(model, config()), compile_adapted=True).records, plain)
    assert hooks(model) == before


class Counting:
    """A compiler backend that counts what it compiles, and how often that runs."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_model_that_was_compiled_before(how, plain):
    model, backend = net(), Counting()
    if how == "in place":
        model.compile(backend=backend)
    given: Any = model if how == "in place" else torch.compile(model, backend=backend)
    # It has run on such batches with and without gradients, so code without any hook in it is at hand.
    for batch in loader(n=8):
        loss_fn(given, batch)
        with torch.no_grad():
            loss_fn(given, batch)
    before = backend.compiled, backend.runs
    assert before > (0, 0)
    learner = ContinualLearner(given, config())
    assert learner.model is model
    assert {t.name.rsplit(".", 1)[-1] for t in learner.targets} == set(TARGETS)
    learner.start_task("a", list(loader(n=8)), loss_fn)
    assert (backend.compiled, backend.runs) == before, "the gradient pass was not taken as the model is written"
    learner.abort_task()
    assert_same(learn(model, learner).records, plain)
    given(next(iter(loader()))[0])
    assert backend.runs > before[1], "nothing compiled is run any more"
