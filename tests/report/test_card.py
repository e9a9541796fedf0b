"""The model card as a page and as what the hub reads from it, whatever a task is called."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from fake_runs import PROBES, TASKS, make_run
from huggingface_hub import ModelCard

from keeplora.report.card import (
    Base,
    CardFacts,
    Contents,
    Leak,
    Opening,
    Room,
    TaskFacts,
    cell,
    matrix,
    render_card,
    write_figure,
)
from keeplora.report.runs import load_run

CLIP = Base("openai/clip", "CLIPModel", "ab" * 32, hub_id="openai/clip", module="transformers", licence="mit",
            stock=Opening(("from transformers import CLIPModel",), ('base = CLIPModel.from_pretrained("x/y")',)))  # fmt: skip


def facts(**changes) -> CardFacts:
    values = {"repo_id": "me/pets", "title": "pets", "base": CLIP, "tasks": (TaskFacts("pets", learns="37 classes"),)}
    return CardFacts(**{**values, **changes})


def head(text: str) -> dict:
    assert text.startswith("---\n")
    assert text.count("\n---\n") >= 1
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, name: str) -> str:
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """Rows of the first table, its line of dashes left out, split as Markdown splits."""
    import re

    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len({len(row) for row in rows[:2]}) == 1
    return [[entry.strip() for entry in row] for row in (rows[0], *rows[2:])]


def test_only_what_is_known_is_in_the_head():
    bare = dataclasses.replace(CLIP, hub_id=None, licence=None)
    assert head(render_card(facts(base=bare))) == {
        "library_name": "keeplora",
        "tags": ["keeplora", "continual-learning"],
    }
    full = facts(
        licence="apache-2.0", languages=("en", "de"), pipeline_tag="zero-shot-image-classification",
        contents=Contents(adapter=True), tasks=(TaskFacts("pets", dataset="me/pets-data"), TaskFacts("b", dataset="a/b")),
    )  # fmt: skip
    assert head(render_card(full)) == {
        "base_model": "openai/clip", "datasets": ["a/b", "me/pets-data"], "language": ["en", "de"], "library_name": "peft",
        "license": "apache-2.0", "pipeline_tag": "zero-shot-image-classification",
        "tags": ["keeplora", "continual-learning", "lora", "peft"],
    }  # fmt: skip


def test_a_licence_that_the_hub_does_not_list():
    told = head(render_card(facts(licence="Our Own 1.0")))
    assert (told["license"], told["license_name"]) == ("other", "Our Own 1.0")
    assert "| what is learned here | Our Own 1.0 |" in render_card(facts(licence="Our Own 1.0"))
    assert head(render_card(facts(licence="MIT")))["license"] == "mit"


def test_licences_are_never_guessed():
    text = section(render_card(facts(base=dataclasses.replace(CLIP, licence=None))), "Licences")
    assert "| what is learned here | not told |" in text
    assert "| the base model, openai/clip | not known here: see the base model |" in text
    assert "| the data of pets | not told |" in text


NASTY = [
    "a | b",
    "x`y`",
    "<script>alert(1)</script>",
    "# head",
    "[me](http://x)",
    "![i](http://x)",
    "two\nlines",
    "---",
    "~~~",
]


@pytest.mark.parametrize("name", [*NASTY, "名前", "a" * 200, "'\"", "{{ 7 * 7 }}"])
def test_a_name_cannot_leave_its_cell(name):
    task = TaskFacts(name, learns=name, licence=name, fingerprint="f" * 64, dataset=None)
    text = render_card(facts(tasks=(task,), title=name, licence=name))
    rows = table(section(text, "What it learned"))
    assert [len(row) for row in rows] == [10, 10]
    assert rows[1][1] == cell(name)
    assert "<script" not in text.split("\n---\n")[1]
    assert "49" not in text
    assert text.count("\n# ") == 1
    assert head(text)["license_name"] == name
    ModelCard(text)  # the hub's library reads it


def test_scores(tmp_path):
    run = load_run(make_run(tmp_path, "run"))
    tasks = tuple(TaskFacts(name, test=100 + i) for i, name in enumerate(TASKS))
    text = render_card(facts(run=run, tasks=tasks))
    rows = table(section(text, "How well"))
    sets = [*TASKS, *PROBES]
    assert [entry.split(" (n")[0] for entry in rows[0][1:]] == [cell(name) for name in sets]
    body = [row for row in rows if row[0].startswith(("untouched", "after"))]
    expected = [[*a, *p] for a, p in zip(run.accuracy, run.probe_accuracy, strict=True)]
    assert [[float(v) for v in row[1:]] for row in body] == [[round(v, 1) for v in row] for row in expected]
    index = head(text)["model-index"][0]
    assert index["name"] == "pets"
    found = {r["dataset"]["name"]: r["metrics"][0] for r in index["results"]}
    assert {name: m["value"] for name, m in found.items()} == {
        name: round(value, 2) for name, value in zip(TASKS, run.accuracy[-1], strict=True)
    }
    assert found[TASKS[0]]["name"] == "accuracy in percent after 5 tasks, n = 100"


def test_many_sets_are_told_one_by_one(tmp_path):
    names = [f"task {i}" for i in range(14)]
    run = load_run(make_run(tmp_path, "run", tasks=names, probes=[], done=6))
    scores = matrix(facts(run=run))
    assert scores is not None
    assert len(scores["rows"]) == 14
    first, last = scores["rows"][0], scores["rows"][-1]
    assert [float(v) for v in first[1:]] == [round(run.accuracy[i][0], 1) for i in (0, 1, 6)]
    assert last[2] == "–"  # not learned yet


def test_fates_and_what_came_and_went():
    tasks = (TaskFacts("a"), TaskFacts("b", fate="undone: it was not accepted"))
    text = render_card(facts(tasks=tasks, gone=("old",), newer=("c",), method="KeepLoRA++"))
    assert "KeepLoRA++: 1 task learned one after another on" in text
    assert "(removed or rolled back since): old" in text
    assert "not among the numbers below: c" in text
    assert "Taken out again" not in text
    assert "Taken out again: x, y." in render_card(facts(removed=("x", "y")))
    assert table(section(text, "What it learned"))[2][7] == "undone: it was not accepted"


def test_when_each_task_was_learned():
    told = TaskFacts("a", when="2026-06-20T10:00:12+00:00")
    rows = table(section(render_card(facts(tasks=(told, TaskFacts("b")))), "What it learned"))
    assert [len(row) for row in rows] == [11, 11, 11]
    assert [row[8] for row in rows] == ["learned at", "2026-06-20 10:00 UTC", "–"]


def test_room_and_leaks():
    text = section(
        render_card(facts(
            rooms=(Room("vision", 96, 384, 40),), fullest=Room("layers.0.q", 31, 32),
            leak=Leak(3e-7, "layers.1.k", "pets", 1e-4, 9e-5),
            protection=(("γ", "0.2"),), memory="their features",
        )), "What is protected, and how much room is left",
    )  # fmt: skip
    assert "| vision | 96 | 384 | 40 | 75.0 % |" in text
    assert "`layers.0.q`: 31 of 32" in text
    assert "at most 3.0e-07" in text
    assert "1.0e-04, beside 9.0e-05" in text
    assert "protects no subspace" in render_card(facts())


def test_the_figure(tmp_path):
    from PIL import Image

    run = load_run(make_run(tmp_path, "run"))
    file = write_figure(run, tmp_path / "out")
    assert file.relative_to(tmp_path / "out").as_posix() == "figures/curves.png"
    with Image.open(file) as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert picture.size[0] > 600
    assert colours is not None
    assert len(colours) > 50
    assert file.read_bytes() == write_figure(run, tmp_path / "again").read_bytes()
