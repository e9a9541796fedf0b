"""docs/analyze-tasks.md: its example runs, and what it names exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keeplora.tuner.similarity import PREDICTORS
from tests.docs.documents import ROOT, blocks, run_block

PAGE = ROOT / "docs/analyze-tasks.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    (block,) = [block for block in blocks(PAGE) if block.language == "python"]
    run_block(block, tmp_path, namespace)
    assert [record.name for record in namespace["learner"].records] == ["task-1", "task-2"]
    assert "task-1 Alarm(" in capsys.readouterr().out


def test_every_predictor_is_described():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in PREDICTORS)
