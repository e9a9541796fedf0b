"""docs/publishing.md is run, against a stand-in of the hub; what it lists is what there is."""

from __future__ import annotations

import re

import pytest

from tests.docs.documents import ROOT, blocks, run_block, run_keeplora

PAGE = ROOT / "docs/publishing.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.usefixtures("tiny_models", "tutorial_data")
def test_the_page_runs(hub, here, capsys):
    run_keeplora(["run", "experiment.yaml", "-o", "training.epochs=1", "--quiet"], "publishing.md")
    namespace: dict = {}
    found = [block for block in blocks(PAGE) if block.runs]
    assert len(found) == 4
    for block in found:
        run_block(block, here, namespace)
    repo = hub.repos["me/two-tasks"]
    assert repo.private
    files = set(repo.commits[namespace["done"].commit])
    assert {"merged/model.safetensors", "figures/curves.png", "ledger/ledger.json", "adapter_model.safetensors"} < files
    assert len(namespace["learner"].records) == 2
    assert (here / "my-copy/ledger/ledger.json").is_file()
    assert "license: cc-by-4.0" in repo.commits[namespace["done"].commit]["README.md"].decode()
    assert (here / "card.md").read_text(encoding="utf-8").startswith("---\n")
    tree = next(block.text for block in blocks(PAGE) if block.text.startswith("README.md"))
    unlisted = {p for p in files if p.split("/")[0] not in tree and p != ".gitattributes"}
    assert not unlisted


def test_every_option_is_listed():
    import typer

    from keeplora.cli import app

    command = typer.main.get_command(app).commands["push"]  # type: ignore[attr-defined]
    offered = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert set(re.findall(r"`(--[a-z-]+)`", PAGE.read_text(encoding="utf-8").partition("From Python")[0])) == offered
