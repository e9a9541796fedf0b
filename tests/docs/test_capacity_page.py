"""docs/capacity.md: its example runs, and what it states of the code is so."""

from __future__ import annotations

import re
from typing import Any

import pytest

from keeplora.tuner.capacity import STYLES
from keeplora.tuner.config import WHEN_FULL
from tests.docs.documents import ROOT, blocks, run_block

PAGE = ROOT / "docs/capacity.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    (block,) = [block for block in blocks(PAGE) if block.language == "python"]
    run_block(block, tmp_path, namespace)
    assert namespace["learner"].capacity().tasks == ("pets", "signs")
    assert "Capacity: protected input dimensions" in capsys.readouterr().out


def test_every_state_and_policy_is_described():
    text = PAGE.read_text(encoding="utf-8")
    assert all(re.search(rf"^\| {state} \|", text, re.M) for state in STYLES)
    assert all(re.search(rf"^\| `{policy}`", text, re.M) for policy in WHEN_FULL)
