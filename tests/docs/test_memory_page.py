"""docs/memory.md: its commands run, and its numbers are the code's."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.docs.documents import ROOT, blocks, run_block

PAGE = ROOT / "docs/memory.md"


@pytest.fixture
def printed(here, capsys):
    """What each command of the page prints, in order."""
    told, namespace = [], {}
    for block in (block for block in blocks(PAGE) if block.runs):
        run_block(block, here, namespace)
        told += [capsys.readouterr().out] if block.language == "bash" else []
    assert len(told) == 2
    assert sorted(path.name for path in here.iterdir()) == ["experiment.yaml", "llava-1.5-7b"]  # a plan writes nothing
    return told


def rows(text: str, separator: str) -> dict[str, list[str]]:
    """The lines of the memory table: label -> the four values."""
    cells = [[cell.strip() for cell in line.split(separator)[1:]] for line in text.splitlines() if separator in line]
    value = re.compile(r"[\d.]+ [GM]iB|-")
    return {row[0]: row[1:5] for row in cells if len(row) > 4 and all(value.fullmatch(cell) for cell in row[1:5])}


def test_the_page_says_what_the_command_prints(printed):
    text = PAGE.read_text(encoding="utf-8")
    stated, found = rows(text, "|"), rows(printed[0], "│")
    assert len(stated) == 12
    assert stated == found
    flat = " ".join(printed[0].split())
    for pattern in (r"P = ([\d,]+) param", r"Q = ([\d,]+) of them", r"25 ?% ([\d.]+ GiB)", r"75 ?% ([\d.]+ GiB)"):
        ours, theirs = (re.search(pattern, body) for body in (" ".join(text.split()), flat))
        assert ours is not None
        assert theirs is not None
        assert ours[1] == theirs[1]
    assert "trained parameters per task: 87,556,096" in flat
    assert "grows by 613.2 MiB of A and B" in text
    assert "613.2 MiB per task (A, B)" in flat
    assert "targets: 2 in model.multi_modal_projector, 224 in model.language_model" in flat


def test_fewer_targets_give_the_numbers_that_the_page_promises(printed):
    found = rows(printed[1], "│")
    said = re.search(
        r"G falls to ([\d.]+ [GM]iB), C to ([\d.]+ GiB)", " ".join(PAGE.read_text(encoding="utf-8").split())
    )
    assert said is not None
    assert (found["G of all targets"][3], found["C of all inputs"][3]) == said.groups()
    assert "64 in model.language_model" in printed[1]
    assert "4bit *" in printed[1]


def test_the_example_is_the_pages_experiment():
    example = yaml.safe_load((ROOT / "examples/llava-7b/experiment.yaml").read_text(encoding="utf-8"))
    page = next(block for block in blocks(PAGE) if block.file == "experiment.yaml")
    assert example == yaml.safe_load(page.text)
