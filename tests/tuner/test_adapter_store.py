"""Beside a quantised base, past tasks run as one adapter per layer: stability, undo, reload, cost."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError, LedgerError
from keeplora.tuner.adapter_store import PAST, AdapterStore
from keeplora.tuner.persistence import all_updates
from keeplora.tuner.quantised import quantisation
from tests.tuner.blocks import hooks, same
from tests.tuner.llama import (
    KINDS,
    LAYERS,
    batches,
    close,
    config,
    learn,
    load,
    logits,
    past,
    stored,
    token_losses,
    train,
)

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def train_then_fail(model: nn.Module) -> None:
    train(model, batches(1))
    raise RuntimeError("no gradient was left")


@pytest.fixture(scope="module", params=KINDS)
def learned(request):
    """Two tasks on a quantised base, and what it stored before."""
    model = load(request.param)
    before = stored(model)
    learner = ContinualLearner(model, config(), base_name="tiny")
    for i, name in enumerate(("a", "b")):
        learn(learner, name, i)
    return learner, before


def test_the_base_is_what_it_was(learned):
    learner, before = learned
    assert isinstance(learner.store, AdapterStore)
    assert [t.name for t in learner.targets] == sorted(LAYERS, key=[t.name for t in learner.targets].index)
    assert same(stored(learner.model), before)
    assert all(quantisation(learner.model.get_submodule(name)) for name in LAYERS), "PEFT's wrappers are still there"
    assert len(past(learner.model)) == 2 * len(LAYERS)


def test_state_dict_is_the_bases_own(learned):
    learner, _ = learned
    assert not [key for key in learner.model.state_dict() if PAST in key]


def test_inputs_that_were_protected_get_the_same_output_after_a_later_task(learned):
    learner, _ = learned
    kind = quantisation(learner.model.get_submodule(LAYERS[0]))
    model = load("8bit" if kind == "8bit" else "4bit")
    again = ContinualLearner(model, config())
    learn(again, "a", 0)
    generator = torch.Generator().manual_seed(1)
    inside = {n: torch.randn(6, U.shape[1], generator=generator) @ U.T for n, U in again.U.items()}
    outside = {n: torch.randn(6, U.shape[0], generator=generator) for n, U in again.U.items()}
    with torch.no_grad():
        before = {n: (model.get_submodule(n)(inside[n]), model.get_submodule(n)(outside[n])) for n in LAYERS}
    learn(again, "b", 1)
    moved = []
    for name in LAYERS:
        with torch.no_grad():
            y, other = model.get_submodule(name)(inside[name]), model.get_submodule(name)(outside[name])
        assert close(y, before[name][0], 1e-5), name
        moved.append(float((other - before[name][1]).norm() / before[name][1].norm()))
    assert min(moved) > 1e-3, "the second task changed nothing, so the test shows nothing"


def test_past_adapter_is_the_sum_of_the_records(learned):
    learner, _ = learned
    for name in LAYERS:
        module = learner.model.get_submodule(name)
        x = torch.randn(4, module.in_features)
        delta = sum(r.factors[name].delta for r in learner.records)
        assert close(getattr(module, PAST)(x), x @ delta.T, 1e-5)
        assert getattr(module, PAST).A.shape[0] == sum(r.factors[name].A.shape[0] for r in learner.records)
        with torch.no_grad():
            y = module(x)
            handle = module._forward_hooks.copy()
            module._forward_hooks.clear()
            base = module(x)
            module._forward_hooks.update(handle)
        assert torch.equal(y, base + getattr(module, PAST)(x))


def test_autocast_does_not_round_the_past():
    model = load("4bit")
    learner = learn(ContinualLearner(model, config()), "a", 0)
    adapter = getattr(model.get_submodule(LAYERS[0]), PAST)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert torch.equal(y, adapter(x))
    assert learner.records


def test_audit_tells_that_no_weight_moves(learned):
    learner, _ = learned
    audit = learner.audit()
    assert 0 < audit.factor_leak_max <= 1e-5
    assert len(audit.rows) == 2 * len(LAYERS)
    assert all(row.weight_leak is None and row.weight_floor is None for row in audit.rows)
    assert "14 of 14 layers are quantised" in str(audit)
    assert audit.to_dict()["notes"] == list(audit.notes)


def test_cost_at_inference_is_counted(learned):
    learner, _ = learned
    entries = sum((r.factors[n].A.numel() + r.factors[n].B.numel()) for r in learner.records for n in LAYERS)
    cost = learner.serving_cost()
    assert cost.layers == len(LAYERS)
    assert cost.rank == max(sum(r.factors[n].A.shape[0] for r in learner.records) for n in LAYERS) == 6
    assert (cost.bytes, cost.flops_per_token) == (4 * entries, 2 * entries)
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
    assert learner.state_bytes() == cost.bytes + sum(4 * U.numel() for U in learner.U.values())
    assert cost.base_flops_per_token == 2 * 2 * (attention + mlp)
    assert learner.records[1].info["serving_cost"] == cost.to_dict()
    assert learner.records[0].info["serving_cost"]["rank"] == 3
    assert "beside 14 layers, rank up to 6" in learner.summary()
    merged = learn(ContinualLearner(load(), config()), "a", 0)
    assert merged.serving_cost().layers == 0
    assert "serving_cost" not in merged.records[0].info
    assert "MFLOP" not in merged.summary()


@pytest.mark.parametrize("kind", ["8bit", "4bit-nested"])
@pytest.mark.parametrize("how", ["abort", "exception in the block", "accept", "exception in the merge"])
def test_undo_gives_the_past_back_bit_for_bit(kind, how, monkeypatch):
    model = load(kind)
    before = stored(model)
    learner = learn(ContinualLearner(model, config()), "a", 0)
    kept, answers, hooked, U = past(model), logits(model), hooks(model), dict(learner.U)
    modules = {name: model.get_submodule(name) for name in LAYERS}
    if how == "abort":
        train(learner.start_task("b", batches(1), token_losses), batches(1))
        learner.abort_task()
    elif how == "accept":
        falling = iter([{"a": 90.0}, {"a": 10.0}])
        with pytest.warns(UserWarning, match="it is undone"):
            learn(learner, "b", 1, accept={"max_drop": 1, "action": "undo"}, evaluate=lambda: next(falling))
    elif how == "exception in the merge":
        monkeypatch.setattr(ContinualLearner, "_protect", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(learner, "b", 1)
    else:
        with (
            pytest.raises(RuntimeError, match="no gradient was left"),
            learner.task("b", batches(1), token_losses) as peft_model,
        ):
            train_then_fail(peft_model)
    assert [r.name for r in learner.records] == ["a"]
    assert same(past(model), kept)
    assert same(stored(model), before)
    assert hooks(model) == hooked
    assert same(learner.U, U)
    assert all(model.get_submodule(name) is modules[name] for name in LAYERS)
    assert torch.equal(logits(model), answers)


@pytest.mark.parametrize("kind", KINDS)
def test_reload_gives_the_same_bits_and_goes_on(kind, tmp_path):
    learner = ContinualLearner(load(kind), config(), ledger=tmp_path / "ledger")
    learn(learner, "a", 0)
    resumed = ContinualLearner.from_pretrained(tmp_path / "ledger", load(kind), append=True)
    assert torch.equal(logits(resumed.model), logits(learner.model))
    for one in (learner, resumed):
        one._ledger = None
        learn(one, "b", 1)
    assert same(past(resumed.model), past(learner.model))
    assert same(resumed.U, learner.U)
    learner.save_pretrained(tmp_path / "saved")
    again = ContinualLearner.from_pretrained(tmp_path / "saved", load(kind))
    assert torch.equal(logits(again.model), logits(learner.model))
    assert again.audit().to_dict() == learner.audit().to_dict()


def test_ledger_of_another_base_is_refused(tmp_path):
    learner = learn(ContinualLearner(load("8bit"), config(), ledger=tmp_path / "ledger"), "a", 0)
    for kind in (None, "4bit"):
        with pytest.raises(LedgerError, match="belongs to another base model"):
            ContinualLearner.from_pretrained(tmp_path / "ledger", load(kind))
    with pytest.raises(KeepLoraError, match="carries the past tasks of another learner; load the untouched base"):
        ContinualLearner.from_pretrained(tmp_path / "ledger", learner.model)


def test_linears_that_are_not_quantised_are_merged_as_ever():
    model = load("8bit")
    plain = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        plain.weight.copy_(load().get_submodule(LAYERS[3]).weight)
    model.get_submodule(LAYERS[3].rpartition(".")[0]).o_proj = plain
    learner = learn(ContinualLearner(model, config()), "a", 0)
    assert not hasattr(plain, PAST)
    assert torch.equal(
        plain.weight, load().get_submodule(LAYERS[3]).weight + learner.records[0].factors[LAYERS[3]].delta
    )
    assert hasattr(model.get_submodule(LAYERS[0]), PAST)
    leaks = {row.layer: row.weight_leak for row in learner.audit().rows}
    assert [name for name, leak in leaks.items() if leak is not None] == [LAYERS[3]]
    assert learner.serving_cost().layers == len(LAYERS) - 1
    learner.store.restore({})
    assert torch.equal(plain.weight, load().get_submodule(LAYERS[3]).weight)
    assert past(model) == {}
    assert all_updates(learner.records).keys() == set(LAYERS)


def test_a_deep_copy_runs_its_own_past():
    model = load("8bit")
    learner = learn(ContinualLearner(model, config()), "a", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model)
    before = logits(twin)
    assert torch.equal(before, logits(model))
    learn(learner, "b", 1)
    assert torch.equal(logits(twin), before)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_bfloat16_with_checkpointing(kind):
    """What a 7B model runs as: finite, protected to the precision of the dtype, the past in float32."""
    model = load(kind, torch.bfloat16)
    start = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    (start or model.gradient_checkpointing_enable)({"use_reentrant": False})
    learner = ContinualLearner(model, config())
    data = batches(0)
    with learner.task("a", data, token_losses) as peft_model:
        train(peft_model.train(), data)
        peft_model.eval()
    generator = torch.Generator().manual_seed(0)
    inside = {n: (torch.randn(6, U.shape[1], generator=generator) @ U.T).bfloat16() for n, U in learner.U.items()}
    with torch.no_grad():
        before = {n: model.get_submodule(n)(inside[n]) for n in LAYERS}
    learn(learner, "b", 1)
    assert learner.audit().passed
    assert torch.isfinite(logits(model)).all()
    assert all(b.dtype == torch.float32 for b in past(model).values())
    with torch.no_grad():
        for name in LAYERS:
            y = model.get_submodule(name)(inside[name])
            assert y.dtype == torch.bfloat16
            # x itself is rounded to bf16 after it was put into span(U), so what is left of it outside is 2⁻⁹ of it.
            assert close(y.float(), before[name].float(), 0.01), name
