"""Suites as YAML: the packaged ones against the published protocol, a person's own, and every mistake as a sentence."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from keeplora.data import SOURCES, load_task
from keeplora.data.conversation_spec import parse_conversation_spec
from keeplora.data.spec import parse_spec
from keeplora.errors import ConfigError
from keeplora.experiment.config import load_config
from keeplora.experiment.presets import preset_names, preset_values
from keeplora.suites import data_folder, load_suite, suite_folder, suite_names

#: The published protocol of MTIL: classes, train, test, prompt.
MTIL = {
    "Aircraft": (100, 3334, 3333, "a photo of a {c}, a type of aircraft."),
    "Caltech101": (101, 6941, 1736, "a photo of a {c}."),
    "CIFAR100": (100, 50000, 10000, "a photo of a {c}."),
    "DTD": (47, 1880, 1880, "a photo of a {c} thing."),
    "EuroSAT": (10, 21600, 5400, "a centered satellite photo of {c}."),
    "Flowers": (102, 1020, 6149, "a photo of a {c}, a type of flower."),
    "Food": (101, 75750, 25250, "a photo of a {c}, a type of food."),
    "MNIST": (10, 60000, 10000, 'a photo of the number: "{c}".'),
    "OxfordPet": (37, 3680, 3669, "a photo of a {c}, a type of pet."),
    "StanfordCars": (196, 8144, 8041, "a photo of the {c}, a type of car."),
    "SUN397": (397, 87003, 21751, "a photo of the {c}."),
}
ORDER_II = (
    "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD", "EuroSAT", "CIFAR100"
)  # fmt: skip


def counts(spec: dict) -> tuple[int, int, int]:
    return spec["expect"]["classes"], spec["expect"]["train"], spec["expect"]["test"]


def test_the_packaged_suites():
    assert suite_names() == [
        "cl-vista", "demo", "demo-long", "demo-small", "mllm-dcl", "mtil", "ucit", "video", "vqa", "x-tail",
    ]  # fmt: skip


@pytest.mark.parametrize("name", suite_names())
def test_every_packaged_suite_is_whole(name):
    suite = load_suite(name)
    assert suite["name"] == name
    sources = {name: source.keys for name, source in SOURCES.items()}
    for spec in (*suite["tasks"], *suite["probes"]):
        if SOURCES[spec["source"]].kind == "generation":
            assert parse_conversation_spec(spec, sources).scorer == spec["scorer"]
        else:
            spec = {key: value for key, value in spec.items() if key != "split_classes"}
            assert parse_spec(spec, sources).templates == spec["templates"]
    listed = learned(suite)
    # Of three no second order is published; the two with six are for studies of orders.
    many = {"mllm-dcl": 1, "ucit": 1, "cl-vista": 1, "demo-small": 6, "demo-long": 6}.get(name, 2)
    assert list(suite["orders"]) == [str(number) for number in range(1, many + 1)]
    for entry in suite["orders"].values():
        assert sorted(entry["order"]) == sorted(listed)
        assert entry.get("preset", "default") in preset_names()
    assert suite["orders"]["1"]["order"] == listed
    assert len({tuple(entry["order"]) for entry in suite["orders"].values()}) == many


def learned(suite: dict[str, Any]) -> list[str]:
    """The tasks as the experiment names them: one with `split_classes` is its parts."""
    parts = {spec["name"]: spec.get("split_classes", {}).get("tasks") for spec in suite["tasks"]}
    return [part for name, n in parts.items() for part in ([f"{name}-{i + 1}" for i in range(n)] if n else [name])]


def shuffled(names: list[str], seed: int) -> list[str]:
    """As `--order shuffle-SEED` does."""
    names = list(names)
    random.Random(seed).shuffle(names)
    return names


def test_the_shuffles_that_are_written_out_are_those_of_their_seeds():
    for name, seeds in {"demo-small": (3, 11, 13, 28), "demo-long": (3, 4, 5, 6)}.items():
        suite = load_suite(name)
        orders = [entry["order"] for entry in suite["orders"].values()]
        assert orders[2:] == [shuffled(orders[0], seed) for seed in seeds], name


def test_in_six_orders_each_task_of_demo_small_is_first_and_last():
    orders = [entry["order"] for entry in load_suite("demo-small")["orders"].values()]
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(orders[0])


def test_demo_long_is_twenty_two_tasks_that_share_no_class():
    suite = load_suite("demo-long")
    config = load_config({"suite": "demo-long", "method": "lora", "output": "unused"})
    tasks = [load_task(spec, suite_folder()) for spec in config.tasks]
    assert [task.name for task in tasks] == learned(suite)
    assert len(tasks) == 22
    assert {len(task.classes) for task in tasks} == {2, 3}
    classes = [(task.templates[0], name) for task in tasks for name in task.classes]
    assert len(classes) == len(set(classes)) == 49  # every class of the demo suite, once
    assert [task.warnings for task in tasks] == [[]] * 22
    assert all(28 <= len(task.train) <= 48 and 14 <= len(task.test) <= 24 for task in tasks)
    chance = sum(1 / len(task.classes) for task in tasks) / len(tasks)
    assert f"chance is {100 * chance:.0f} percent" in suite["description"]


def test_mtil_is_the_published_protocol():
    suite = load_suite("mtil")
    found = {spec["name"]: (*counts(spec), *spec["templates"]) for spec in suite["tasks"]}
    assert found == MTIL
    assert list(found) == list(MTIL)  # order I is the order of the table
    assert sum(classes for classes, *_ in found.values()) == 1201
    assert suite["orders"]["2"]["order"] == list(ORDER_II)
    assert suite["candidates"] == "own"
    assert suite["model"] == {"name": "openai/clip-vit-base-patch16"}
    assert suite["probes"] == []


def test_what_is_left_after_the_80_20_cuts_adds_up():
    """Three datasets have no official split: int(0.8 n) of all pictures are for training."""
    for name, everything in {"Caltech101": 8677, "EuroSAT": 27000, "SUN397": 108754}.items():
        assert MTIL[name][1:3] == (int(0.8 * everything), everything - int(0.8 * everything))


def test_the_presets_know_the_tasks_of_mtil():
    """A preset's per-task epochs go by name: a name that it does not know would silently get the default."""
    first = preset_values("mtil", MTIL)["training"]["epochs"]
    assert first == {"default": 10, "SUN397": 5}
    second = preset_values("mtil-order-ii", MTIL)["training"]["epochs"]
    assert {name: second.get(name, second["default"]) for name in ORDER_II} == {
        "StanfordCars": 5, "Food": 2, "MNIST": 5, "OxfordPet": 5, "Flowers": 5, "SUN397": 5, "Aircraft": 10, "Caltech101": 10,
        "DTD": 10, "EuroSAT": 10, "CIFAR100": 10,
    }  # fmt: skip


