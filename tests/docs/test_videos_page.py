"""docs/videos.md is run block by block, with a tiny LLaVA-OneVision in place of the stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import ROOT, blocks, run_block
from tests.models.tiny_generative import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_page_runs(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from keeplora.models import stand_in

    folder = tiny("llava-onevision", tmp_path_factory.mktemp("stand-in") / "model")
    monkeypatch.setattr(stand_in, "stand_in_path", lambda *_, **__: folder)
    namespace: dict[str, Any] = {}
    page = [block for block in blocks(ROOT / "docs/videos.md") if block.runs]
    assert len(page) >= 5
    for block in page:
        run_block(block, here, namespace)

    run = here / "runs/moves-keeplora++-seed0"
    assert (run / "predictions/after-2/upright.jsonl").is_file()
    samples = json.loads((run / "samples/sideways.json").read_text())
    assert all(len(sample["times"]) == 4 and (run / sample["picture"]).is_file() for sample in samples)
    assert "Frames of the video" in (run / "report.html").read_text(encoding="utf-8")
    assert isinstance(namespace["answer"], str)
