"""docs/claims/claims.yaml fits the pages, and scripts/claims.py sees what does not hold."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.docs.documents import ROOT

spec = importlib.util.spec_from_file_location("claims", ROOT / "scripts" / "claims.py")
assert spec is not None
assert spec.loader is not None
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)


def claim(**changes: Any) -> dict[str, Any]:
    first = next(c for c in claims.read() if c["id"] == "sketch.memory")
    return {**first, **changes}


def test_the_pages_print_what_is_claimed() -> None:
    found = claims.read()
    assert claims.problems(found) == []
    assert sum("check" in one for one in found) >= 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"value": "1/99"}, "sketch.memory: docs/speed.md does not print '1/99'"),
        ({"row": "Sequential LoRA"}, "docs/speed.md does not print '1/43' in a line with 'Sequential LoRA'"),
        ({"also": ["README.md"]}, "sketch.memory: README.md does not print '1/43'"),
        ({"page": "docs/none.md"}, "sketch.memory: docs/none.md is no page"),
        ({"command": "python benchmarks/gone.py"}, "sketch.memory: benchmarks/gone.py does not exist"),
        ({"chek": {}}, "sketch.memory: unknown key 'chek'"),
        ({"check": {"steps": [], "within": [0, 1]}}, "within: [low, high], and either json or find"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], told: str) -> None:
    (problem,) = claims.problems([claim(**changes)])
    assert told in problem


def test_a_missing_key_and_a_second_id_are_told() -> None:
    broken = claim()
    del broken["commit"]
    assert claims.problems([broken, claim()]) == [
        "sketch.memory: commit is missing",
        "sketch.memory: two claims have this id",
    ]


def test_a_sample_runs_the_code_beside_all_that_reads_kept_numbers() -> None:
    able = [one for one in claims.read() if "check" in one]
    kept = {one["id"] for one in able if claims.reads_kept(one)}
    assert {"abstract.front", "general.last"} <= kept
    assert kept.isdisjoint({"sketch.memory", "demo-small.untouched", "vqa.difference", "video.difference"})
    drawn = [{one["id"] for one in claims.chosen(able, 2, day)} for day in range(60)]
    assert all(kept <= ids and len(ids - kept) == 2 for ids in drawn)
    assert set().union(*drawn) == {one["id"] for one in able}


@pytest.mark.parametrize(("within", "code", "told"), [([0, 0], 0, "holds: 0"), ([1, 2], 1, "DRIFTED: 0")])
def test_a_drift_is_an_error(within: list[float], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A short form that prints a number: the first of the version."""
    one = claim(check={"steps": ["keeplora --version"], "find": r"(\d+)\.\d+\.\d+", "within": within})
    assert claims.check([one]) == code
    assert told in capsys.readouterr().out


def test_a_command_that_fails_is_told_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    one = claim(check={"steps": ["keeplora run nothing-here.yaml"], "find": r"(\d)", "within": [0, 1]})
    assert claims.check([one]) == 1
    assert "nothing-here.yaml" in capsys.readouterr().out