def test_x_tail_is_mtil_without_cifar100_and_without_task_identity():
    suite = load_suite("x-tail")
    assert [spec["name"] for spec in suite["tasks"]] == [name for name in MTIL if name != "CIFAR100"]
    classes = {spec["name"]: spec["expect"]["classes"] for spec in suite["tasks"]}
    assert classes == {name: row[0] for name, row in MTIL.items() if name != "CIFAR100"} | {"Caltech101": 100}
    assert sum(classes.values()) == 1100
    assert suite["candidates"] == "all"
    for spec in suite["tasks"]:
        assert spec["templates"] == ["a photo of a {}."]
        assert spec["shots"] == 16
        assert spec["split_seed"] == 42
        assert spec["expect"]["train"] == 16 * spec["expect"]["classes"]
        assert (spec["source"] == "mnist") == (spec["name"] == "MNIST")


@pytest.mark.parametrize("name", ["mtil", "x-tail"])
def test_every_dataset_that_is_not_packaged_says_where_to_get_it(name):
    suite = load_suite(name)
    assert set(suite["fetch"]) == {spec["name"] for spec in suite["tasks"]}
    assert all("fetch" not in spec for spec in suite["tasks"])  # no key of a task
    for words in suite["fetch"].values():
        assert 60 < len(words) < 400
        assert "\n" not in words


def test_a_suite_is_new_with_every_call():
    load_suite("demo")["tasks"].clear()
    assert len(load_suite("demo")["tasks"]) == 5


def test_an_unknown_suite_gets_a_hint():
    with pytest.raises(ConfigError, match=r"did you mean 'demo-small'.*path of its YAML file"):
        load_suite("demo-smal")


