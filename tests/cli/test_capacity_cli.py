"""`keeplora capacity`: from the ledger alone, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import re
import shutil

import pytest

FULL = {"r": 2, "energy_features": 1.0, "when_full": "shrink"}


def test_the_table(world, cli):
    path, results = world.run()
    answer = cli("capacity", path)
    assert answer.code == 0, answer.err
    assert re.search(r"In all \d+ of \d+ dimensions are protected", answer.out.replace("\n", " "))
    assert "Tasks that still fit" in answer.out
    assert len(re.findall("[▒█·]{20}", answer.out)) == len(results["layers"])
    assert re.search(r"^ *vision 0 · q_proj ", answer.out, re.MULTILINE)
    assert re.search(r"^ *text 0 · q_proj ", answer.out, re.MULTILINE)


def test_json_is_what_the_results_hold_and_no_model_is_needed(world, cli, tmp_path):
    path, results = world.run()
    answer = cli("capacity", path, "--json")
    assert json.loads(answer.out) == results["capacity"]
    shutil.copytree(path / "ledger", tmp_path / "ledger")  # no config.yaml, no model, no data
    assert json.loads(cli("capacity", tmp_path, "--json").out) == results["capacity"]


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_picture(world, cli, tmp_path, ending, magic):
    target = tmp_path / f"capacity.{ending}"
    answer = cli("capacity", world.run()[0], "--plot", target)
    assert answer.code == 0, answer.err
    assert target.read_bytes().startswith(magic)
    assert answer.out.rstrip().endswith(str(target)) or str(target) in answer.out.replace("\n", "")


def test_what_cannot_be_drawn_or_gauged_is_a_sentence(world, cli, tmp_path):
    answer = cli("capacity", world.run()[0], "--plot", tmp_path / "capacity.gif")
    assert answer.code == 1
    assert "written as .png, .svg or .pdf" in answer.err
    answer = cli("capacity", world.run(method="lora")[0])
    assert answer.code == 1
    assert "protects no subspace" in answer.err
    answer = cli("capacity", tmp_path)
    assert answer.code == 1
    assert answer.err.startswith("Error: ")


def test_a_full_run_reports_audits_and_exports(world, cli, tmp_path):
    path, _ = world.run(tuner=FULL)
    copy = world.copied(path, tmp_path / "run")
    for words in (("capacity", copy), ("audit", copy), ("report", copy), ("export", copy, "--format", "peft")):
        answer = cli(*words)
        assert answer.code == 0, (words, answer.err)
