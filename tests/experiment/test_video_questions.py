"""Questions about videos, end to end: frames, statistics with fewer of them, files that cannot be read, samples, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import video_world
from PIL import Image

from keeplora import Experiment, TrainedModel
from keeplora.errors import ConfigError, DataError
from keeplora.experiment.config import load_config
from keeplora.experiment.kinds.generation import Generation
from keeplora.models.generative import Generative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return video_world.make_world(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def finished(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("run") / "run"
    return output, Experiment({**world, "output": str(output)}, quiet=True).run()


def test_a_run_learns_answers_and_shows_frames(finished: tuple[Path, dict[str, Any]]) -> None:
    output, results = finished
    assert [len(row) for row in results["accuracy"]] == [2, 2, 2]
    rows = [json.loads(line) for line in (output / "predictions/after-2/first.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(isinstance(row["prediction"], str) for row in rows)
    samples = json.loads((output / "samples/last.json").read_text())
    assert len(samples) == 5
    for sample in samples:
        assert sample["videos"] == 1
        assert sample["times"] == [0.0, 0.5, 1.0, 1.75]
        with Image.open(output / sample["picture"]) as strip:
            assert strip.size == (4 * 48 + 3 * 3, 48)
    assert "Frames of the video" in (output / "report.html").read_text(encoding="utf-8")


def test_frames_for_training_and_statistics(world: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    read: list[tuple[bool, int]] = []
    encode = Generative.encode

    def counting(self: Generative, turns: Any, pictures: Any = (), clips: Any = (), **more: Any) -> Any:
        read.append((more.get("answers", True), len(clips[0].frames)))
        return encode(self, turns, pictures, clips, **more)

    monkeypatch.setattr(Generative, "encode", counting)
    Experiment({**world, "output": str(tmp_path / "run")}, quiet=True).run()
    taught = [frames for answers, frames in read if answers]
    # Each training clip is encoded once for training and once, with fewer frames, for the statistics.
    assert (taught.count(4), taught.count(2), len(taught)) == (16, 16, 32)
    assert {frames for answers, frames in read if not answers} == {4}


def test_loader_workers_change_no_number(
    world: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = {**world, "training": {**world["training"], "workers": 2}, "output": str(tmp_path / "run")}
    assert Experiment(config, quiet=True).run()["accuracy"] == finished[1]["accuracy"]


def test_the_finished_model_answers_about_a_video(world: dict[str, Any], finished: tuple[Path, dict[str, Any]]) -> None:
    trained = TrainedModel(finished[0], device="cpu")
    clip = Path(world["base_dir"], "first/clips/test-0.mp4")
    rows = [json.loads(line) for line in (finished[0] / "predictions/after-2/first.jsonl").read_text().splitlines()]
    answer = trained.answer([], rows[0]["question"], videos=[clip], task="first")
    assert answer == rows[0]["prediction"]
    with pytest.raises(DataError, match=r"1 '<video>' in the text but 2 video\(s\)"):
        trained.answer([], "<video> What?", videos=[clip, clip])


def broken(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"no video")


def test_unreadable_videos_are_skipped_alike_everywhere(tmp_path: Path, monkeypatch: Any) -> None:
    world = video_world.make_world(tmp_path)
    broken(tmp_path, "first/clips/train-2.mp4", "first/clips/test-1.mp4", "general/clips/test-0.mp4")
    config: dict[str, Any] = {**world, "output": str(tmp_path / "run")}
    with pytest.raises(DataError, match=r"first/clips/train-2\.mp4.*on_error: skip"):
        Experiment(config, quiet=True).run()
    config["tasks"] = [{**spec, "on_error": "skip"} for spec in world["tasks"]]
    config["probes"] = [{**spec, "on_error": "skip", "max_skipped": 0.3} for spec in world["probes"]]
    with pytest.raises(DataError, match=r"1 of the 8 videos of train cannot be used, more than the share of 0\.01"):
        Experiment(config, quiet=True).run()
    config["tasks"] = [{**spec, "max_skipped": 0.3} for spec in config["tasks"]]

    # Whatever is answered is right: then the score is the share of the questions that could be asked.
    def right(self: Generation, task: Any, data: Any, on_batch: Any) -> list[str]:
        return [c.references[0] for c in data.conversations.conversations]

    monkeypatch.setattr(Generation, "_answers", right)
    read: dict[bool, set[str]] = {}
    encode = Generative.encode

    def noting(self: Generative, *args: Any, **more: Any) -> Any:
        read.setdefault(len(args[2][0].frames) == 2, set()).add(more["where"].split(", entry")[1])
        return encode(self, *args, **more)

    monkeypatch.setattr(Generative, "encode", noting)
    results = Experiment(config, quiet=True).run()
    assert results["accuracy"][-1] == [pytest.approx(80.0), pytest.approx(100.0)]
    assert results["probe_accuracy"][-1] == [pytest.approx(80.0)]
    assert results["components"]["first"]["skipped"] == 1
    assert read[True] == read[False]  # the statistics saw the samples that were trained on
    assert not any("train-2" in where and "first" in where for where in read[True])
    assert any("1 unusable video(s) of test skipped" in line for line in results["warnings"])
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/after-2/first.jsonl").read_text().splitlines()]
    assert [(row["key"], row["prediction"], row["score"]) for row in rows][-1] == ("test/test-1", None, 0.0)


@pytest.mark.parametrize(
    ("video", "told"),
    [
        ({"frames": 0}, r"video\.frames is 0"),
        ({"sampling": "middle"}, r"video\.sampling"),
        ({"sampling": "fps"}, r"video.*fps"),
        ({"fps": 2.0}, r"video.*fps"),
        ({"frame": 3}, r"unknown key.*frame.*did you mean 'frames'"),
    ],
)
def test_settings_are_checked(video: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config({"suite": "vqa", "method": "lora", "video": video})
