"""UCIT and MLLM-DCL: the packaged protocols, miniature trees in the authors' layout, and what the doctor says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keeplora.data import SOURCES, ConversationTask, load_task
from keeplora.data.doctor import examine
from keeplora.experiment.config import load_config
from keeplora.suites import load_suite, suite_folder
from tests.data.benchmarks.mini_vqa import CAPTIONS, make_mllm_dcl, make_ucit

UCIT = {
    "ImageNet-R": (23998, "exact-ignoring-case"), "ArxivQA": (40000, "exact-ignoring-case"), "VizWiz": (40000, "caption"),
    "IconQA": (29859, "exact-ignoring-case"), "CLEVR-Math": (40000, "exact-ignoring-case"), "Flickr30k": (40000, "caption"),
}  # fmt: skip
MLLM_DCL = {
    "RS": "contains", "Med": "contains-lower", "AD": "contains", "Sci": "multiple-choice-sci", "Fin": "exact-stripped"
}  # fmt: skip
MAKERS: dict[str, Callable[[Path], Path]] = {"ucit": make_ucit, "mllm-dcl": make_mllm_dcl}
CASES = [(suite, spec["name"]) for suite in MAKERS for spec in load_suite(suite)["tasks"]]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {suite: make(tmp_path_factory.mktemp(suite)) for suite, make in MAKERS.items()}


@pytest.fixture
def tree(trees: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of UCIT to break."""
    return Path(shutil.copytree(trees["ucit"], tmp_path / "ucit"))


def spec_of(suite: str, task: str, **keys: Any) -> dict[str, Any]:
    """A task of a suite, without the published counts, which no miniature has."""
    spec = next(spec for spec in load_suite(suite)["tasks"] if spec["name"] == task)
    return {**{key: value for key, value in spec.items() if key != "expect"}, **keys}


def look_over(spec: dict[str, Any], root: Path, **options: Any) -> Any:
    return examine(spec, root, SOURCES, fetch="from the cellar", **options)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_ucit_is_the_published_protocol():
    suite = load_suite("ucit")
    found = {spec["name"]: (spec["expect"]["train"], spec["scorer"]) for spec in suite["tasks"]}
    assert found == UCIT
    assert suite["orders"]["1"]["order"] == list(UCIT)
    assert all(spec["expect"]["test"] == 3000 for spec in suite["tasks"])


def test_mllm_dcl_is_the_published_protocol():
    suite = load_suite("mllm-dcl")
    assert {spec["name"]: spec["scorer"] for spec in suite["tasks"]} == MLLM_DCL
    assert suite["orders"]["1"]["order"] == list(MLLM_DCL)


@pytest.mark.parametrize("suite", MAKERS)
def test_scores_exist_and_a_run_can_be_configured(suite: str, tmp_path: Path):
    from keeplora.evaluation.scorers import scorer_names

    specs = load_suite(suite)["tasks"]
    assert {spec["scorer"] for spec in specs} <= set(scorer_names())
    assert {spec["max_new_tokens"] for spec in specs} == {128}
    assert set(load_suite(suite)["fetch"]) == {spec["name"] for spec in specs}
    config = load_config({"suite": suite, "method": "keeplora++", "data_dir": str(tmp_path)})
    assert config.model.name == "llava-hf/llava-1.5-7b-hf"
    if suite == "ucit":
        assert config.training.for_task("Flickr30k").learning_rate == 1e-4
        assert (config.tuner.r, config.training.for_task("VizWiz").learning_rate) == (32, 2e-4)
    else:
        assert [config.training.for_task(name).epochs for name in MLLM_DCL] == [1, 3, 1, 2, 1]


@pytest.mark.parametrize(("suite", "name"), CASES)
def test_every_task_is_read(trees: dict[str, Path], suite: str, name: str):
    task = load_task(spec_of(suite, name), trees[suite])
    assert isinstance(task, ConversationTask)
    assert (len(task.train), len(task.test), task.warnings) == (8, 4, [])
    for told in (*task.train.conversations, *task.test.conversations):
        assert told.turns[0].text.startswith("<image>\n")
        assert len(told.pictures) == 1
    assert task.test.pictures(0)[0].size == (40, 32)
    answers = {told.turns[1].text for told in task.train.conversations}
    if task.scorer != "caption":
        assert {told.references[0] for told in task.test.conversations} <= answers


@pytest.mark.parametrize("name", ["VizWiz", "Flickr30k"])
def test_captions_are_judged_by_five_references(trees: dict[str, Path], name: str):
    task = load_task(spec_of("ucit", name), trees["ucit"])
    assert isinstance(task, ConversationTask)
    assert [c.references for c in task.test.conversations] == [*CAPTIONS.values()] * 2
    assert len({c.pictures for c in task.train.conversations}) == 4  # two captions of each are taught


@pytest.mark.parametrize(("suite", "name"), CASES)
def test_the_doctor_finds_nothing_in_a_whole_tree(trees: dict[str, Path], suite: str, name: str):
    check = look_over(spec_of(suite, name), trees[suite])
    assert (check.ok, check.missing, check.fetch) == (True, [], "")
    assert check.pictures == {"train": 8, "test": 4}
    assert check.smallest[:2] == check.largest[:2] == (40, 32)
    assert check.notes == []


@pytest.mark.parametrize("suite", MAKERS)
def test_the_doctor_tells_everything_that_is_missing(suite: str, tmp_path: Path):
    spec = load_suite(suite)["tasks"][2]
    check = look_over(spec, tmp_path)
    named = [spec["train"], spec["test"], *([spec["references"]] if "references" in spec else []), f"{spec['images']}/"]
    assert check.missing == named
    assert check.problems == [f"{tmp_path}: lacks {name}" for name in named]
    assert check.fetch == "from the cellar"