OWN = """\
name: mine
description: d
tasks:
  - {name: a, source: folder, path: a, fetch: " from  the\\n cellar "}
  - {name: b, source: folder, path: b, split_classes: {tasks: 2}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(OWN, encoding="utf-8")
    return tmp_path / "mine.yaml"


def test_a_suite_of_ones_own(own, monkeypatch):
    suite = load_suite(own)
    assert suite["probes"] == []
    assert suite["fetch"] == {"a": "from the cellar"}
    assert suite["tasks"][0] == {"name": "a", "source": "folder", "path": "a"}
    assert suite_folder(own) == own.parent
    assert data_folder(own) == own.parent
    assert data_folder(own, "elsewhere") == own.parent  # it says itself where its pictures are
    monkeypatch.chdir(own.parent)
    assert load_suite("mine.yaml") == load_suite("./mine.yaml") == suite
    with pytest.raises(ConfigError, match="unknown suite 'mine'"):  # a bare name is a packaged suite's
        load_suite("mine")


def test_numbers_and_words_are_read_as_in_an_experiment(own):
    own.write_text(OWN + "training: {learning_rate: 1e-3}\norders: {on: [a, b-1, b-2]}\n", encoding="utf-8")
    suite = load_suite(own)
    assert suite["training"] == {"learning_rate": 0.001}
    assert suite["orders"] == {"on": {"order": ["a", "b-1", "b-2"]}}


def test_where_external_data_is(own, tmp_path, monkeypatch):
    own.write_text(OWN + "data: external\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEEPLORA_DATA", raising=False)
    assert data_folder(own) == tmp_path / "data"
    monkeypatch.setenv("KEEPLORA_DATA", str(tmp_path / "disk"))
    assert data_folder(own) == tmp_path / "disk"
    assert data_folder(own, tmp_path / "other") == tmp_path / "other"
    assert data_folder("demo") == suite_folder() == Path(suite_folder("demo"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", r"mine\.yaml, line 1, column \d+: "),
        ("", "a suite is a mapping with name, description, tasks"),
        ("- a", "a suite is a mapping"),
        ("name: mine\ntask: []", "unknown key 'task'; did you mean 'tasks'"),
        ("name: mine", "`description` is missing; add it"),
        ("name: mine\nname: mine", "key 'name' is given twice"),
        (OWN.replace("name: mine", "name: other"), "`name` is 'other'; it must be the file's own name, 'mine'"),
        ("name: mine\ndescription: 3", "`description` is 3, but must be text"),
        ("name: mine\ndescription: d\ntasks: {a: b}", r"`tasks` is \{'a': 'b'\}, but must be a list"),
        ("name: mine\ndescription: d\ntasks: []", "`tasks` is empty; add it"),
        (OWN + "seed: true\n", "`seed` is True, but must be a whole number"),
        ("name: mine\ndescription: d\ntasks: [{source: pack}]", "`tasks.0`, {'source': 'pack'}, has no `name`"),
        (OWN + "probes: [{name: a}]\n", "two tasks or probes are called 'a'; rename one"),
        (OWN + "probes: [{name: c, fetch: 3}]\n", "`fetch` of 'c' is 3; say in words"),
        (OWN + "data: pictures\n", "`data` is 'pictures'; write `data: external`"),
        (OWN + "candidates: every\n", "`candidates` is 'every' "),
        (OWN + "orders: {1: a}\n", "`orders.1` is 'a'; give the list of all task names"),
        (OWN + "orders: {1: [a]}\n", "`orders.1` leaves out 'b-1', 'b-2'; name every task once"),
        (OWN + "orders: {1: [a, b]}\n", "`orders.1` names an unknown task 'b'"),
        (OWN + "orders: {1: [a, a, b-1, b-2]}\n", "`orders.1` names 'a' twice"),
        (OWN + "orders: {1: {presett: mtil}}\n", "`orders.1`: unknown key 'presett'; did you mean 'preset'"),
        (OWN + "orders: {1: {preset: 3}}\n", "`orders.1`: `preset` is 3, but must be text"),
        (OWN + "orders: {1: {preset: mtil}}\n", "`orders.1` leaves out 'a', 'b-1', 'b-2'"),
        (OWN + "orders: {true: [a, b-1, b-2]}\n", "an order's name is a word or a whole number"),
        (OWN + "orders: {1: [a, b-1, b-2], '1': [a, b-1, b-2]}\n", "an order's name is .* of its own; rename it"),
    ],
)
def test_a_broken_suite_is_refused_with_a_sentence(own, text, message):
    own.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_suite(own)
    assert str(caught.value).startswith(str(own))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no.yaml",
            r"no\.yaml: no such suite file \(packaged suites: cl-vista, demo, demo-long, demo-small, mllm-dcl, mtil, ucit, "
            r"video, vqa, x-tail\)",
        ),
        ("folder/", "is a folder; name the suite's YAML file in it"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_suite(f"{tmp_path}/{name}")


def test_no_two_datasets_share_a_folder():
    for name in ("mtil", "x-tail"):
        paths = Counter(spec["path"] for spec in load_suite(name)["tasks"])
        assert max(paths.values()) == 1
        assert all(re.fullmatch(r"[\w-]+", path) for path in paths)
