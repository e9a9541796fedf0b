"""`keeplora run`: what it prints, what it writes, what overrides do, and that a dry run leaves no trace."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import yaml

from keeplora.experiment import Experiment
from keeplora.experiment.plan import make_plan
from keeplora.experiment.run_directory import RunDirectory
from tests.cli.tiny_world import PROBE, TASKS, ledger_tensors, results_of, same_tensors, status_of
from tests.experiment.generation_world import make_world


def files_below(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_run_in_a_pipe_is_quiet_and_ends_with_tables_and_the_report(world, process, tmp_path):
    file = world.yaml(tmp_path / "e.yaml")
    child = process("-m", "keeplora", "run", file, "--output", tmp_path / "run")
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    assert "\x1b" not in out + err  # no colours, no cursor moves
    assert "\r" not in out + err  # no bars
    assert next(line for line in err.splitlines() if line.startswith("task ")) == "task 1/3: paint"
    assert len(re.findall(r"^  epoch \d/2: loss [\d.]+, accuracy [\d.]+", err, re.MULTILINE)) == 6
    assert "task 1/3" not in out  # progress goes to standard error alone
    last = results_of(tmp_path / "run")["metrics"]["last"]
    assert f"{last:.1f}" in out
    assert all(name in out for name in (*TASKS, PROBE, "KeepLoRA++"))
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'run' / 'report.html'}"
    assert (tmp_path / "run" / "report.html").is_file()
    # The same numbers as the same experiment in Python.
    path, results = world.run()
    assert results_of(tmp_path / "run")["accuracy"] == results["accuracy"]
    assert same_tensors(ledger_tensors(tmp_path / "run"), ledger_tensors(path))


def test_options_win_over_the_file(world, cli, tmp_path):
    file = world.yaml(tmp_path / "e.yaml", seed=5, output=str(tmp_path / "elsewhere"))
    answer = cli(
        "run", file, "--method", "lora", "--seed", "3", "--output", tmp_path / "run",
        "-o", "training.epochs=1", "--set", "tuner.r=2", "-o", "order=[dots, paint, stripes]",
        "-o", "training.learning_rate=2e-3",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    config = RunDirectory(tmp_path / "run").read_config()
    assert (config["method"], config["seed"], config["order"]) == ("lora", 3, ["dots", "paint", "stripes"])
    assert (config["training"]["epochs"], config["training"]["learning_rate"]) == (1, 0.002)
    assert config["training"]["batch_size"] == 8  # the file's
    assert not (tmp_path / "elsewhere").exists()
    assert {v.shape[0] for k, v in ledger_tensors(tmp_path / "run").items() if "/A/" in k} == {2}
    assert [len(i["epochs"]) for i in results_of(tmp_path / "run")["tasks_info"]] == [1, 1, 1]


def test_default_output_is_named_after_the_run(world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = world.yaml(tmp_path / "e.yaml", name="my study")
    assert cli("run", file, "--method", "zero-shot", "--seed", "4").code == 0
    assert status_of(tmp_path / "runs" / "my-study-zero-shot-seed4")["state"] == "finished"


def test_runs_of_other_methods_beside_it_join_the_tables(world, cli, tmp_path):
    file = world.yaml(tmp_path / "e.yaml")
    assert cli("run", file, "--method", "zero-shot", "--output", tmp_path / "runs" / "a").code == 0
    answer = cli("run", file, "--method", "lora", "--output", tmp_path / "runs" / "b", "--against", world.run()[0])
    assert answer.code == 0
    assert all(title in answer.out for title in ("Zero-shot", "Sequential LoRA", "KeepLoRA++"))
    page = (tmp_path / "runs" / "b" / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Zero-shot", "Sequential LoRA", "KeepLoRA++"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    # 12 vision targets of 32 x 32 and 8 text targets of 24 x 24, rank 4: B alone, A and B, everything, nothing.
    [
        ("keeplora++", 4 * (12 * 32 + 8 * 24)),
        ("lora", 8 * (12 * 32 + 8 * 24)),
        ("full-ft", 12 * 32**2 + 8 * 24**2),
        ("zero-shot", 0),
    ],
)
def test_dry_run_tells_the_plan_and_writes_nothing(world, cli, tmp_path, monkeypatch, method, parameters):
    monkeypatch.chdir(tmp_path)
    file = world.yaml(tmp_path / "e.yaml", training={"epochs": {"default": 2, "dots": 5}})
    before, shared = files_below(tmp_path), files_below(world.root)
    answer = cli("run", file, "--dry-run", "--method", method)
    assert answer.code == 0, answer.err
    assert files_below(tmp_path) == before  # neither the run directory nor its parent
    assert files_below(world.root) == shared
    assert f"trained parameters per task: {parameters:,}" in answer.out
    row = next(line for line in answer.out.splitlines() if "dots" in line)
    assert [int(n) for n in re.findall(r"\d+", row)] == [
        2,
        20,
        0,
        12,
        5,
        15,
    ]  # classes, train, val., test, epochs, steps
    assert "12 in vision_model" in answer.out
    assert "8 in text_model" in answer.out
    assert f"probe {PROBE}: 12 pictures" in answer.out
    assert re.search(r"memory: about [\d.]+ GiB", answer.out)
    assert re.search(r"time: about \d+:\d\d", answer.out)
    assert "differs from preset default: tuner.r: 4 (preset: 16)" in answer.out
    assert f"trained parameters per task: {parameters:,}" in answer.out
    if method != "zero-shot":
        counts = {i["trained_parameters"] for i in world.run(method=method)[1]["tasks_info"]}
        assert 0.9 * parameters <= max(counts) <= parameters  # a rank shrinks where little residual space is left


def test_dry_run_of_a_generative_model_is_timed_and_reckoned(cli, tmp_path, monkeypatch):
    config = make_world(tmp_path / "world")
    config["training"]["micro_batch"] = 2
    file = tmp_path / "world/e.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    answer = cli("run", file, "--dry-run", "--assume", "tflops=1")
    assert answer.code == 0, answer.err
    assert files_below(tmp_path) == before
    flat = " ".join(answer.out.split())
    row = next(line for line in answer.out.splitlines() if "colours" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["colours", "exact", "12", "0", "6", "2", "6"]
    assert "probe general: 6 questions, never trained on" in flat
    assert "scaled up from one timed batch" in flat  # measured, as ever
    assert "fp32 *" in flat
    assert "time at 1 TFLOP/s" in flat
    tokens = re.search(r"tokens=(\d+)", flat)
    assert tokens is not None
    assert 16 < int(tokens[1]) < 100  # of the timed batch, not the assumed 700
    assert "weights of model are not here" not in flat
    # The same without weights, processor and data.
    for path in [*(tmp_path / "world/model").iterdir(), *(tmp_path / "world").glob("*/train.json")]:
        if path.name != "config.json":
            path.unlink()
    bare = cli("run", file, "--dry-run", "--assume", f"tokens={tokens[1]}", "--assume", "samples=12")
    assert bare.code == 0, bare.err
    told = " ".join(bare.out.split())
    assert "are not here: what follows is arithmetic on its config.json" in told
    assert "sizes of the tasks are assumed: task 'colours'" in told
    table = [line for line in answer.out.splitlines() if "GiB" in line or "MiB" in line]
    assert [line for line in bare.out.splitlines() if "│" in line and "MiB" in line] == [
        line for line in table if "│" in line
    ]
    assert cli("run", file, "--assume", "tokens=3").err.startswith("Error: --assume is for --dry-run")


def test_dry_run_trains_nothing(world):
    setup = Experiment(world.config(), quiet=True).setup
    before = {name: value.clone() for name, value in setup.family.model.state_dict().items()}
    make_plan(setup)
    after = setup.family.model.state_dict()
    assert same_tensors(before, after)
    assert all(p.grad is None for p in setup.family.model.parameters())
    torch.testing.assert_close(before, dict(after))


@pytest.mark.parametrize(
    ("changes", "gradients", "features"),
    [
        ({}, 1, 1),
        ({"memory": "gradients"}, 2, 0),
        ({"memory": "gradients", "gradient_samples": 5, "feature_samples": 3}, 2, 0),
        ({"gradient_samples": 5, "feature_samples": 3, "statistics_tolerance": 0.5}, 1, 1),
    ],
)
def test_the_plan_counts_every_pass_over_the_data(
    world, cli, tmp_path, monkeypatch, changes: dict[str, Any], gradients: int, features: int
):
    """Of G before each task, and after it of C, or of G again; with a tolerance that is the most it may be."""
    monkeypatch.setattr("keeplora.experiment.plan._time_one_batch", lambda setup, targets: (1.0, 1000.0, None))
    changed = {f"tuner.{key}": value for key, value in changes.items()}
    plan = make_plan(Experiment(world.config(), changed, quiet=True).setup)
    sizes = [row["train"] for row in plan.tasks]
    of_g, of_c = (sum(min(n, changes.get(key, n)) for n in sizes) for key in ("gradient_samples", "feature_samples"))
    assert plan.seconds["statistics"] == 1000 * gradients * of_g + features * of_c
    options = [word for key, value in changed.items() for word in ("-o", f"{key}={value}")]
    answer = cli("run", world.yaml(tmp_path / "e.yaml"), "--dry-run", *options)
    assert ("statistics at most " in answer.out) == ("statistics_tolerance" in changes), answer.err


def test_second_run_into_the_directory_is_refused(world, cli, tmp_path):
    path, _ = world.run()
    before = files_below(path)
    answer = cli("run", world.yaml(tmp_path / "e.yaml"), "--output", path)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == (
        f"Error: {path} already holds a run (finished, 3 tasks done); see it by `keeplora report {path}`, use it by `keeplora "
        f"predict {path}`, teach it further tasks by `keeplora resume {path} --add-tasks FILE`, or choose another --output "
        "(`output:` in the file)\n"
    )
    assert files_below(path) == before


def test_foreign_folder_is_left_alone(world, cli, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    answer = cli("run", world.yaml(tmp_path / "e.yaml"), "--output", tmp_path / "thesis")
    assert answer.code == 1
    assert "is not empty (chapter.tex) and not a run of keeplora" in answer.err
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_relative_paths_of_a_file_start_at_its_folder(world, cli, tmp_path, monkeypatch):
    """Data and model alike: a configuration means the same from wherever it is run, and in its own run directory."""
    monkeypatch.chdir(tmp_path)
    file = world.yaml(world.root / "beside.yaml", model=world.model.name, base_dir=".")
    try:
        answer = cli("run", file, "--method", "zero-shot", "--output", "run")
    finally:
        file.unlink()
    assert answer.code == 0, answer.err
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert cli("resume", "../run").code == 0


def test_report_is_rendered_again(world, cli, tmp_path):
    path = world.copied(world.run()[0], tmp_path / "run")
    (path / "report.html").unlink()
    answer = cli("report", path, "--against", world.run(method="lora")[0])
    assert (answer.code, answer.out) == (0, f"{path / 'report.html'}\n")
    assert "Sequential LoRA" in (path / "report.html").read_text(encoding="utf-8")


def test_an_index_over_runs_is_written(world, cli, tmp_path):
    world.copied(world.run()[0], tmp_path / "runs" / "one")
    answer = cli("report", "--index", tmp_path / "runs")
    assert (answer.code, answer.out) == (0, f"{tmp_path / 'runs' / 'index.html'}\n")
    assert 'href="one/report.html"' in (tmp_path / "runs" / "index.html").read_text(encoding="utf-8")
    refused = cli("report", "--index", tmp_path / "runs", "--against", tmp_path / "runs" / "one")
    assert refused.code == 1
    assert "--against is for one run's report" in refused.err
    (tmp_path / "none").mkdir()
    refused = cli("report", "--index", tmp_path / "none")
    assert (refused.code, refused.err.count("\n")) == (1, 1)


def test_audit_answers_with_its_exit_status(world, cli, tmp_path, monkeypatch):
    path, results = world.run()
    answer = cli("audit", path)
    assert answer.code == 0
    assert "within the limit of 1e-5" in answer.out
    assert "vision_model.encoder.layers.0.self_attn.q_proj" in answer.out
    as_json = cli("audit", path, "--json")
    assert as_json.code == 0
    assert json.loads(as_json.out)["factor_leak_max"] == pytest.approx(results["audit"]["factor_leak_max"], rel=0.5)
    assert len(json.loads(as_json.out)["rows"]) == 20 * 3
    # A factor that does leak: plain LoRA's would, so let the audit see bases that the factors never respected.
    from keeplora.tuner import ContinualLearner
    from keeplora.tuner.basis import Bases

    original = ContinualLearner.restore_bases

    def turned(self, bases, records):
        original(self, bases, records)
        assert self._U is not None
        self._U = Bases(Bases.of({name: U.flip(0) for name, U in self._U.items()}).start, self._U.records)

    monkeypatch.setattr(ContinualLearner, "restore_bases", turned)
    bad = cli("audit", path)
    assert bad.code == 1
    assert "OVER the limit of 1e-5" in bad.out
    assert cli("audit", path, "--json").code == 1


def test_audit_of_a_method_without_subspaces_is_a_sentence(world, cli):
    for method in ("lora", "zero-shot", "full-ft"):
        answer = cli("audit", world.run(method=method)[0])
        assert answer.code == 1
        assert "protects no subspace" in answer.err


def test_listings_and_version(cli):
    methods = cli("methods")
    assert methods.code == 0
    assert all(name in methods.out for name in ("zero-shot", "full-ft", "lora", "keeplora++-cls"))
    suites = cli("suites")
    assert suites.code == 0
    assert "demo" in suites.out
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", cli("--version").out)
    assert cli().code in (0, 2)  # no arguments: the help


def test_help_names_every_command(cli):
    answer = cli("--help")
    assert answer.code == 0
    assert cli("-h").out == answer.out
    assert "..." not in answer.out.partition("Commands")[2].replace("s3://...", "")  # no line is cut short
    assert "Example: keeplora run" in cli("run", "-h").out
    for command in ("run", "resume", "predict", "export", "report", "audit", "methods", "suites", "assets"):
        assert re.search(rf"^\W*{command}\b", answer.out, re.MULTILINE), command
