"""docs/scale.md: its tables are the script's, its settings are the code's, and the plan of a run prints the same phases."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from keeplora.cli.plan_text import counted, took
from keeplora.data.remote import ATTEMPTS, FIRST_WAIT, PACKAGES
from keeplora.data.spec import SPLIT_BY, STREAM_KEYS, StreamSpec
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.scale import Load
from tests.docs.documents import ROOT, run_keeplora
from tests.experiment.test_footprint import config_of
from tests.models.tiny_generative import tiny

PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "benchmarks/scale_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_plan"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_script_writes(script: Any) -> None:
    assume = Assumptions.parse(script.ASSUMED)
    assert script.written(PAGE, script.blocks(64, script.default_load(), assume)) == PAGE
    assert script.default_load() == Load(1_000, 100_000)
    assert (assume.k, assume.growth) == (0.25, 0.0005)  # a quarter; 2 of 4096


def test_the_settings_are_those_of_the_code() -> None:
    told = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert sorted(told) == sorted(STREAM_KEYS)
    assert all(f"`{how}`, each" in PAGE for how in SPLIT_BY)
    assert f"| `buffer` | {next(f.default for f in fields(StreamSpec) if f.name == 'buffer')} |" in PAGE
    assert (ATTEMPTS, FIRST_WAIT) == (4, 0.5)
    assert all(PACKAGES[scheme] in PAGE for scheme in ("s3", "gs", "abfs", "http"))
    a = Assumptions()
    assert (a.tflops, a.fp32_tflops, a.host_gflops, a.disk, a.tokens) == (100, 15, 200, 1, 700)


def test_a_plan_tells_the_phases_of_as_many_tasks_as_are_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llava", tmp_path / "llava")
    for file in (tmp_path / "llava").glob("*.safetensors"):
        file.unlink()
    from keeplora.yaml_text import dump_yaml

    (tmp_path / "e.yaml").write_text(dump_yaml(config_of(tmp_path).resolved()))
    run_keeplora(["run", str(tmp_path / "e.yaml"), "--dry-run", "--assume", "tasks=1000", "--assume", "k=0.25"], "here")
    flat = " ".join(capsys.readouterr().out.split())
    assert "phases of 1000 tasks (docs/scale.md), base in" in flat
    for phase in ("gradient pass, sketched", "merge, at the last task", "the whole ledger", "verifying it"):
        assert phase in flat
    assert "U from 25% of the width, 0.10% more each task" in flat
    assert "after 250 tasks, nothing is left after 750" in flat


def test_numbers_in_words() -> None:
    assert [counted(n) for n in (0, 1, 2.34e15)] == ["-", "1.0e0", "2.3e15"]
    assert [took(n) for n in (59, 172_799, 172_800)] == ["0:59", "47:59:59", "2.0 days"]
