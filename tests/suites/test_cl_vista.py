"""CL-VISTA: the packaged protocol, a miniature tree in the authors' layout, and what the doctor says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keeplora.data import SOURCES, ConversationTask, load_task
from keeplora.data.doctor import examine
from keeplora.data.video import Sampling
from keeplora.errors import ConfigError, DataError
from keeplora.experiment.config import load_config
from keeplora.suites import load_suite
from tests.data.benchmarks.mini_vista import FRAMES, MVBENCH, PROBES, SIZE, TASKS, TEST, TRAIN, make_vista, write_clip

pytest.importorskip("av")

NAMES = ["Counting", "Space", "Traffic", "Movie", "GUI", "Science", "Sports", "STAR"]
BENCHMARKS = ["MMVU", "NextQA", "MVBench", "LongVideoBench", "MMBench-Video"]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vista(tmp_path_factory.mktemp("vista"))


@pytest.fixture
def tree(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "vista"))


def spec_of(name: str, **keys: Any) -> dict[str, Any]:
    suite = load_suite("cl-vista")
    return {**next(spec for spec in (*suite["tasks"], *suite["probes"]) if spec["name"] == name), **keys}


def loaded(name: str, root: Path, **keys: Any) -> ConversationTask:
    task = load_task(spec_of(name, **keys), root, probe=name in BENCHMARKS)
    assert isinstance(task, ConversationTask)
    return task


def look_over(name: str, root: Path, *, full: bool = False, **keys: Any) -> Any:
    return examine(spec_of(name, **keys), root, SOURCES, fetch="from the cellar", probe=name in BENCHMARKS, full=full)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_it_is_the_published_protocol(tmp_path: Path):
    from keeplora.evaluation.scorers import scorer_names

    suite = load_suite("cl-vista")
    assert suite["orders"]["1"]["order"] == [spec["name"] for spec in suite["tasks"]] == NAMES == [*TASKS]
    assert [spec["name"] for spec in suite["probes"]] == BENCHMARKS
    scores = {spec["name"]: spec["scorer"] for spec in (*suite["tasks"], *suite["probes"])}
    assert {name for name, score in scores.items() if score != "judge"} == {"MVBench"}
    assert set(scores.values()) <= set(scorer_names())
    assert set(suite["fetch"]) == set(scores)
    config = load_config({"suite": "cl-vista", "method": "keeplora++", "data_dir": str(tmp_path)})
    assert config.model.name == "LanguageBind/Video-LLaVA-7B-hf"
    assert (config.video.frames, config.video.statistics_frames) == (8, 4)
    assert (config.judge.kind, config.judge.model) == ("local", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert (config.tuner.r, config.training.for_task("GUI").learning_rate) == (64, 1e-4)


def test_another_kind_of_judge_starts_anew_and_the_same_kind_is_changed(tmp_path: Path):
    base = {"suite": "cl-vista", "method": "lora", "data_dir": str(tmp_path)}
    assert load_config({**base, "judge": {"kind": "overlap"}}).judge.settings == {"kind": "overlap"}
    assert load_config(base, {"judge.kind": "exact"}).judge.settings == {"kind": "exact"}
    own = load_config({**base, "judge": {"dtype": "bfloat16"}}).judge
    assert (own.kind, own.model, own.dtype) == ("local", "Qwen/Qwen3-30B-A3B-Instruct-2507", "bfloat16")
    with pytest.raises(ConfigError, match="kind: openai needs model"):
        load_config({**base, "judge": {"kind": "openai", "base_url": "http://localhost:8000/v1"}})


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_read(whole: Path, name: str):
    task = loaded(name, whole)
    assert (len(task.train), len(task.test), task.warnings) == (TRAIN, TEST, [])
    question, answers = TASKS[name][5:]
    for n, told in enumerate((*task.train.conversations, *task.test.conversations)):
        assert told.turns[0].text == f"<video>\n{question}"
        assert told.question == question
        assert told.references == (answers[n % TRAIN % len(answers)],)
        assert (len(told.videos), told.pictures) == (1, ())
    (clip,) = task.test.clips(0, Sampling("uniform", frames=4))
    assert [frame.size for frame in clip.frames] == [SIZE] * 4
    assert clip.indices == (0, 4, 7, FRAMES - 1) or clip.indices == (0, 3, 7, FRAMES - 1)


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_is_read(whole: Path, name: str):
    task = loaded(name, whole)
    assert (len(task.train), len(task.test)) == (0, TEST)
    assert [c.references for c in task.test.conversations] == [("A man cooks.",), ("B. a dog",), ("A man cooks.",)]


def test_multiple_choice_shows_its_options(whole: Path):
    task = loaded("MVBench", whole)
    assert len(task.test) == 2 * len(MVBENCH)
    last = task.test.conversations[-1]
    assert last.question == "Question: What happens?\nOptions:\n(A) Up\n(B) Down\n(C) Left"
    assert (last.references, last.kind, last.key) == (("(B) Down",), "moving_direction", "test/moving_direction/2")
    assert task.scorer == "option"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *BENCHMARKS])
def test_the_doctor_finds_nothing_in_a_whole_tree(whole: Path, name: str, full: bool):
    check = look_over(name, whole, full=full)
    assert (check.problems, check.missing, check.fetch, check.notes) == ([], [], "", [])
    counts = {"train": TRAIN, "test": TEST} if name in NAMES else {"test": 4 if name == "MVBench" else TEST}
    assert check.pictures == counts
    assert check.smallest[:2] == check.largest[:2] == SIZE
    assert check.bytes > 1000


def test_the_doctor_tells_everything_that_is_missing(tmp_path: Path):
    check = look_over("Movie", tmp_path)
    assert check.missing == [spec_of("Movie")[key] for key in ("train", "test", "answers")]
    assert check.problems == [f"{tmp_path}: lacks {name}" for name in check.missing]
    assert check.fetch == "from the cellar"
    assert look_over("MVBench", tmp_path).missing == ["MVBench/json/", "MVBench/videos/"]


def test_folders_of_videos_that_are_missing_are_told_once(tree: Path):
    shutil.rmtree(tree / "Space/scannet_videos_fps1")
    check = look_over("Space", tree)
    assert (check.missing, check.fetch) == (["Space/scannet_videos_fps1/"], "from the cellar")


def test_videos_that_cannot_be_used_are_problems_or_skipped(tree: Path):
    folder = tree / "STAR/Charades_v1_480"
    (folder / "train.0_v.mp4").write_bytes(b"")
    (folder / "train.1_v.mp4").unlink()
    (folder / "test.2_v.mp4").unlink()
    whole = (folder / "train.2_v.mp4").read_bytes()
    (folder / "train.2_v.mp4").write_bytes(whole[: len(whole) // 2])
    check = look_over("STAR", tree)
    assert len(check.problems) == 4
    for name, problem in zip(("train.0", "train.1", "train.2", "test.2"), check.problems, strict=True):
        assert f"{folder}/{name}_v.mp4" in problem
    assert look_over("STAR", tree, on_error="skip").ok
    with pytest.raises(DataError, match=r"train\.0_v\.mp4"):
        loaded("STAR", tree)
    with pytest.raises(DataError, match=r"more than the share of 0\.01"):
        loaded("STAR", tree, on_error="skip")
    task = loaded("STAR", tree, on_error="skip", max_skipped=0.9)
    assert (len(task.train), len(task.test), len(task.test.skipped)) == (TRAIN - 3, TEST - 1, 1)


def test_damage_within_is_found_by_a_full_look(tree: Path):
    import av

    file = tree / "Sports/videos/train.1_v.mov"
    with av.open(str(file)) as container:
        places = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    data = bytearray(file.read_bytes())
    for place, size in places[FRAMES // 2 :]:
        data[place : place + size] = bytes(size)
    file.write_bytes(data)
    assert look_over("Sports", tree).ok
    (problem,) = look_over("Sports", tree, full=True).problems
    assert str(file) in problem


@pytest.mark.parametrize("full", [False, True])
def test_leaks_are_found_whatever_the_file_is_called(tree: Path, full: bool):
    folder = tree / "Science/videos"
    shutil.copy(folder / "train.1_v.mp4", folder / "test.0_v.mp4")
    leak, shared = look_over("Science", tree, full=full).notes
    assert leak.startswith("1 question(s) of train are also in test, which flatters the result: ")
    assert shared == "1 video(s) are in train and in test, under the same or other questions"
    assert not look_over("Science", tree, duplicates="refuse").ok


def test_answers_are_joined_by_id_else_by_place(tree: Path):
    answers = tree / TASKS["Counting"][2].join(("Counting/", ".json"))
    edit(answers, lambda rows: [*rows[1:], rows[0]])
    assert [c.references[0] for c in loaded("Counting", tree).test.conversations] == ["2", "3", "2"]
    edit(answers, lambda rows: rows[:-1])
    with pytest.raises(DataError, match=r"holds no answer to question_id 'Counting_test_0' .*1 are missing"):
        loaded("Counting", tree)
    edit(answers, lambda rows: [*rows, rows[0]])
    with pytest.raises(DataError, match="two answers have one question_id"):
        loaded("Counting", tree)
    edit(answers, lambda rows: [{"answer": row["answer"]} for row in rows[:2]])
    with pytest.raises(DataError, match="2 answers to the 3 questions"):
        loaded("Counting", tree)
    edit(answers, lambda rows: [*rows, {"answer": ""}])
    with pytest.raises(DataError, match=r"test_questions_2k\.json, entry 3 .*has no answer"):
        loaded("Counting", tree)


def test_names_of_videos(tree: Path):
    questions = tree / "MMVU/MMVU_test_q.json"
    edit(questions, lambda rows: [{**rows[0], "video_name": "0.mp4"}, {**rows[1], "video_name": "clip.v2"}, rows[2]])
    write_clip(tree / "MMVU/videos/clip.v2.mkv", "MMVU", "x", 9)
    assert [c.videos[0].path.name for c in loaded("MMVU", tree).test.conversations] == ["0.mp4", "clip.v2.mkv", "2.mp4"]
    (tree / "MMVU/videos/2.mp4").unlink()
    (problem,) = look_over("MMVU", tree).problems
    assert f"{tree}/MMVU/videos/2.mp4" in problem
    edit(questions, lambda rows: [{"question": "Who?", "question_id": "MMVU_0"}, *rows[1:]])
    with pytest.raises(DataError, match=r"entry 1: names no video; give `video_name`"):
        loaded("MMVU", tree)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"test": None, "path": "."}, "name the training file as `train` and the file of questions as `test`"),
        ({"test": 0.2}, "name the training file as `train`"),
        ({"test": "MVBench/json"}, "`answers` belongs to one file of questions"),
        ({"answer": "x"}, "unknown key 'answer' for source 'video-qa'; did you mean 'answers'"),
        ({"videos": "nowhere"}, "nowhere: no such folder"),
        ({"path": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_descriptions_that_say_nonsense(whole: Path, keys: dict[str, Any], told: str):
    with pytest.raises((ConfigError, DataError), match=told):
        loaded("GUI", whole, **keys)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"candidates": "Up"}, "`candidates` is 'Up'"), ({"candidates": []}, "`candidates` is"),
        ({"answer": "Right"}, "is none of its"),
    ],
)  # fmt: skip
def test_choices_that_cannot_be(tree: Path, row: dict[str, Any], told: str):
    edit(tree / "MVBench/json/moving_direction.json", lambda rows: [{**rows[0], **row}])
    with pytest.raises(DataError, match=rf"moving_direction\.json, entry 1: .*{told}"):
        loaded("MVBench", tree)


def test_the_doctor_on_the_command_line(whole: Path):
    from typer.testing import CliRunner

    from keeplora.cli import app

    out = CliRunner().invoke(app, ["suites", "doctor", "cl-vista", "--data", str(whole)])
    assert (out.exit_code, out.stdout.splitlines()[-1]) == (0, "All 13 datasets are there and sound.")
    out = CliRunner().invoke(app, ["suites", "show", "cl-vista"])
    assert "order 1: Counting, Space, Traffic, Movie, GUI, Science, Sports, STAR" in out.stdout
