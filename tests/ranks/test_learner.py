"""Several processes learn what one does: A, U, weights and ledger, equal to one process and to each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.tuner.ledger import Ledger
from tests.ranks import work
from tests.ranks.world import outcomes, run
from tests.tuner.blocks import make_net


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def projector(U: torch.Tensor) -> torch.Tensor:
    return U.double() @ U.double().T


def check_close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Weights, subspaces and numbers of two learners; bases as the spaces they span, A up to a rotation that B undoes."""
    assert found["used"] == wanted["used"]
    for name, W in wanted["W"].items():
        assert float((found["W"][name] - W).norm() / W.norm()) < tolerance, name
    for name, U in wanted["U"].items():
        assert float((projector(found["U"][name]) - projector(U)).abs().max()) < tolerance, name
    for name, A in wanted["A"].items():
        assert float((projector(found["A"][name].T) - projector(A.T)).abs().max()) < tolerance, name
    for kind in ("explained", "trace"):
        for name, value in wanted[kind].items():
            assert found[kind][name] == pytest.approx(value, rel=tolerance), (kind, name)


@pytest.mark.parametrize(
    ("size", "feed", "settings"),
    [
        (2, "loader", {}),
        (3, "uneven", {}),
        (2, "sampler", {"memory": "gradients"}),
        (2, "accelerate", {"gradient_samples": 5, "feature_samples": 5}),
        (3, "loader", {"energy_general": 0.5}),
    ],
)
def test_equal_to_one_process(size: int, feed: str, settings: dict[str, Any], tmp_path: Path) -> None:
    alone = work.two_tasks(str(tmp_path / "alone"), "loader", **settings)
    found = run(work.two_tasks_so, size, tmp_path / "several", str(tmp_path / "several"), feed, settings)
    for other in found[1:]:
        assert same_bits(found[0], other)
    check_close(found[0], alone)
    ledger = Ledger.open(tmp_path / "several" / "ledger")
    assert [r.name for r in ledger.records()] == ["task 0", "task 1"]
    reopened = work.told(ContinualLearner.from_pretrained(tmp_path / "several", make_net()))
    assert same_bits(reopened["W"], found[0]["W"])
    assert same_bits(reopened["U"], found[0]["U"])


@pytest.mark.parametrize(
    ("what", "others", "own"),
    [
        (
            "statistics",
            "RankError: rank 1 failed in the gradient pass: ValueError: this picture",
            "ValueError: this picture",
        ),
        ("disk", "OSError: [Errno 28] No space left", "OSError: [Errno 28] No space left"),
        ("raises in training", "RankError: rank 1 stopped: ValueError: the loop has a fault", "ValueError: the loop"),
        (
            "not wrapped",
            "RankError: rank 1 failed in comparing what was trained",
            "KeepLoraError: the trained update of",
        ),
    ],
)
def test_a_failure_on_one_rank_fails_on_all(what: str, others: str, own: str, tmp_path: Path) -> None:
    (first, clean, names), (second, clean_too, names_too) = run(work.failing, 2, tmp_path, what, str(tmp_path))
    assert first.startswith(others), first
    assert second.startswith(own), second
    assert (clean, clean_too) == (True, True)
    assert names == names_too
    assert names == (["second"] if what in ("statistics", "not wrapped") else [])
    assert [r.name for r in Ledger.open(tmp_path / "ledger").records()] == names


@pytest.mark.parametrize("what", ["killed in the statistics", "killed in training"])
def test_a_rank_that_is_killed_is_named(what: str, tmp_path: Path) -> None:
    found = outcomes(work.failing, 3, tmp_path, what, str(tmp_path))
    assert found[1] == ("died", -9)
    for rank in (0, 2):
        said, clean, names = found[rank][1]
        assert said.startswith("RankError: rank 1 (process "), said
        assert "is gone: it was killed" in said, said
        assert (clean, names) == (True, [])
    assert Ledger.open(tmp_path / "ledger").records() == []


@pytest.mark.slow
def test_a_rank_that_hangs_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    said = run(work.slow, 2, tmp_path, str(tmp_path))[0]
    assert re.match(r"RankError: .*: another rank does not answer \(.*Timed out", said), said


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("weights", "KeepLoraError: rank 1 has other weights than rank 0: load the same checkpoint"),
        ("config", "KeepLoraError: rank 1 has another KeepLoraConfig than rank 0"),
        ("parts", "DataError: the set of rank 1 is not that of rank 0 (another first sample)"),
        ("lengths", "DataError: the set of rank 1 is not that of rank 0 (another length)"),
        ("kinds", "DataError: rank 0 was given a DataLoader over a set and rank 1 an iterable of batches"),
    ],
)
def test_what_cannot_be_one_run_is_refused_on_all(what: str, sentence: str, tmp_path: Path) -> None:
    said = run(work.refused, 2, tmp_path, what)
    assert said[0].startswith(sentence), said
    assert said[0].split(" ")[0] == said[1].split(" ")[0], said


def test_history_and_folders(tmp_path: Path) -> None:
    found = run(work.history, 2, tmp_path / "several", str(tmp_path / "several"))
    assert same_bits(found[0], found[1])
    alone = work.history(str(tmp_path / "alone"))
    for several, one in zip(found[0], alone, strict=True):
        for name, W in one.items():
            assert float((several[name] - W).norm() / W.norm()) < 1e-5, name
    assert same_bits(found[0][3], found[0][4])  # saved and opened again


def test_a_budget_is_spent_alike(tmp_path: Path) -> None:
    found = run(work.budgeted, 2, tmp_path / "several", str(tmp_path / "several"))
    assert same_bits(found[0], found[1])
    check_close(found[0], work.budgeted(str(tmp_path / "alone")))
    assert any("given_up" in info for info in found[0]["info"])
