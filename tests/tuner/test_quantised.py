"""Quantised bases: read one layer at a time, never merged; what is refused; and which methods work on them."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import TargetError
from keeplora.math import weight_basis
from keeplora.methods import get_method
from keeplora.tuner import adapter_store
from keeplora.tuner.passes import collect_features, collect_gradients
from keeplora.tuner.persistence import merge_into
from keeplora.tuner.quantised import dequantised, keep_layout
from tests.tuner.blocks import hooks, same
from tests.tuner.llama import (
    KINDS,
    LAYERS,
    SUFFIXES,
    batches,
    close,
    config,
    learn,
    load,
    logits,
    past,
    plain_twin,
    token_losses,
    train,
)

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_weight_is_what_the_layer_multiplies_by(kind):
    model = load(kind)
    keep_layout(model)
    for name in (LAYERS[0], LAYERS[5], LAYERS[6]):
        module = model.get_submodule(name)
        W = dequantised(module)
        assert W.shape == (module.out_features, module.in_features)
        assert W.dtype == torch.float32
        if kind == "8bit":
            from bitsandbytes.functional import int8_vectorwise_dequant

            assert torch.allclose(W, int8_vectorwise_dequant(module.weight.data, module.weight.SCB).float(), rtol=1e-5)
        assert close(W, load().get_submodule(name).weight.detach(), 0.01 if kind == "8bit" else 0.2)
        x = torch.randn(5, module.in_features)
        # 8-bit layers quantise their input as well, which costs about half a percent.
        assert close(module.train()(x).detach(), x @ W.T, 0.01 if kind == "8bit" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_start_basis_is_that_of_the_dequantised_weight_one_layer_at_a_time(kind, monkeypatch):
    alive: list[weakref.ref] = []
    most = []

    def counted(module):
        most.append(sum(r() is not None for r in alive))
        W = dequantised(module)
        alive.append(weakref.ref(W))
        return W

    monkeypatch.setattr(adapter_store, "dequantised", counted)
    model = load(kind)
    learner = ContinualLearner(model, config())
    U = learner.U
    assert len(most) == len(LAYERS)
    assert max(most) <= 1, "weights of earlier layers were still held"
    monkeypatch.undo()
    for name in LAYERS:
        assert torch.equal(U[name], weight_basis(dequantised(model.get_submodule(name)), 0.3))
        assert U[name].shape[1] > 0


@pytest.mark.parametrize(("kind", "tolerance"), [("8bit", 0.05), ("4bit", 1e-4), ("4bit-nested", 1e-4)])
def test_statistics_are_those_of_the_model_with_these_weights(kind, tolerance):
    model = load(kind)
    learner, twin = ContinualLearner(model, config()), None
    twin = ContinualLearner(plain_twin(model), config())
    G, C = [], []
    for one in (learner, twin):
        G.append(collect_gradients(one.model, one.targets, one.store, batches(), token_losses))
        C.append(collect_features(one.model, one.targets, one.store, batches(), token_losses))
    for name in LAYERS:
        assert close(G[0][name], G[1][name], tolerance), name
        assert close(C[0].C(name), C[1].C(name), tolerance), name
        assert G[0][name].dtype == C[0].C(name).dtype == torch.float64


def test_base_hash_tells_bases_apart_and_outlives_a_forward_pass():
    found = {}
    for kind in (None, *KINDS):
        model = load(kind)
        learner = ContinualLearner(model, config())
        found[kind] = learner.store.base_hash()
        logits(model)
        assert learner.store.base_hash() == found[kind]
        assert ContinualLearner(load(kind), config()).store.base_hash() == found[kind]
    assert len(set(found.values())) == 4
    changed = load("8bit")
    changed.get_submodule(LAYERS[3]).weight.SCB[0] *= 2
    assert ContinualLearner(changed, config()).store.base_hash() != found["8bit"]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_merge_goes_to_the_unquantised_base(kind):
    model = load(kind)
    learner = ContinualLearner(model, config())
    learn(learner, "a", 0)
    learn(learner, "b", 1)
    twin = plain_twin(model)
    start = logits(twin)
    assert merge_into(learner, twin) is twin
    assert close(logits(twin), logits(model), 0.05 if kind == "8bit" else 1e-4)
    assert not close(start, logits(model), 0.05), "the tasks changed nothing"
    fresh = merge_into(learner.records, load())
    for name in LAYERS:
        delta = learner.records[0].factors[name].delta + learner.records[1].factors[name].delta
        assert torch.equal(fresh.get_submodule(name).weight, load().get_submodule(name).weight + delta)
    low = merge_into(learner, load(dtype=torch.bfloat16)).get_submodule(LAYERS[0]).weight
    assert low.dtype == torch.bfloat16
    with pytest.raises(TargetError, match="is quantised in the model to merge into; load the base unquantised"):
        merge_into(learner, load(kind))
    with pytest.raises(TargetError, match=r"the model to merge into has no model\.layers\.0\.self_attn\.q_proj"):
        merge_into(learner, nn.Sequential(nn.Linear(2, 2)))
    wrong = load()
    wrong.get_submodule(LAYERS[1].rpartition(".")[0]).k_proj = nn.Linear(64, 16)
    before = wrong.get_submodule(LAYERS[0]).weight.clone()
    with pytest.raises(TargetError, match=r"k_proj has shape \(16, 64\) in the model to merge into, but \(32, 64\)"):
        merge_into(learner, wrong)
    assert torch.equal(wrong.get_submodule(LAYERS[0]).weight, before)


def test_whole_updates_are_refused_before_anything_moves():
    model = load("8bit")
    learner = learn(ContinualLearner(model, config()), "a", 0)
    before = past(model)
    whole = {LAYERS[0]: learner.records[0].factors[LAYERS[0]], LAYERS[1]: torch.zeros(32, 64)}
    for action in (learner.store.add, learner.store.restore):
        with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.k_proj is quantised"):
            action(whole)
    assert same(past(model), before)
    assert all(len(updates) == 1 for updates in learner.store.updates.values())


@pytest.mark.parametrize("name", ["full-ft", "full-ft-all", "l2", "ewc", "wise-ft", "nusa-cl"])
def test_methods_of_whole_weights_are_refused(name):
    method = get_method(name)
    model = load("4bit")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(TargetError, match="is quantised, but this method reads or trains whole weights"):
        learn(method.learner(model, method.make_config(config().to_dict())), "a", 0)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert hooks(model) == []


@pytest.mark.parametrize(
    "name", ["lora", "o-lora", "inflora", "keeplora", "sd-lora", "zero-shot", "oracle", "moelora", "reglora"]
)
def test_methods_of_low_rank_work(name, tmp_path):
    method = get_method(name)
    values = {**config(r=4).to_dict(), "options": {"tasks": 2} if name == "inflora" else {}}
    learner = method.learner(load("4bit"), method.make_config(values), ledger=tmp_path / "ledger")
    for i, task in enumerate("ab"):
        data = batches(i)
        with learner.task(task, data, token_losses) as model:
            if name != "zero-shot":
                train(model, data)
    again = method.learner.from_pretrained(tmp_path / "ledger", load("4bit"))
    assert torch.equal(logits(again.model), logits(learner.model))
    base = load("4bit")
    keep_layout(base)
    untouched = name in ("zero-shot", "oracle", "moelora")  # the last two answer inside `serving` alone
    assert torch.equal(logits(learner.model), logits(base)) == untouched
    for task in (*"ab", None):
        with learner.serving(task), again.serving(task):
            assert torch.equal(logits(again.model), logits(learner.model))
    with learner.serving("a"):
        assert torch.equal(logits(learner.model), logits(base)) == (name == "zero-shot")


def test_evaluation_does_not_spoil_the_gradient():
    """bitsandbytes repacks 4-bit weights in a forward pass without gradients, and the repacked product has none."""
    model = load("4bit")
    learner = ContinualLearner(model, config())
    first = collect_gradients(model, learner.targets, learner.store, batches(), token_losses)
    logits(model)
    second = collect_gradients(model, learner.targets, learner.store, batches(), token_losses)
    assert all(torch.equal(first[name], second[name]) for name in LAYERS)


def test_repacked_weights_are_refused():
    model = load("4bit")
    model.get_submodule(LAYERS[4]).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TargetError, match=r"down_proj|gate_proj|up_proj.*was repacked by bitsandbytes"):
        ContinualLearner(model, config(target_modules=SUFFIXES[:4]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is in the CPU's kernels")
def test_widths_that_bitsandbytes_misreads_on_the_cpu_are_told():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(96, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    with pytest.warns(UserWarning, match=r"^0: bitsandbytes reads a 4-bit weight wrongly on the CPU"):
        keep_layout(nn.Sequential(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_layout(load("4bit"))


def test_other_quantisations_are_refused_by_name():
    class Foreign(torch.Tensor):
        __module__ = "torchao.dtypes"

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Foreign), requires_grad=False)
    with pytest.raises(TargetError, match=r"^0 is a Linear whose weight is quantised .*quantise with bitsandbytes"):
        ContinualLearner(model, config(target_modules=["0"]))


def test_a_model_that_sees_learns_on_a_quantised_base(tmp_path):
    """Language model and projector of a tiny LLaVA, whose vision tower is quantised as well; the projector can be free."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from tests.models.tiny_generative import tiny

    folder = tiny("llava", tmp_path / "m")
    skip = ["lm_head", "model.multi_modal_projector"]  # whole paths: a name in the middle of one is not taken

    def base(**kwargs) -> nn.Module:
        return AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True, **kwargs), device_map={"": "cpu"},
            dtype=torch.float32,
        ).eval()  # fmt: skip

    model = base(llm_int8_skip_modules=skip)
    vision = model.config.vision_config
    places = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 40, (2, 8), generator=generator)
    ids = torch.cat([torch.full((2, places), model.config.image_token_id), words], dim=1)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids > 40, -100),
        "pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator),
    }  # fmt: skip

    def losses(m: nn.Module, b) -> torch.Tensor:
        out = m(**{k: v for k, v in b.items() if k != "labels"}, use_cache=False).logits[:, :-1].float()
        all_losses = nn.functional.cross_entropy(out.transpose(1, 2), b["labels"][:, 1:], reduction="none")
        return all_losses[b["labels"][:, 1:] != -100]

    settings = config(target_modules=r".*language_model.*_proj", free_modules=["linear_1", "linear_2"])
    learner = ContinualLearner(model, settings, ledger=tmp_path / "ledger")
    before = float(losses(model, batch).detach().mean())
    for name in "ab":
        with learner.task(name, [batch], losses) as peft_model:
            optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
            for _ in range(5):
                optimizer.zero_grad()
                losses(peft_model, batch).mean().backward()
                optimizer.step()
    after = losses(model, batch).detach()
    assert float(after.mean()) < 0.8 * before
    assert {k.rpartition(".")[0] for k in learner.records[1].full} == {
        f"model.multi_modal_projector.linear_{i}" for i in (1, 2)
    }
    assert learner.audit().passed
    again = ContinualLearner.from_pretrained(tmp_path / "ledger", base(llm_int8_skip_modules=skip))
    assert torch.equal(losses(again.model, batch), after)
    with pytest.raises(TargetError, match=r"linear_1 is quantised \(8bit\) and cannot train in full"):
        ContinualLearner(base(), settings)
