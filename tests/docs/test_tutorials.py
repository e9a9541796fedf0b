"""The tutorials are run block by block, and what they say of the outcome is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import ROOT, blocks, run_block
from tests.models.tiny_generative import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run_page(name: str, folder: Path, at_least: int, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    namespace = {} if namespace is None else namespace
    to_run = [block for block in blocks(ROOT / "docs" / name) if block.runs]
    assert len(to_run) >= at_least
    for block in to_run:
        run_block(block, folder, namespace)
    return namespace


@pytest.mark.usefixtures("tiny_models")
def test_own_photos(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    run_page("tutorial-photos.md", here, at_least=12)
    out = capsys.readouterr().out
    assert "photos/fruit/apple/0.jpg" in out
    assert "0.jpg" in json.dumps(
        json.loads((here / "runs/shop-lora-seed0/data.json").read_text())["tasks"][0]["warnings"]
    )
    page = (here / "runs/index.html").read_text(encoding="utf-8")
    assert all(f"shop-{method}-seed0/report.html" in page for method in ("zero-shot", "lora"))
    assert "shop-keeplora%2B%2B-seed0/report.html" in page
    assert json.loads((here / "runs/shop-seen/results.json").read_text())["candidates"] == "seen"
    assert (here / "model/model.safetensors").is_file()
    results = json.loads((here / "runs/shop-keeplora++-seed0/results.json").read_text())
    assert results["removed"] == ["fruit"]
    assert results["tasks"] == ["fruit", "tools", "toys"]
    assert all(None not in row for row in results["accuracy"])
    assert results["probes"] == ["signs"]


def test_own_questions(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from keeplora.models import stand_in

    folder = tiny("llava", tmp_path_factory.mktemp("stand-in") / "model")
    monkeypatch.setattr(stand_in, "stand_in_path", lambda name="stand-in", progress=None: folder)
    namespace = run_page("tutorial-questions.md", here, at_least=5)
    assert namespace["moment"] == "after-2"
    assert set(namespace["first"]) >= {"question", "references", "prediction", "score"}
    runs = {path.name for path in (here / "runs").iterdir()}
    assert runs == {"shelf-keeplora++-seed0", "shelf-lora-seed0"}
    assert (here / "adapter/adapter_config.json").is_file()


def test_own_training_loop(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_page("tutorial-own-loop.md", here, at_least=11)
    assert namespace["trained"] == {"lora_B"}
    assert [record.name for record in namespace["learner"].records] == ["spring", "summer", "autumn"]
    assert len(list((here / "served/adapters").iterdir())) == 3
    # The loop of the page learns: each task well above a guess among three, right after it was learned.
    out = capsys.readouterr().out
    assert "{'lora_B'}" in out
    model, accuracy = namespace["model"], namespace["accuracy"]
    assert accuracy(model, namespace["autumn"]) > 60
    assert accuracy(model, namespace["tasks"]["spring"]) > 60
