"""`keeplora audit`: every option on a real run, and its exit status."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from keeplora.tuner.leaks import found, weights
from tests.cli.tiny_world import TASKS

LAYER = "vision_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def run(world):
    return world.run()[0]


def test_the_table_has_every_precision_and_both_stabilities(run, cli):
    answer = cli("audit", run)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("✗")) <= 120
    heads = " ".join(lines[:4])
    assert all(word in heads for word in ("factors", "running fp32", "bf16", "fp16", "adapter", "leak/floor"))
    (leaks, stability) = [line for line in lines if line.startswith(LAYER)]
    assert leaks.count("✓") == 3  # factors, fp32, adapter
    assert leaks.count("≈") == 2
    assert "bound alone" in stability
    assert "worst factor leak" in lines[-1]
    assert "\x1b" not in answer.out


def test_json_holds_what_the_table_rests_on(run, cli):
    answer = cli("audit", run, "--json")
    value = json.loads(answer.out)
    assert set(value) == {"factor_leak_max", "rows", "notes", "bases", "exports", "backward"}
    assert value["bases"] == [None, *TASKS]
    assert {row["export"] for row in value["exports"]} == {"running", "bf16", "fp16", "adapter"}
    assert len(value["exports"]) == 4 * 20 * 3
    assert set(value["exports"][0]) == {"export", "dtype", "layer", "basis", "leak", "floor", "random", "worst"}
    assert len(value["backward"]) == 20 * 2
    row = value["backward"][0]
    assert set(row) == {"layer", "task", "explained", "bound", "harm", "tightness", "holds"}
    assert row["harm"] is None


def test_quick_measures_no_exports(run, cli, monkeypatch):
    monkeypatch.setattr(found, "merged_rows", None)  # would raise
    value = json.loads(cli("audit", run, "--quick", "--json").out)
    assert set(value) == {"factor_leak_max", "rows", "notes", "bases"}
    assert "running weights" in cli("audit", run, "--quick").out


def test_all_shows_all(run, cli, monkeypatch):
    from keeplora.tuner.leaks import table

    monkeypatch.setattr(table, "SHOWN", 3)
    few, every = cli("audit", run, "--quick"), cli("audit", run, "--quick", "--all")
    assert "17 more layers are not shown" in few.out
    assert few.out.count("self_attn") == 3
    assert every.out.count("self_attn") == 20


def test_plot_writes_a_picture(run, cli, tmp_path):
    answer = cli("audit", run, "--quick", "--plot", tmp_path / "leaks.png")
    assert answer.code == 0
    assert f"Plot: {tmp_path / 'leaks.png'}" in answer.out
    assert min(Image.open(tmp_path / "leaks.png").size) > 300
    as_json = cli("audit", run, "--quick", "--json", "--plot", tmp_path / "other.svg")
    json.loads(as_json.out)
    assert "Plot:" in as_json.err
    bad = cli("audit", run, "--plot", tmp_path / "leaks.gif")
    assert bad.code == 1
    assert "a plot is written as .png, .svg or .pdf" in bad.err


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_what_export_wrote_is_audited(run, cli, tmp_path, format):
    out = tmp_path / "out"
    assert cli("export", run, "--format", format, "--output", out).code == 0
    answer = cli("audit", run, "--export", out)
    assert answer.code == 0
    assert (
        f"{out}: {'an adapter' if format == 'peft' else 'a merged checkpoint'} in fp32, holding all tasks."
        in answer.out
    )
    assert "saved fp32" in answer.out
    assert "the export leaks no more than its precision explains" in answer.out


def test_an_export_that_leaks_has_status_1(run, cli, tmp_path):
    out = tmp_path / "out"
    cli("export", run, "--format", "merged", "--output", out)
    tensors = load_file(out / "model.safetensors")
    key = next(name for name in tensors if name.endswith(f"{LAYER}.weight"))
    tensors[key] = tensors[key] + 0.05 * torch.randn_like(tensors[key])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    answer = cli("audit", run, "--export", out)
    assert answer.code == 1
    assert "LEAKS MORE THAN" in answer.out
    assert "within the limit of 1e-5" in answer.out  # the run's own factors
    assert next(line for line in answer.out.splitlines() if "self_attn" in line).startswith(
        LAYER
    )  # the worst comes first
    wrong = cli("audit", run, "--export", tmp_path)
    assert wrong.code == 1
    assert "holds no adapter_config.json and no model.safetensors" in wrong.err


def test_a_run_tells_exports_once_it_is_finished(world, monkeypatch, tmp_path):
    from keeplora.experiment import Experiment

    made = []
    original = weights.merged_rows

    def counted(state, *args, export, **kwargs):
        made.append((export, state.name, len(state.later(0))))
        return original(state, *args, export=export, **kwargs)

    monkeypatch.setattr(found, "merged_rows", counted)
    results = Experiment(world.config(output=str(tmp_path / "run")), quiet=True).run()
    assert sorted(made) == sorted((e, r["layer"], 3) for e in ("bf16", "fp16") for r in results["layers"])
    exports = results["audit"]["exports"]
    assert {(r["export"], r["basis"]) for r in exports} == {(e, None) for e in ("running", "bf16", "fp16", "adapter")}
    assert results["audit"]["bases"] == [None, *TASKS]
    assert "backward" not in results["audit"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Weights, by precision" in page
