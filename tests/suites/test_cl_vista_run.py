"""CL-VISTA from its own layout on disk, end to end, on a tiny Video-LLaVA with a judge behind an address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keeplora.evaluation.judges import JudgeError, endpoint
from keeplora.experiment import Experiment
from keeplora.suites import load_suite, suite_folder
from tests.data.benchmarks.mini_vista import MVBENCH, TASKS, TEST, make_vista
from tests.evaluation.judges.fake_server import KEY, FakeServer, Misdeed
from tests.models.tiny_generative import tiny

pytest.importorskip("av")


def rating(question: str) -> str:
    """Depends on the answer alone, from 0 to 5; questions about counting get an answer that holds no rating."""
    lines = dict(line.split(": ", 1) for line in question.splitlines() if ": " in line)
    if "ball bounce" in lines["Question"]:
        return "I could not say."
    return f'{{"score": {len(lines.get("Given answer", "")) % 6}}}'


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FakeServer(rating, KEY).running() as server:
        yield server


def experiment(tmp_path: Path, server: FakeServer) -> Experiment:
    """The packaged suite, but for the length of answers: a model of random weights never ends one by itself."""
    suite = tmp_path / "cl-vista.yaml"
    suite.write_text((suite_folder() / "cl-vista.yaml").read_text().replace("max_new_tokens: 256", "max_new_tokens: 4"))
    make_vista(tmp_path / "data")
    tiny("video-llava", tmp_path / "model")
    judge = {"kind": "openai", "model": "judge-30b", "base_url": server.url, "api_key_env": "JUDGE_KEY", "retries": 1}
    return Experiment(
        {"suite": str(suite), "method": "keeplora++", "data_dir": str(tmp_path / "data"), "model": str(tmp_path / "model"),
         "output": str(tmp_path / "run"), "device": "cpu", "judge": judge},
        # Large steps, so that every task changes what the model says and there is something new to judge.
        {"training.batch_size": 3, "training.precision": "fp32", "tuner.r": 4, "tuner.lora_alpha": 4.0,
         "training.learning_rate": 0.05},
        quiet=True,
    )  # fmt: skip


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_whole_protocol_with_a_judge_that_fails_on_the_way(tmp_path: Path, server: FakeServer):
    down = [True]

    def gone(question: str) -> Misdeed | None:
        """At the first new answer to the last task's questions: one of a model that has learned something."""
        late = "opening the door" in question and sum("opening the door" in asked for asked in server.questions) > TEST
        return Misdeed(503) if down[0] and late else None

    server.always = gone
    with pytest.raises(
        JudgeError, match=r"status 503 \(after 2 attempts\).*judgements so far are kept in .*keeplora resume"
    ):
        experiment(tmp_path, server).run()
    run = tmp_path / "run"
    kept = len(read(run / "judgements.jsonl"))
    assert kept > 2 * TEST
    assert (run / "predictions" / "after-0" / "STAR.jsonl").is_file()
    learned = len(list((run / "predictions").iterdir())) - 1
    assert learned >= 1  # the row that the failure broke off, at least
    down[0] = False
    server.requests.clear()
    results = Experiment.resume(run, quiet=True)

    names, probes = [*TASKS], [spec["name"] for spec in load_suite("cl-vista")["probes"]]
    assert results["tasks"] == names
    assert len(results["accuracy"]) == len(names) + 1
    for row in results["accuracy"]:
        assert len(row) == len(names)
        assert all(value is not None and 0 <= value <= 100 for value in row)
    asked = set(server.questions)
    judged = read(run / "judgements.jsonl")
    assert len({row["key"] for row in judged}) == len(judged)
    assert 0 < len(server.questions) == len(asked) == len(judged) - kept  # nothing twice, and nothing again

    final = run / "predictions" / f"after-{len(names)}"
    for task, row in zip(names, results["accuracy"][-1], strict=True):
        answers = read(final / f"{task}.jsonl")
        assert len(answers) == TEST
        points = [0 if task == "Counting" else len(answer["prediction"].strip()) % 6 for answer in answers]
        assert [answer["score"] for answer in answers] == [pytest.approx(point / 5) for point in points]
        assert row == pytest.approx(20 * sum(points) / TEST)
        assert results["components"][task]["unparsable"] == (TEST if task == "Counting" else 0)
    for probe in probes:
        assert len(read(final / f"{probe}.jsonl")) == (2 * len(MVBENCH) if probe == "MVBench" else TEST)
    assert {"mft", "mfn", "maa", "bwt"} <= set(results["metrics"])
    assert (run / "report.html").is_file()
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
