"""docs/published.md is what docs/evidence/published.yaml says, and every command in it names what exists."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from keeplora.experiment.config import load_config
from keeplora.methods import method_names
from tests.docs.documents import ROOT

spec = importlib.util.spec_from_file_location("published", ROOT / "scripts" / "published.py")
assert spec is not None
assert spec.loader is not None
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

DATA = published.read()
PAGE = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_file() -> None:
    assert published.problems(DATA) == []
    assert published.render(PAGE, DATA) == PAGE
    assert re.findall(r"<!-- published: ([\w-]+) -->", PAGE) == [benchmark["id"] for benchmark in DATA["benchmarks"]]


def test_another_figure_changes_the_page() -> None:
    data = copy.deepcopy(DATA)
    data["benchmarks"][0]["rows"][0]["published"][0] = 69.5
    assert "| 69.5 / 65.3 / 65.3 | V |" in published.render(PAGE, data)
    assert "| 69.5 /" not in PAGE


def test_negative_figures_and_missing_ones() -> None:
    assert published.cell([64.98, 53.0, None, -14.97], 2) == "64.98 / 53.00 / – / −14.97"
    assert published.cell([None, None], 1) == "NF"


COMMANDS = sorted(
    {
        published.command(benchmark, DATA["methods"][row["method"]])
        for benchmark in DATA["benchmarks"]
        for row in benchmark["rows"]
    }
    - {""}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_can_be_given(command: str, tmp_path: Path) -> None:
    """The configuration that it asks for loads: suite, order, method and overrides are known and go together."""
    program, verb, *options = shlex.split(command)
    assert (program, verb) == ("keeplora", "run")
    values: dict[str, Any] = {"output": str(tmp_path)}
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key == "-o":
            name, _, text = value.partition("=")
            values[name] = yaml.safe_load(text)
        else:
            values[{"--data": "data_dir"}.get(key, key.removeprefix("--"))] = value
    config = load_config(values)
    assert config.method in method_names()
    assert f"--method {config.method}" in command
    assert config.order_name == values.get("order", "1")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "ZSLC"}, "mtil-1, ZSLC: no such method under methods"),
        ({"published": [69.4, 65.3]}, "mtil-1, Zero-shot: 2 figures for 3 measures"),
        ({"mark": None}, "mtil-1, Zero-shot: a figure needs a mark, and a mark a figure"),
        ({"mark": "X"}, "mtil-1, Zero-shot: unknown mark 'X'; one of V, S, L"),
        ({"ours": {"values": [1, 2, 3]}}, "mtil-1, Zero-shot: ours lacks command, commit, date, page, prints"),
    ],
)
def test_what_is_wrong_is_told(change: dict[str, Any], told: str) -> None:
    data = copy.deepcopy(DATA)
    data["benchmarks"][0]["rows"][0].update(change)
    assert published.problems(data) == [told]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prints": "1,966,081"}, "docs/results.md does not print '1,966,081'"),
        ({"page": "docs/none.md"}, "docs/none.md does not print '1,966,080'"),
        ({"values": [1.97]}, "ours has 1 figures for 3 measures"),
    ],
)
def test_a_cell_of_ours_needs_its_evidence(change: dict[str, Any], told: str) -> None:
    data = copy.deepcopy(DATA)
    row = next(row for row in data["benchmarks"][-1]["rows"] if row["method"] == "Sequential LoRA")
    row["ours"].update(change)
    assert published.problems(data) == [f"cost, Sequential LoRA: {told}"]


def test_no_published_figure_is_given_for_what_could_not_be_obtained() -> None:
    for benchmark in DATA["benchmarks"]:
        for row in benchmark["rows"]:
            if row["method"] == "KeepLoRA++":
                assert set(row["published"]) == {None}
