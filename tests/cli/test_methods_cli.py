"""`keeplora methods`, and docs/methods.md, which holds the same table."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from keeplora.cli.methods import COLUMNS, axis_text, describe, row
from keeplora.methods import get_method, method_names
from tests.cli.conftest import CHECKOUT

PAGE = CHECKOUT / "docs/methods.md"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("│" if "│" in line else "|")]


@pytest.mark.parametrize("words", [("methods",), ("methods", "ls")], ids=" ".join)
def test_the_table_has_every_method_and_column(cli, words):
    answer = cli(*words)
    assert answer.code == 0, answer.err
    table = answer.out
    header = next(line for line in table.splitlines() if "title" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == list(COLUMNS.values())
    rows = [cells(line) for line in table.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows if row[0]] == method_names()
    # A row may go on over several lines: its words in order are the registry's.
    found: dict[str, list[list[str]]] = {}
    name = ""
    for line in rows:
        name = line[0] or name
        found.setdefault(name, []).append(line)
    for name, lines in found.items():
        joined = [" ".join(" ".join(line[i] for line in lines).split()) for i in range(len(COLUMNS))]
        assert joined == row(get_method(name))


def test_task_identity_in_words():
    assert row(get_method("oracle"))[list(COLUMNS).index("task_identity")] == "needed"
    assert row(get_method("lora"))[list(COLUMNS).index("task_identity")] == "no"


def test_kinds_and_export_in_words(cli):
    assert row(get_method("lora"))[list(COLUMNS).index("kinds")] == "classification, generation"
    assert row(get_method("lwf"))[list(COLUMNS).index("kinds")] == "classification"
    answer = cli("methods", "show", "moelora")
    assert "kinds: classification, generation" in answer.out
    assert f"export: none: it {get_method('moelora').unmergeable}" in answer.out
    assert "export: one adapter, or merged" in cli("methods", "show", "lora").out
    found = json.loads(cli("methods", "show", "oracle", "--json").out)
    assert found["kinds"] == ["classification", "generation"]
    assert found["unmergeable"].startswith("keeps one model per task")


@pytest.mark.parametrize("words", [("methods", "--json"), ("methods", "ls", "--json")], ids=" ".join)
def test_the_list_as_json(cli, words):
    answer = cli(*words)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [entry["name"] for entry in found] == method_names()
    oracle = found[-1]
    assert oracle["name"] == "oracle"
    assert oracle["task_identity"] is True
    assert oracle["inference"] == get_method("oracle").inference


@pytest.mark.parametrize("name", method_names())
def test_every_method_can_be_shown(cli, name):
    answer = cli("methods", "show", name)
    assert answer.code == 0, answer.err
    method = get_method(name)
    lines = answer.out.splitlines()
    assert lines[0] == f"{name}: {method.title}"
    assert lines[1] == method.summary
    assert f"paper: {method.paper or 'none'}" in lines
    assert f"state kept: {method.state}" in lines
    for key, value in method.config.items():
        assert f"fixed by the method: tuner.{key} = {value}" in lines
    for key, axis in method.search.items():
        assert f"keeplora tune varies {key}: {axis_text(axis)}" in lines
    options = fields(method.learner.Options)
    assert ("options: none of its own" in lines) == (not options)
    table = {row[0]: row[1:] for row in map(cells, lines) if len(row) == 3}
    for option in options:
        assert option.metadata["help"], f"{name}: option {option.name} has no help"
        assert table[option.name][0] == str(option.default)
        assert table[option.name][1].split()[:3] == option.metadata["help"].split()[:3]
    assert json.loads(cli("methods", "show", name, "--json").out) == json.loads(json.dumps(describe(method)))


def test_json_of_one_method(cli):
    found = json.loads(cli("methods", "show", "rail-dual", "--json").out)
    assert found["search"]["tuner.options.lam"] == ["log", 1e-5, 1e-1]
    by_name = {option["name"]: option for option in found["options"]}
    assert by_name["lam"]["default"] == 1e-3
    assert by_name["gamma"]["help"].startswith("γ of the kernel")
    assert json.loads(cli("methods", "show", "keeplora", "--json").out)["config"] == {
        "gamma": 1.0, "schedule": "constant",
    }  # fmt: skip


def test_an_unknown_name_gets_a_suggestion(cli):
    answer = cli("methods", "show", "orakle")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("Error: method: unknown name 'orakle'; did you mean 'oracle'?")


def test_the_page_has_the_registrys_table():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    expected = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for name in method_names():
        first, *rest = row(get_method(name))
        expected.append([f"`{first}`", *rest])
    told = "\n".join(f"| {' | '.join(line)} |" for line in expected)
    assert [cells(line) for line in lines] == expected, f"docs/methods.md is out of date; its table should be\n{told}"


def test_the_page_names_each_paper_and_what_differs():
    text = PAGE.read_text(encoding="utf-8").partition("## Papers, and where ours differs")[2]
    items = [" ".join(item.split()) for item in re.split(r"^- ", text, flags=re.M)[1:]]
    assert len(items) == len(method_names())
    for name, item in zip(method_names(), items, strict=True):
        start = f"`{name}` ({get_method(name).paper or 'no paper'}): "
        assert item.startswith(start), f"docs/methods.md: this should begin with {start!r}: {item}"
        assert len(item) > len(start) + 20
