"""docs/ledger.md: its blocks run, and what it says of them is so."""

from __future__ import annotations

import re

import pytest

from keeplora.tuner import Ledger
from tests.docs.documents import ROOT, blocks, run_block

PAGE = ROOT / "docs/ledger.md"


@pytest.mark.usefixtures("tiny_models", "tutorial_data")
def test_the_page_runs(here, capsys):
    namespace = {}
    told = []
    for block in (block for block in blocks(PAGE) if block.runs):
        run_block(block, here, namespace)
        told.append(capsys.readouterr().out)
    assert len(told) == 8
    ledger = Ledger.open(here / "runs/shop/ledger")
    assert [(e.kind, e.name) for e in ledger.entries()] == [
        ("task", "colours"), ("task", "shapes"), ("rollback", "colours"), ("task", "shapes"), ("remove", "colours"),
        ("restore", "colours"), ("remove", "colours"), ("purge", "colours"),
    ]  # fmt: skip
    assert ledger.chain().names(ledger.state().active) == ["shapes"]
    assert "checks passed." in told[6]
    assert (here / "shapes-adapter/adapter_model.safetensors").is_file()
    assert (here / "merged-model/model.safetensors").is_file()
    assert "(1, 'task', 'pets')" in told[7]
    assert [e.kind for e in Ledger.open(here / "my-ledger").entries()][3:] == [
        "remove", "restore", "rollback", "rollback", "remove", "purge",
    ]  # fmt: skip


def test_the_methods_that_cannot_let_a_task_go_are_those_that_the_page_names():
    from keeplora.methods import get_method, method_names

    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"Three methods cannot let a single task go(.*?)Rolling back", text, re.S)
    assert found is not None
    named = set(re.findall(r"`([\w-]+)`", found[1]))
    assert named == {name for name in method_names() if get_method(name).learner.irremovable}
