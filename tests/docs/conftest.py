from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import ROOT, blocks, run_block
from tests.models.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("docs-models")
    return {family: make_tiny(family, root / family) for family in ("embedded", "clip")}


@pytest.fixture
def tiny_models(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents' model names lead to tiny models of the same classes; nothing is downloaded."""
    from transformers import CLIPModel

    from keeplora.models import assets

    monkeypatch.setattr(assets, "embedded_path", lambda: tiny_folders["embedded"])
    stock = CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained",
        lambda name, **kw: stock(tiny_folders["clip"] if name == "openai/clip-vit-base-patch16" else name, **kw),
    )  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tutorial_data(here: Path) -> dict[str, Any]:
    """The pictures and the experiment.yaml of getting-started.md."""
    namespace: dict[str, Any] = {}
    first = [block for block in blocks(ROOT / "docs/getting-started.md") if block.runs][:2]
    assert [block.language for block in first] == ["python", "yaml"]
    for block in first:
        run_block(block, here, namespace)
    return namespace
