"""`make demo`: what it reuses, goes on with and refuses, on a tiny suite; and what make says to an old Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from keeplora import Experiment, KeepLoraError, suites
from tests.models.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("runs/tiny-lora", "runs/tiny-keeplora++")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("clip", tmp_path_factory.mktemp("demo") / "clip")


@pytest.fixture
def suite(tmp_path, monkeypatch, model) -> Path:
    """A packaged suite of two tasks, and a working folder of its own."""
    folder = tmp_path / "suites"
    seed = 0
    for task in ("one", "two"):
        for name in ("cat", "dog"):
            (folder / task / name).mkdir(parents=True)
            for i in range(5):
                seed += 1
                noise = torch.randint(
                    0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
                )
                Image.fromarray(noise.numpy()).save(folder / task / name / f"{i}.png")
    tasks = [{"name": task, "source": "folder", "path": task, "test": 0.4} for task in ("one", "two")]
    value = {
        "name": "tiny", "description": "two tasks", "model": {"name": str(model)}, "tasks": tasks, "probes": [],
        "training": {"epochs": 1},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(value))
    monkeypatch.setattr(suites, "suite_folder", lambda *_: folder)
    monkeypatch.chdir(tmp_path)
    return folder / "tiny.yaml"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("keeplora_demo_script", ROOT / "scripts/demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--suite", "tiny"])
    return module.main


def results() -> list[bytes]:
    return [Path(path, "results.json").read_bytes() for path in PATHS]


def test_both_methods_run_and_end_in_one_table_and_report(suite, demo, capsys):
    demo()
    said = capsys.readouterr().out
    assert "Sequential LoRA" in said
    assert "KeepLoRA++" in said
    assert "Report: runs/tiny-keeplora++/report.html" in said
    assert "Sequential LoRA" in Path("runs/tiny-keeplora++/report.html").read_text(encoding="utf-8")
    first, second = (json.loads(one) for one in results())
    assert len(first["accuracy"]) == len(second["accuracy"]) == 3


def test_a_second_call_trains_nothing_and_shows_the_same(suite, demo, capsys, monkeypatch):
    demo()
    before, said = results(), capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(Experiment, "run", refuse)
    monkeypatch.setattr(Experiment, "resume", refuse)
    demo()
    again = capsys.readouterr().out
    assert results() == before
    assert again.count("is reused") == 2
    tables = [text[text.index("accuracy in") :] for text in (said, again)]
    assert tables[0] == tables[1]


def test_an_interrupted_call_goes_on_where_it_stopped(suite, demo, capsys, monkeypatch):
    monkeypatch.setenv("KEEPLORA_STOP_AFTER", "1")
    with pytest.raises(KeyboardInterrupt):
        demo()
    record = next(Path(PATHS[0], "ledger").glob("0001-*/record.json"))
    kept = record.read_bytes()
    monkeypatch.delenv("KEEPLORA_STOP_AFTER")
    demo()
    assert record.read_bytes() == kept
    assert f"going on with {PATHS[0]}" in capsys.readouterr().out
    assert [len(json.loads(one)["accuracy"]) for one in results()] == [3, 3]


DRIVER = """
import runpy, sys
from pathlib import Path
from keeplora import suites
folder = Path(sys.argv[1])
suites.suite_folder = lambda *_: folder
sys.argv = ["demo.py", "--suite", "tiny"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_it_with_one_line_and_the_same_command_goes_on(suite, demo, tmp_path, number, status):
    suite.write_text(suite.read_text().replace("epochs: 1", "epochs: 20"))
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(script=str(ROOT / "scripts/demo.py")), str(suite.parent)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("== lora"):
                break
        metrics = Path(PATHS[0], "metrics.jsonl")
        while child.poll() is None and not (metrics.is_file() and '"epoch"' in metrics.read_text(encoding="utf-8")):
            time.sleep(0.02)
        child.send_signal(number)
        _, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == status, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "Interrupted. What was learned is kept; `make demo` again goes on from there."
    assert json.loads(Path(PATHS[0], "status.json").read_text(encoding="utf-8"))["state"] == "interrupted"
    assert [path for path in Path("runs").rglob("*") if path.name.endswith((".tmp", ".part"))] == []
    demo()
    assert [len(json.loads(one)["accuracy"]) for one in results()] == [3, 3]


def test_runs_of_other_settings_are_refused(suite, demo):
    demo()
    suite.write_text(suite.read_text().replace("epochs: 1", "epochs: 2"))
    with pytest.raises(KeepLoraError, match=r"tiny-lora was made with other settings \(training\); move it away"):
        demo()


def test_runs_on_other_pictures_are_not_put_into_one_table(suite, demo):
    demo()
    shutil.rmtree(PATHS[1])
    next(suite.parent.glob("one/cat/*.png")).unlink()
    with pytest.raises(KeepLoraError, match="different pictures or models"):
        demo()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_an_old_python_is_told_what_is_wanted(tmp_path, target):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), target, f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "keeplora needs Python 3.11 or newer" in result.stderr
    assert "3.9.2" in result.stderr
    assert not (tmp_path / "venv").exists()
