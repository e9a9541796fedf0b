"""docs/questions.md is run block by block, with a tiny LLaVA in place of the stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.documents import ROOT, blocks, run_block
from tests.models.tiny_generative import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_page_runs(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from keeplora.models import stand_in

    folder = tiny("llava", tmp_path_factory.mktemp("stand-in") / "model")
    monkeypatch.setattr(stand_in, "stand_in_path", lambda name="stand-in", progress=None: folder)
    namespace: dict[str, Any] = {"base_folder": folder}
    page = [block for block in blocks(ROOT / "docs/questions.md") if block.runs]
    assert len(page) >= 8
    for block in page:
        run_block(block, here, namespace)

    # What the page says about the results.
    run = here / "runs/first-questions-keeplora++-seed0"
    assert (run / "predictions/after-2/colours.jsonl").is_file()
    results = json.loads((here / "runs/with-general-lora-seed0/results.json").read_text())
    assert results["probes"] == ["general"]
    assert isinstance(namespace["answer"], str)
    family = namespace["trained"].family
    item = family.encode(
        turns("What colour is this?"), [namespace["Image"].new("RGB", (40, 40))],
        answers=False,
    )  # fmt: skip
    inputs = {k: v for k, v in item.items() if k not in ("labels", "token_kinds")}
    with torch.no_grad():
        wanted = family.model(**inputs).logits
        torch.testing.assert_close(namespace["merged"].eval()(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(namespace["adapted"].eval()(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    config = json.loads((here / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]


def turns(question: str) -> tuple[Any, ...]:
    from keeplora.data.conversations import asked

    return asked(question, 1)
