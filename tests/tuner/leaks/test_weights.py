"""Weights as each precision stores them: against the definitions on whole matrices, and where there is nothing to measure."""

from __future__ import annotations

import json

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.math import forward_change, rounding_floor, weight_leak
from keeplora.methods import get_method
from keeplora.tuner.leaks.rows import judge
from keeplora.tuner.leaks.weights import DTYPES, dtype_name
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net
from tests.tuner.leaks.learned import LAYER, TASKS, ends, merged, row_of, three_tasks, total

NAMES = (None, *TASKS)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def audited(request):
    learner = three_tasks(request.param)
    return learner, learner.audit("full")


def test_every_precision_is_there_once(audited):
    learner, audit = audited
    running = dtype_name(learner.store.W0[LAYER].dtype)
    assert {(r.export, r.dtype) for r in audit.exports} == {
        ("running", running), ("adapter", "fp32"), *((name, name) for name in DTYPES if name != running),
    }  # fmt: skip
    found = [(r.export, r.layer, r.basis) for r in audit.exports]
    assert len(found) == len(set(found)) == 4 * len(learner.targets) * 3  # U₀, and what a and b added: c is the last


@pytest.mark.parametrize("t", range(3))
def test_merged_rows_are_the_definition(audited, t):
    learner, audit = audited
    for target in learner.targets:
        layer = target.name
        U, stops = learner.U[layer].double(), ends(learner, layer)
        V = U[:, ([0, *stops])[t] : stops[t]]
        exact = (learner.store.W0[layer].double() + total(learner, layer, t).double()) @ U[:, : stops[t]]
        change = total(learner, layer, 3).double() - total(learner, layer, t).double()
        for export, dtype in [("running", learner.store.W0[layer].dtype), *DTYPES.items()]:
            if export == dtype_name(learner.store.W0[layer].dtype):
                continue
            row = row_of(audit.exports, export, layer, NAMES[t])
            now, then = merged(learner, layer, 3, dtype), merged(learner, layer, t, dtype)
            if V.shape[1] == 0:
                assert row.leak is None
            else:
                assert row.leak == pytest.approx(weight_leak(now, then, V), rel=1e-6, abs=1e-12)
                error = (now - then) - change
                assert row.floor == pytest.approx(float((error @ V).norm() / change.norm()), rel=1e-4, abs=1e-10)
            D = (now - then) @ U[:, : stops[t]]
            assert (row.random, row.worst) == pytest.approx(forward_change(D, exact), rel=1e-5, abs=1e-12)


def test_the_floor_of_U0_is_the_rounding_of_base_and_sum(audited):
    learner, audit = audited
    for name, dtype in DTYPES.items():
        if name == dtype_name(learner.store.W0[LAYER].dtype):
            continue
        row = row_of(audit.exports, name, LAYER, None)
        U0 = learner.start_bases()[LAYER]
        # In a base of fp32 the base itself is rounded as well, which the floor must count.
        expected = rounding_floor(learner.store.W0[LAYER].float(), total(learner, LAYER, 3), U0, dtype)
        assert row.floor == pytest.approx(expected, rel=0.05)


def test_low_precision_leaks_what_its_floor_says_and_the_adapter_nothing(audited):
    _, audit = audited
    rows = {name: [r for r in audit.exports if r.export == name] for name in ("bf16", "fp16", "running", "adapter")}
    worst = {name: max((r.leak or 0.0 for r in found), default=0.0) for name, found in rows.items()}
    assert worst["adapter"] <= 1e-6
    assert 1e-5 < worst["fp16"] < 0.5
    assert all(judge(r.leak, r.floor) in (None, "ok", "floor") for r in audit.exports)
    assert max(r.worst for r in rows["adapter"]) <= 1e-6 < max(r.worst for r in rows["fp16"])
    coarse = rows["bf16"] or rows["running"]
    assert max(r.leak or 0.0 for r in coarse) > 2 * worst["fp16"]


def test_the_adapters_rows_are_the_definition(audited):
    learner, audit = audited
    for t in range(3):
        row = row_of(audit.exports, "adapter", LAYER, NAMES[t])
        stops = ends(learner, LAYER)
        U = learner.U[LAYER].double()
        D = sum(
            r.factors[LAYER].s * r.factors[LAYER].B.double() @ r.factors[LAYER].A.double() for r in learner.records[t:]
        )
        V = U[:, ([0, *stops])[t] : stops[t]]
        assert row.leak == pytest.approx(float((D @ V).norm() / D.norm()), rel=0.2, abs=2e-9)  # s·B is rounded to fp32
        assert row.floor is None


