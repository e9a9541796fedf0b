"""A run until every layer is full, under each policy, and one under a memory budget: it ends, and says what it is worth."""

from __future__ import annotations

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment import TrainedModel
from keeplora.experiment.config import load_config
from tests.cli.tiny_world import TASKS, record_of, results_of, status_of

FULL = {"r": 2, "energy_features": 1.0, "target_modules": "vision_model[.].*(q_proj|k_proj|v_proj|out_proj)"}
"""A picture has many patches: its first task fills these layers."""


@pytest.mark.parametrize("policy", ["shrink", "freeze", "raise"])
def test_a_run_ends_with_tasks_sat_out(world, policy):
    path, results = world.run(tuner={**FULL, "when_full": policy})
    assert status_of(path)["state"] == "finished"
    assert status_of(path)["tasks_done"] == 3
    infos = [record_of(path, i)["info"] for i in (1, 2, 3)]
    why = infos[-1]["not_learned"]
    assert (
        ("when_full: raise" in why) if policy == "raise" else ("full and frozen" in why or "residual space left" in why)
    )
    assert why in results["warnings"]
    assert "not_learned" not in infos[0], "nothing was learned at all: the test shows nothing"
    learned = [i for i, info in enumerate(infos) if "not_learned" not in info]
    rows = results["accuracy"]
    assert rows[1] != rows[0]
    for i in learned:  # what was learned is answered as then, to the end
        assert [row[i] for row in rows[i + 1 :]] == [rows[i + 1][i]] * (3 - i)
    capacity = results["capacity"]
    assert capacity["when_full"] == policy
    assert capacity["tasks"] == list(TASKS)
    assert capacity["forecast"]["first"]["likely"] == 0
    if policy != "raise":
        assert all(layer["state"] in ("full", "frozen") for layer in capacity["layers"])
    assert results["audit"]["factor_leak_max"] <= 1e-5
    report = (path / "report.html").read_text(encoding="utf-8")
    assert "Layer by layer" in report
    assert capacity["notes"][0].split("(")[0].strip() in report
    assert results_of(path)["capacity"] == capacity
    assert TrainedModel(path, device="cpu").learner.capacity().to_dict() == capacity


def test_results_say_which_targets_were_frozen(world):
    _, results = world.run(tuner={"r": 6, "energy_features": 0.999, "when_full": "freeze"})
    frozen = [set(info["frozen"]) for info in results["tasks_info"]]
    assert any(frozen)
    for layer in results["layers"]:
        for info, rank in zip(results["tasks_info"], layer["rank"], strict=True):
            assert rank == 0 or layer["layer"] not in info["frozen"]


def test_a_budget_in_words_is_kept_and_what_it_costs_is_told(world):
    text = {"target_modules": "text_model[.].*(q_proj|k_proj|v_proj|out_proj)"}  # few words fill these layers slowly
    path, results = world.run(tuner={**text, "max_basis_bytes": "4KiB"})
    assert load_config(path / "config.yaml").tuner.max_basis_bytes == 4096
    assert results["cost"]["state_bytes"] == results["capacity"]["bytes"] <= 4096
    assert results["capacity"]["given_up"]
    assert any("max_basis_bytes" in line and "given up" in line for line in results["warnings"])
    assert "Given up for the budget" in (path / "report.html").read_text(encoding="utf-8")
    free = world.run(tuner={**text, "max_basis_bytes": "1GiB"})[1]
    assert free["capacity"]["given_up"] == []
    assert free["capacity"]["bytes"] > 4096
    assert free["accuracy"] == world.run(tuner=text)[1]["accuracy"]


@pytest.mark.parametrize(("value", "bytes_"), [
    (4096, 4096), ("4096", 4096), ("200MiB", 200 * 2**20), ("1.5 gib", 3 * 2**29), ("300MB", 300 * 10**6), (None, None),
])  # fmt: skip
def test_budgets_are_read(world, value, bytes_):
    config = load_config(world.config(tuner={"max_basis_bytes": value}))
    assert config.tuner.max_basis_bytes == bytes_
    assert load_config(config.resolved()).tuner.max_basis_bytes == bytes_


@pytest.mark.parametrize("value", [0, -5, 1.5, "lots", "5 TB", "", True, "0", "-3MiB", "nan"])
def test_wrong_budgets_are_refused_by_their_key(world, value):
    with pytest.raises(ConfigError, match=r"tuner\.max_basis_bytes is .* but must be a number of bytes"):
        load_config(world.config(tuner={"max_basis_bytes": value}))


def test_an_unknown_policy_is_refused(world):
    with pytest.raises(ConfigError, match=r"tuner\.when_full.*freeze"):
        load_config(world.config(tuner={"when_full": "freez"}))


def test_a_budget_below_the_weights_own_basis_is_refused_before_anything_is_trained(world, tmp_path):
    from keeplora.experiment import Experiment

    values = world.config(tuner={"max_basis_bytes": "1KiB"}, output=str(tmp_path / "run"))
    with pytest.raises(
        ConfigError, match="max_basis_bytes is 1024, but the bases of the pretrained weights alone take"
    ):
        Experiment(values, quiet=True).run()
    assert not (tmp_path / "run/ledger").exists()