def test_missing_picture_folders_are_told_once(tree: Path):
    shutil.rmtree(tree / "datasets/IconQA/iconqa_data")
    check = look_over(spec_of("ucit", "IconQA"), tree)
    assert check.missing == ["datasets/IconQA/iconqa_data/"]
    assert check.fetch == "from the cellar"
    assert check.pictures == {"train": 8, "test": 4}


def test_other_counts_broken_pictures_and_broken_files_are_problems(tree: Path):
    check = look_over(load_suite("ucit")["tasks"][0], tree)
    assert check.problems == ["8 train, 4 test found, where 23,998, 3,000 are expected"]
    assert not check.fetch
    places = sorted((tree / "datasets/CLEVR/images/train").iterdir())
    places[0].write_bytes(b"")
    places[1].unlink()
    check = look_over(spec_of("ucit", "CLEVR-Math"), tree)
    assert [problem.split(": ")[1].split(" (")[0].split(";")[0] for problem in check.problems] == [
        "the file is empty", "does not exist"
    ]  # fmt: skip
    assert look_over(spec_of("ucit", "CLEVR-Math", on_error="skip"), tree).ok
    edit(tree / "instructions/CLEVR/test_3000.json", lambda rows: [*rows[:2], {**rows[2], "answer": ""}])
    (problem,) = look_over(spec_of("ucit", "CLEVR-Math"), tree).problems
    assert "test_3000.json, entry 3 (id 'q2'): has no answer" in problem


def test_unknown_answers_repeated_ids_and_entries_are_notes(tree: Path):
    folder = tree / "instructions/IconQA"
    edit(folder / "test_3000.json", lambda rows: [{**rows[0], "answer": "nine"}, {**rows[1], "question_id": "q0"}])
    edit(folder / "train.json", lambda rows: [*rows, rows[0]])
    check = look_over(spec_of("ucit", "IconQA"), tree)
    assert check.ok
    assert check.notes == [
        "1 id(s) of test are there more than once; each entry counts",
        "1 entries of train repeat another's picture, question and answer",
        "1 of 2 answers of test never occur in train: 'nine'",
    ]


@pytest.mark.parametrize("full", [False, True])
def test_leaks_are_found_whatever_the_file_is_called(tree: Path, full: bool):
    pictures = tree / "datasets/CLEVR/images"
    shutil.copy(pictures / "train/CLEVR_train_000001.png", pictures / "val/CLEVR_val_000000.png")
    spec = spec_of("ucit", "CLEVR-Math")
    check = look_over(spec, tree, full=full)
    leak, shared = check.notes
    assert leak.startswith("1 question(s) of train are also in test, which flatters the result: ")
    assert "entry 2 (id '1')" in leak
    assert shared == "1 picture(s) are in train and in test, under the same or other questions"
    assert not look_over({**spec, "duplicates": "refuse"}, tree).ok
    edit(
        tree / "instructions/CLEVR/test_3000.json",
        lambda rows: [{**row, "text": row["text"].replace("spheres", "cubes")} for row in rows],
    )
    assert look_over(spec, tree).notes == [shared]  # another question about the picture


def test_captions_of_one_picture_count_once(tree: Path):
    edit(tree / "instructions/Flickr30k/test_3000.json", lambda rows: [*rows, {**rows[0], "answer": "Another ."}])
    spec = {key: value for key, value in spec_of("ucit", "Flickr30k").items() if key != "references"}
    assert look_over({**spec, "expect": {"train": 8, "test": 4}}, tree).ok


def test_a_probe_is_looked_at_alone(tree: Path):
    (tree / "instructions/IconQA/train.json").write_text("[")
    spec = {key: value for key, value in spec_of("ucit", "IconQA").items() if key != "train"}
    check = look_over(spec, tree, probe=True)
    assert (check.ok, check.pictures) == (True, {"test": 4})


def test_the_doctor_looks_into_packs_and_tables(tmp_path: Path):
    suite = load_suite("vqa")
    assert look_over(suite["tasks"][0], suite_folder()).ok
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "own.csv").write_text("image,question,answer\na.png,What?,nothing\nb.png,What?,nothing\n")
    check = look_over({"name": "own", "source": "vqa-table", "path": "own.csv"}, tmp_path)
    assert check.folder == str(tmp_path)
    assert len(check.problems) == 1
    assert "b.png: does not exist" in check.problems[0]


def test_show_and_doctor_on_the_command_line(cli_runner: Any, trees: dict[str, Path]):
    out = cli_runner("suites", "show", "mllm-dcl")
    assert "multiple-choice-sci" in out.stdout
    assert "order 1: RS, Med, AD, Sci, Fin" in out.stdout
    out = cli_runner("suites", "doctor", "mllm-dcl", "--data", str(trees["mllm-dcl"]))
    assert (out.exit_code, out.stdout.splitlines()[-1]) == (0, "All 5 datasets are there and sound.")
    out = cli_runner("suites", "doctor", "ucit", "--data", str(trees["ucit"]), "--json")
    assert out.exit_code == 1
    assert [task["pictures"] for task in json.loads(out.stdout)["tasks"]] == [{"train": 8, "test": 4}] * 6


@pytest.fixture
def cli_runner() -> Callable[..., Any]:
    from typer.testing import CliRunner

    from keeplora.cli import app

    return lambda *words: CliRunner().invoke(app, list(words))
