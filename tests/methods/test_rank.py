"""A rank that no layer can take is told once, by every method that has a rank and by no other."""

from __future__ import annotations

import warnings

import pytest

from keeplora.methods import get_method
from tests.methods.lifecycle import learn, make_learner
from tests.tuner.blocks import TARGETS, make_net

RANKED = (
    "lora", "gpm-lora", "inflora", "o-lora", "reglora", "sd-lora", "moelora", "keeplora", "keeplora++", "joint", "oracle",
)  # fmt: skip
OTHERS = ("full-ft", "l2", "nusa-cl")  # whole matrices, or as many directions as hold little energy: r is read by none


def told(name: str, r: int) -> list[str]:
    learner = make_learner(name, make_net(), TARGETS, r=r)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if get_method(name).learner.schedule == "joint":
            learner.sit_out("one", {"deferred": True})
        else:
            learn(learner, "one", seed=1)
        learn(learner, "two", seed=2)
    return [text for one in caught if (text := str(one.message)).startswith("r is ")]


@pytest.mark.parametrize("name", RANKED)
def test_a_method_with_a_rank_warns_once(name):
    (sentence,) = told(name, 400)
    assert sentence.startswith("r is 400, but the widest target takes a rank of at most ")
    assert sentence.endswith("lower r")


@pytest.mark.parametrize("name", ["sd-lora", "moelora", "joint"])
def test_a_rank_that_fits_is_not_told(name):
    assert told(name, 4) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_without_a_rank_does_not_warn(name):
    assert told(name, 400) == []
