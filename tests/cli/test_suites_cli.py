"""`keeplora suites`: what it lists and shows, and what the doctor's exit status, table and JSON say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from keeplora.suites import load_suite
from tests.data.benchmarks.mini import MAKERS, make_mini


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEEPLORA_DATA", raising=False)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mini(tmp_path_factory.mktemp("mtil"), [source for source in MAKERS if source != "coop"])


@pytest.fixture
def own(tmp_path: Path, mini: Path) -> Path:
    """A suite of one's own on two of the miniature datasets, with the counts that they have."""
    file = tmp_path / "own.yaml"
    file.write_text(f"""\
name: own
description: two datasets
data: external
tasks:
  - {{name: Food, source: food101, path: food-101, expect: {{classes: 3, train: 15, test: 9}}, fetch: the cellar}}
  - {{name: Digits, source: mnist, path: {mini}/MNIST, split_classes: {{tasks: 5}}}}
orders: {{backwards: [Digits-5, Digits-4, Digits-3, Digits-2, Digits-1, Food]}}
""")
    return file


@pytest.mark.parametrize("words", [("suites",), ("suites", "ls")])
def test_suites_alone_lists(cli, words):
    answer = cli(*words)
    assert answer.code == 0
    assert all(name in answer.out for name in ("demo", "demo-small", "mtil", "x-tail", "hieroglyphs", "CIFAR100"))


def test_show_tells_the_protocol(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    answer = cli("suites", "show", "mtil")
    assert answer.code == 0
    out = answer.out
    assert "model: openai/clip-vit-base-patch16" in out
    assert f"data: {tmp_path}/data" in out
    assert "order 2 (preset mtil-order-ii): StanfordCars, Food, MNIST" in out
    row = next(line for line in out.splitlines() if "SUN397" in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "task", "SUN397", "sun397", "SUN397", "397", "87,003", "21,751", "a photo of the {c}.",
    ]  # fmt: skip


def test_show_a_suite_of_ones_own(cli, own):
    out = cli("suites", "show", own).out
    assert "Digits in 5 tasks" in out
    assert "order backwards: Digits-5, Digits-4" in out


def test_the_doctor_passes_packaged_pictures(cli):
    answer = cli("suites", "doctor", "demo-small")
    assert answer.code == 0, answer.out
    assert answer.out.splitlines()[-1] == "All 8 datasets are there and sound."  # five tasks, two probes, the reference
    assert answer.err == ""  # no bar in a pipe


def test_the_doctor_without_any_data_says_what_to_fetch(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    answer = cli("suites", "doctor", "mtil")
    assert answer.code == 1
    assert f"{tmp_path}/data: no such folder; name the datasets' folder with --data, or set KEEPLORA_DATA" in answer.out
    for spec in load_suite("mtil")["tasks"]:
        assert f"{spec['name']}: {tmp_path}/data/{spec['path']}: no such folder" in answer.out
        assert f"{spec['name']}: get it: " in answer.out
    assert not list(tmp_path.glob("data*"))
    assert "Error" not in answer.err


def test_the_doctor_tells_published_counts_from_others(cli, mini):
    answer = cli("suites", "doctor", "mtil", "--data", mini)
    assert answer.code == 1
    assert "Aircraft: 4 classes, 12 train, 12 test found, where 100, 3,334, 3,333 are expected" in answer.out
    assert "get it:" not in answer.out
    assert re.search(r"│ MNIST +│ +10 │ 50 of 60,000 │ 30 of 10,000 │", answer.out)


def test_a_suite_of_ones_own_is_examined(cli, own, mini, tmp_path, monkeypatch):
    answer = cli("suites", "doctor", own, "--data", mini)
    assert answer.code == 0, answer.out
    assert "All 2 datasets are there and sound." in answer.out
    monkeypatch.setenv("KEEPLORA_DATA", str(mini))
    assert cli("suites", "doctor", own, "--full").code == 0
    shutil.copytree(mini / "food-101", tmp_path / "copy/food-101")
    damaged = sorted((tmp_path / "copy").rglob("*.jpg"))[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    answer = cli("suites", "doctor", own, "--data", tmp_path / "copy")
    assert answer.code == 1
    assert f"Food: {damaged}: " in answer.out
    assert "1 of 2 datasets are ready; not ready: Food." in answer.out


def test_json_for_machines(cli, own, mini, tmp_path):
    answer = cli("suites", "doctor", own, "--data", tmp_path, "--json")
    assert answer.code == 1
    told = json.loads(answer.out)
    assert (told["suite"], told["data"], told["full"], told["ok"]) == ("own", str(tmp_path), False, False)
    food, digits = told["tasks"]
    assert (food["name"], food["ok"], food["missing"], food["fetch"]) == ("Food", False, ["food-101/"], "the cellar")
    assert (food["classes"], food["pictures"], food["expect"]["train"]) == (None, {}, 15)
    assert (digits["ok"], digits["pictures"], digits["smallest"][:2]) == (True, {"train": 50, "test": 30}, [28, 28])
    assert answer.err == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("doctor", "mtli"), r"unknown suite 'mtli'; did you mean 'mtil'\?"),
        (("show", "x-tial"), r"unknown suite 'x-tial'; did you mean 'x-tail'\?"),
        (
            ("doctor", "mtil", "--data", "nowhere"),
            r"--data nowhere: no such folder; give the one that holds the datasets",
        ),
        (
            ("doctor", "demo", "--data", "."),
            r"--data \.: the suite 'demo' says itself where its pictures are; leave it out",
        ),
        (("doctor", "my/suite.yaml"), r"my/suite\.yaml: no such suite file"),
    ],
)
def test_mistakes_are_one_sentence(cli, words, sentence):
    answer = cli("suites", *words)
    assert (answer.code, answer.out) == (1, "")
    assert re.match(rf"Error: .*{sentence}", answer.err), answer.err
    assert answer.err.count("\n") == 1
