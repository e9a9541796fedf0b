"""`free_modules`: linears that train in full beside the protected targets."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import ConfigError, TargetError
from keeplora.methods import get_method
from keeplora.tuner import Ledger
from keeplora.tuner.persistence import concatenated, free_weights, merge_into, write_peft_adapter
from tests.tuner.blocks import Samples, config, hooks, learn, loader, loss_fn, make_net, same, train, weights

FREE = ["embed", "encoder.layers.1.mix"]
X = Samples(6, 4).x


def make(**kwargs) -> ContinualLearner:
    return ContinualLearner(make_net(), config(free_modules=FREE, **kwargs))


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


def test_weight_and_bias_train_and_are_recorded():
    learner = make(r=2)  # a rank that no layer's residual space falls short of
    before = weights(learner.model)
    planned = learner.planned_parameters()
    model = learner.start_task("a", loader(), loss_fn)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if "lora_" not in n} == {
        f"base_model.model.{name}.{key}" for name in FREE for key in ("weight", "bias")
    }
    assert all("lora_B" in n for n in trainable if "lora_" in n), "A must stay frozen"
    train(model, loader())
    record = learner.finish_task()
    assert record is not None
    assert set(record.full) == {f"{name}.{key}" for name in FREE for key in ("weight", "bias")}
    after = weights(learner.model)
    for name, delta in record.full.items():
        assert delta.abs().max() > 0
        assert torch.equal(after[name], before[name] + delta)
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert record.info["free_modules"] == FREE
    free = sum(after[name].numel() for name in record.full)
    assert planned == record.info["trained_parameters"] == free + sum(f.B.numel() for f in record.factors.values())
    assert not any(name.startswith("embed") for name in learner.U)


@pytest.mark.parametrize("how", ["abort", "accept"])
def test_undo_is_bit_exact(how):
    learner = make()
    learn(learner, "a", 0)
    before, flags = weights(learner.model), {n: p.requires_grad for n, p in learner.model.named_parameters()}
    if how == "abort":
        model = learner.start_task("b", loader(seed=1), loss_fn)
        train(model, loader(seed=1))
        assert not torch.equal(learner.model.get_submodule("embed").weight, before["embed.weight"])
        learner.abort_task()
    else:
        falling = iter([{"a": 90.0}, {"a": 10.0}])
        with pytest.warns(UserWarning, match="it is undone"):
            learn(learner, "b", 1, accept={"max_drop": 1, "action": "undo"}, evaluate=lambda: next(falling))
    assert same(weights(learner.model), before)
    assert {n: p.requires_grad for n, p in learner.model.named_parameters()} == flags
    assert hooks(learner.model) == []
    assert [r.name for r in learner.records] == ["a"]


def test_saved_and_reloaded_bit_for_bit(tmp_path):
    learner = make()
    learn(learner, "a", 0)
    learn(learner, "b", 1)
    folder = learner.save_pretrained(tmp_path / "out")
    found = Ledger.open(folder / "ledger").records()
    assert all(same(a.full, b.full) for a, b in zip(found, learner.records, strict=True))
    again = ContinualLearner.from_pretrained(folder, make_net())
    assert same(weights(again.model), weights(learner.model))
    assert again.config.free_modules == FREE
    other = make_net()
    with torch.no_grad():
        other.embed.bias[0] += 1
    with pytest.raises(Exception, match="another base model"):
        ContinualLearner.from_pretrained(folder, other)


def test_merge_into_another_copy_of_the_base():
    learner = make()
    learn(learner, "a", 0)
    learn(learner, "b", 1)
    assert same(weights(merge_into(learner, make_net())), weights(learner.model))


def test_adapter_on_disk_holds_them(tmp_path):
    learner = make()
    learn(learner, "a", 0)
    after_a = answers(learner.model)
    learn(learner, "b", 1)
    learner.save_pretrained(tmp_path / "out")
    first = PeftModel.from_pretrained(make_net(), str(tmp_path / "out" / "adapters" / "0001-a"))
    assert torch.allclose(answers(first), after_a, atol=1e-5)
    path = write_peft_adapter(tmp_path / "all", concatenated(learner.records), "net", free_weights(learner))
    assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"] == FREE
    both = PeftModel.from_pretrained(make_net(), str(path))
    assert torch.allclose(answers(both), answers(learner.model), atol=1e-5)
    assert not torch.allclose(answers(first), answers(learner.model), atol=1e-3)


def test_audit_and_summary_say_so():
    learner = make()
    learn(learner, "a", 0)
    audit = learner.audit()
    assert audit.passed
    assert not any(row.layer in FREE for row in audit.rows)
    assert "train in full and are not protected: embed, encoder.layers.1.mix" in str(audit)
    assert "trained in full, not protected: embed, encoder.layers.1.mix" in learner.summary()
    plain = learn(ContinualLearner(make_net(), config()), "a", 0)
    assert plain.audit().notes == ()


@pytest.mark.parametrize("name", ["lora", "full-ft", "full-ft-all", "sd-lora", "oracle", "zero-shot"])
def test_other_methods_train_them_as_well(name, tmp_path):
    method = get_method(name)
    learner = method.learner(
        make_net(), method.make_config(config(free_modules=FREE).to_dict()), ledger=tmp_path / "ledger"
    )
    before = weights(learner.model)
    data = loader()
    with learner.task("a", data, loss_fn) as model:
        if name != "zero-shot":
            train(model, data)
    record = learner.records[0]
    moved = not torch.equal(learner.model.get_submodule("embed").weight, before["embed.weight"])
    assert moved == (name not in ("zero-shot", "oracle"))
    assert ("embed.weight" in record.full) == (name != "zero-shot")
    with learner.serving("a"):
        inside = weights(learner.model)
        if name != "zero-shot":
            assert not torch.equal(inside["embed.weight"], before["embed.weight"])
    again = method.learner.from_pretrained(tmp_path / "ledger", make_net())
    assert same(weights(again.model), weights(learner.model))
    with again.serving("a"):
        assert same(weights(again.model), inside)


def test_refusals_name_the_module():
    with pytest.raises(TargetError, match="q is named by target_modules and by free_modules: a linear is either"):
        ContinualLearner(make_net(), config(free_modules=["embed", "q"]))
    with pytest.raises(TargetError, match=r"free_modules: no module is named 'embedd'; did you mean 'embed'"):
        ContinualLearner(make_net(), config(free_modules=["embedd"]))
    with pytest.raises(TargetError, match=r"free_modules: encoder\.layers\.0\.norm is a LayerNorm, not an nn\.Linear"):
        ContinualLearner(make_net(), config(free_modules=["encoder.layers.0.norm"]))
    with pytest.raises(ConfigError, match="free_modules must be a string or a list of module names"):
        config(free_modules=[])
    tied = make_net()
    tied.embed.weight = tied.encoder.layers[0].q.weight
    with pytest.raises(TargetError, match="embed shares its weight with"):
        ContinualLearner(tied, config(free_modules=["embed"]))
    excluded = config(free_modules=r"encoder\.layers\.\d\.q", exclude_modules=["q"])
    assert ContinualLearner(make_net(), excluded).free.modules == ["encoder.layers.0.q", "encoder.layers.1.q"]


def test_quantised_module_cannot_be_free():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from tests.tuner.llama import config as llama_config
    from tests.tuner.llama import load

    with pytest.raises(TargetError, match=r"free_modules: model\.layers\.0\.mlp\.up_proj is quantised \(4bit\)"):
        ContinualLearner(load("4bit"), llama_config(target_modules=["q_proj"], free_modules=["up_proj"]))


def test_free_modules_that_diverge_are_not_merged():
    learner = make()
    before = weights(learner.model)
    learner.start_task("a", loader(), loss_fn)
    with torch.no_grad():
        learner.model.get_submodule("embed").weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"embed\.weight holds NaN or infinity"):
        learner.finish_task()
    assert same(weights(learner.model), before)
