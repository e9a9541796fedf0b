"""The pages on adding a suite's source and a model family: what they add is put where they say, and works."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import ROOT, Block, blocks, run_block

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(ROOT / "docs" / page) if block.runs]


def imported(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import a page's file as the module of the package that it would be; its name."""
    name = file.removeprefix("src/").removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, folder / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return name


def line_of(page: str, name: str, room: str) -> str:
    """The registry line that the page gives, which must be the one that is used here."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"`{room}`" in text
    assert (ROOT / room).is_file()
    found = re.search(rf'^    ("{name}": .*),$', text, re.M)
    assert found is not None
    return found[1]


@pytest.mark.usefixtures("tiny_models")
def test_adding_a_suite(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from keeplora import data
    from keeplora.data import Source, load_task
    from keeplora.errors import DataError

    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    file, *rest = runnable("adding-a-suite.md")
    run_block(file, here, {})
    assert file.file is not None
    imported(here, file.file, monkeypatch)
    line = line_of("adding-a-suite.md", "arrays", "src/keeplora/data/__init__.py")
    monkeypatch.setattr(data, "SOURCES", {**data.SOURCES, **eval(f"{{{line}}}", {"Source": Source})})
    namespace: dict[str, Any] = {}
    for block in rest:
        run_block(block, here, namespace)
    assert "All 2 datasets are there and sound." in capsys.readouterr().out
    entries = json.loads((here / "runs/lab-keeplora++-seed0/data.json").read_text())["tasks"]
    assert [(entry["classes"], entry["train"], entry["test"]) for entry in entries] == [
        (["red dye", "blue dye"], 16, 6), (["dark", "middle", "bright"], 24, 9),
    ]  # fmt: skip
    assert all(entry["warnings"] == [] for entry in entries)

    namespace["np"].savez("half.npz", train_images=namespace["np"].zeros((2, 28, 28, 3), "uint8"))
    with pytest.raises(DataError, match="has no array 'train_labels', only train_images"):
        load_task({"name": "half", "source": "arrays", "path": "half.npz"}, here)


def test_adding_a_model(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ChineseCLIPModel

    from keeplora import models

    file, *rest = runnable("adding-a-model.md")
    run_block(file, here, {})
    assert file.file is not None
    name = imported(here, file.file, monkeypatch)
    line = line_of("adding-a-model.md", "chinese_clip", "src/keeplora/models/__init__.py")
    family = eval(f"{{{line}}}")
    assert family["chinese_clip"][0] == name
    monkeypatch.setattr(models, "FAMILIES", {**models.FAMILIES, **family})
    namespace: dict[str, Any] = {}
    for block in rest:
        run_block(block, here, namespace)
    assert namespace["encoder"].family == "chinese-clip"
    assert "chinese-clip" in capsys.readouterr().out
    results = json.loads((here / "runs/chinese-keeplora++-seed0/results.json").read_text())
    assert results["audit"]["factor_leak_max"] <= 1e-5
    merged = ChineseCLIPModel.from_pretrained(here / "merged").state_dict()
    base = namespace["model"].state_dict()
    assert set(merged) == set(base)
    assert any(not merged[key].equal(base[key]) for key in base)  # and it learned


def test_the_table_of_what_may_differ_names_what_there_is() -> None:
    from keeplora.models.dual_encoder import ATTENTION_SUFFIXES, DualEncoder

    text = (ROOT / "docs/adding-a-model.md").read_text(encoding="utf-8")
    table = text.split("## What may differ")[1].split("## Try it")[0]
    named = {
        name
        for row in re.findall(r"^\| [^|]+\| [^|]+\| ([^|]+)\|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert {"_padding", "token_masks", "picture_masks", "default_target_modules", "compare", "logits"} <= named
    assert all(hasattr(DualEncoder, name) for name in named - {"CLIP"})
    assert ATTENTION_SUFFIXES