def test_quick_results_are_the_running_rows_of_the_full_audit(audited):
    learner, audit = audited
    for row in learner.audit().rows:
        running = row_of(audit.exports, "running", row.layer, None)
        assert (row.weight_leak, row.weight_floor) == pytest.approx((running.leak, running.floor), rel=1e-9)
    assert learner.audit().rows == audit.rows
    assert learner.audit().exports == ()


def test_weights_changed_by_hand_are_above_their_floor():
    learner = three_tasks()
    with torch.no_grad():
        learner.store.module(LAYER).weight.add_(0.1 * torch.ones(18, 1) @ learner.start_bases()[LAYER][:, :1].T)
    audit = learner.audit("full")
    bad = {(r.export, r.layer) for r in audit.exports if judge(r.leak, r.floor) == "above"}
    assert bad == {("running", LAYER)}
    assert "✗" in str(audit).split(LAYER)[1].splitlines()[0]
    assert audit.passed, "only a factor's leak fails an audit"


def test_a_layer_that_no_task_moved_is_still_looked_at():
    learner = ContinualLearner(make_net(), config())
    assert all(r.weight_leak == 0 for r in learner.audit().rows)
    learn(learner, "a", 0)
    del learner.records[0].factors[LAYER]
    learner.store.restore({})
    with torch.no_grad():
        learner.store.module(LAYER).weight.add_(0.1)
    (row,) = [r for r in learner.audit("full").rows if r.layer == LAYER]
    assert row.weight_leak > 0.01
    assert row.weight_floor == 0


def test_weights_beyond_the_range_of_fp16_are_told():
    net = make_net()
    with torch.no_grad():
        net.encoder.layers[0].up.weight[0, 0] = 1e6
    learner = learn(ContinualLearner(net, config()), "a", 0)
    audit = learner.audit("full")
    text = json.dumps(audit.to_dict(), allow_nan=False)
    assert "fp16 cannot hold the weights of 1 layer (first encoder.layers.0.up)" in " ".join(audit.notes)
    row = row_of(audit.exports, "fp16", "encoder.layers.0.up", None)
    assert (row.leak, row.floor, row.random) == (None, None, None)
    assert "Infinity" not in text
    assert str(audit)


def test_before_any_task_there_is_nothing():
    learner = ContinualLearner(make_net(), config())
    audit = learner.audit("full")
    assert (audit.rows, audit.exports, audit.backward, audit.passed) == ([], (), (), True)
    assert str(audit)


def test_an_unknown_depth_is_a_sentence():
    with pytest.raises(KeepLoraError, match="detail must be one of quick, exports, full, not 'deep'"):
        ContinualLearner(make_net(), config()).audit("deep")


@pytest.mark.parametrize("name", ["gpm-lora", "inflora"])
def test_methods_that_protect_in_their_own_way(name):
    method = get_method(name)
    learner = method.learner(
        make_net(), method.make_config({**config().to_dict(), "energy_weights": 0.0, "options": {}})
    )
    for i, task in enumerate(("a", "b")):
        with learner.task(task, loader(seed=i), loss_fn) as model:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.05)
            for batch in loader(seed=i):
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
                learner.after_step()
    audit = learner.audit("full")
    assert audit.passed
    said = " ".join(audit.notes)
    assert "U₀ is empty (energy_weights is 0)" in said
    assert ("A trains as well and is projected off U" in said) == (name == "gpm-lora")
    assert "the bound alone" in said
    # U₀ is empty: what the first task protected is the first basis that can leak.
    assert all(r.leak is None and r.random == 0 for r in audit.exports if r.basis is None)
    assert max(r.leak for r in audit.exports if r.basis == "a" and r.export == "adapter") <= 1e-5
    assert all(len(r.by_basis) == 1 + (r.task == "b") and r.by_basis[0] is None for r in audit.rows)
    assert all(row.bound > 0 for row in audit.backward)
    assert str(audit)


def test_a_quantised_base_has_its_adapter_alone():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from tests.tuner import llama

    learner = ContinualLearner(llama.load("4bit"), llama.config())
    for i, name in enumerate(("a", "b")):
        llama.learn(learner, name, i)
    audit = learner.audit("full")
    assert {r.export for r in audit.exports} == {"adapter"}
    assert max(r.leak or 0.0 for r in audit.exports) <= 1e-5
    assert max(r.worst for r in audit.exports) <= 1e-5
    assert all(r.weight_leak is None for r in audit.rows)
    assert "are quantised: past tasks run beside them" in str(audit)
