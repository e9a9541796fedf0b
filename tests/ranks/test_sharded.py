"""Bases and factors that several processes hold together learn what one process learns: FSDP2, and DeepSpeed if installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from keeplora.tuner.ledger import Ledger
from tests.ranks import shards, work
from tests.ranks.test_learner import check_close, same_bits
from tests.ranks.world import outcomes, run
from tests.tuner.blocks import TARGETS, make_net

deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    ("size", "how", "feed"),
    [
        (2, "base", "loader"),
        (3, "base", "uneven"),  # one process has a sample, one none, one all the others
        (2, "root", "loader"),  # FSDP2 leaves the outermost module's weights whole after a forward pass
        (3, "task", "loader"),
        pytest.param(2, "accelerate-lean", "loader", marks=pytest.mark.slow),
        pytest.param(2, "accelerate", "loader", marks=pytest.mark.slow),
        pytest.param(2, "zero2", "loader", marks=[pytest.mark.slow, deepspeed]),
        pytest.param(2, "zero3", "loader", marks=[pytest.mark.slow, deepspeed]),
        pytest.param(3, "zero3", "uneven", marks=[pytest.mark.slow, deepspeed]),
    ],
)
def test_equal_to_one_process(size: int, how: str, feed: str, tmp_path: Path) -> None:
    alone = work.two_tasks(str(tmp_path / "alone"), "loader")
    found = run(shards.two_tasks, size, tmp_path / "several", str(tmp_path / "several"), how, feed)
    for other in found[1:]:
        assert same_bits(found[0], other)
    check_close(found[0], alone)
    assert [r.name for r in Ledger.open(tmp_path / "several" / "ledger").records()] == ["task 0", "task 1"]


def test_free_modules_train_in_a_model_that_is_sharded_within_the_task(tmp_path: Path) -> None:
    alone = work.two_tasks(str(tmp_path / "alone"), "loader", free_modules=["head"])
    found = run(shards.with_free_modules, 2, tmp_path / "meet", str(tmp_path / "several"), "task")
    assert same_bits(found[0], found[1])
    check_close(found[0], alone)
    assert not torch.equal(found[0]["W"]["head.weight"], make_net().head.weight)


def test_tasks_come_and_go_exactly(tmp_path: Path) -> None:
    found = run(shards.history, 2, tmp_path / "meet", str(tmp_path))
    states = found[0]["states"]
    assert same_bits(states, found[1]["states"])
    assert same_bits(states["undone"], states["after 1"])
    assert same_bits(states["back to 1"], states["after 1"])
    assert same_bits(states["removed and restored"], states["after 1"])
    assert same_bits(states["back to 0"], states["after 0"])
    assert same_bits(states["opened sharded"], states["after 0"])
    assert not same_bits(states["after 0"], states["after 1"])
    for name, W in make_net().state_dict().items():
        if name.removesuffix(".weight") in states["start"]:
            assert torch.equal(states["start"][name.removesuffix(".weight")], W)
    for name, W in states[
        "opened whole"
    ].items():  # products of whole matrices may round otherwise than those of their rows
        torch.testing.assert_close(W, states["after 0"][name], rtol=1e-6, atol=1e-7)
    total = sum(W.numel() for W in states["start"].values())
    assert len(states["start"]) == 2 * len(TARGETS)
    assert found[0]["held"] + found[1]["held"] == total  # of W₀ every process keeps its rows alone
    factors, weights = found[0]["leak"]
    assert factors <= 1e-5
    assert weights <= 1e-5
    assert found[0]["leak"] == found[1]["leak"]


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    for told in run(shards.comes_back, 2, tmp_path, str(tmp_path)):
        assert told == [True] * 6


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("columns", r"KeepLoraError: the weight of encoder.layers.0.q is sharded as \(Shard\(dim=1\),\) over 2 of 2"),
        ("free", "KeepLoraError: the weight of head.weight is sharded, but this method reads or trains whole weights"),
        ("later", "KeepLoraError: .* was sharded or replaced by another after the learner was made"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(what: str, sentence: str, tmp_path: Path) -> None:
    import re

    for said in run(shards.refused, 2, tmp_path, what):
        assert re.match(sentence, said), said


def test_a_failure_in_a_pass_ends_all(tmp_path: Path) -> None:
    found = outcomes(shards.failing, 2, tmp_path, str(tmp_path))
    assert found[1] == ("returned", "ValueError: this picture cannot be read")
    assert found[0][0] == "returned"
    assert found[0][1].startswith("RankError: rank 1 stopped: ValueError: this picture cannot be read"), found[0]
