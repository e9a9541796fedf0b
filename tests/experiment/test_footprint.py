"""The arithmetic of `--dry-run`: hand-worked toys, LLaVA-1.5-7B's sizes, and what autograd and bitsandbytes really keep."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.experiment import footprint as f
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.footprint import Linear, ModelShape, Settings, Tower

# Two blocks of width 4 with an MLP of 6 (down: 6 → 4), two heads of 2, one key/value head; a vision tower of one block.
LANGUAGE = Tower(
    blocks=2, hidden=4, intermediate=6, heads=2, kv_heads=1, head_dim=2, linear=2 * (2 * 16 + 2 * 8 + 72), tokens=10
)
VISION = Tower(blocks=1, hidden=2, intermediate=4, heads=1, kv_heads=1, head_dim=2, linear=32, tokens=5)
TOY = ModelShape(
    parameters=1000, language=LANGUAGE, vision=VISION, projector=8, image_tokens=4, vocabulary=7, quantised=240, quantised_rows=48
)  # fmt: skip
# One block's linears: q 4→4, k and v 4→2 (sharing q's input), o 4→4, gate and up 4→6 (sharing), down 6→4.
BLOCK = [
    Linear(4, 4, 3, 10), Linear(4, 2, 3, 10, shared=True), Linear(4, 2, 3, 10, shared=True), Linear(4, 4, 3, 10),
    Linear(4, 6, 3, 10), Linear(4, 6, 3, 10, shared=True), Linear(6, 4, 3, 10),
]  # fmt: skip
TARGETS = [*BLOCK, *BLOCK]
RANKS = 3 + 2 + 2 + 3 + 3 + 3 + 3  # k and v are 2 wide
TRAINED, FROZEN = 2 * (3 * (4 + 4 + 6 + 6 + 4) + 2 * (2 + 2)), 2 * (3 * (4 + 4 + 4 + 4 + 6) + 2 * (4 + 4))
SETTINGS = Settings(
    trained=TRAINED, frozen=FROZEN, protects=True, gradients=False, checkpointing=False, micro_batch=2, eval_batch=3,
    epochs=(1, 2), samples=(10, 20), gradient_samples=(5, 5), feature_samples=(10, 20), tests=(3, 4), probes=2,
)  # fmt: skip
SKETCHED = replace(SETTINGS, sketch=True, oversampling=1)
ASSUME = Assumptions(tokens=10, answer_tokens=2, k=0.5)


def test_weights_by_hand():
    assert f.base_bytes(TOY, "fp32") == 4000
    assert f.base_bytes(TOY, "bf16") == 2000
    assert f.base_bytes(TOY, "8bit") == 240 + 4 * 48 + 2 * 760
    assert f.base_bytes(TOY, "4bit") == 120 + 4 * 4 + 2 * 760  # 240 entries: four blocks of 64


def test_factors_and_statistics_by_hand():
    assert f.factor_bytes(TARGETS) == 4 * (TRAINED + FROZEN) == 4 * (160 + 164)
    assert f.subspace_bytes(TARGETS, 1.0) == 0  # by its complement
    assert f.subspace_bytes(TARGETS, 0.5) == 2 * 2 * (6 * 16 + 36)
    assert f.gradient_bytes(TARGETS, SETTINGS) == 8 * 2 * (16 + 8 + 8 + 16 + 24 + 24 + 24) + 4 * 24
    # Of 4 rows Ψ G has 4 (r 3, p 1), of 6 too, and of k's and v's 2 both; Ψ for heights of 4, 2 and 6.
    rows = 8 * 2 * (16 + 8 + 8 + 16 + 16 + 16 + 24) + 4 * 24
    assert f.gradient_bytes(TARGETS, SKETCHED) == rows + 4 * (4 * 4 + 2 * 2 + 6 * 4)
    assert f.covariance_bytes(TARGETS) == 8 * 2 * (16 + 16 + 16 + 36) + 4 * 36


def test_activations_by_hand():
    # fp32: norms 2·4·4, q and output 4·2·4, k and v 4·2·2, log-sums 4·2, MLP 3·4·6, A x 4·19
    assert f.block_token_bytes(LANGUAGE, "fp32", RANKS) == 32 + 32 + 16 + 8 + 72 + 76 == 236
    assert f.block_token_bytes(LANGUAGE, "bf16", RANKS) == 32 + 16 + 8 + 8 + 36 + 76 == 176
    options: dict[str, Any] = {"samples": 2, "answer_tokens": 2, "ranks": RANKS}
    head = 2 * 2 * (2 + 8) * 7
    assert f.activation_bytes(TOY, "bf16", checkpointing=False, **options) == 2 * 10 * (2 * 176 + 16) + head
    assert f.activation_bytes(TOY, "bf16", checkpointing=True, **options) == 2 * 10 * (2 * 2 * 4 + 176 + 16) + head
    statistics = f.activation_bytes(TOY, "bf16", checkpointing=False, statistics=True, **options)
    assert statistics == 2 * 10 * (2 * (176 - 76 + 2 * (8 + 6)) + 16) + head
    assert f.cache_bytes(TOY, "bf16", 3, 2) == 2 * 2 * 2 * 1 * 2 * 12 * 3


def test_memory_adds_up():
    fp32, four = (f.memory(TOY, TARGETS, SETTINGS, ASSUME, base) for base in ("fp32", "4bit"))
    entries = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 24)
    assert (fp32.factors, fp32.optimiser) == (4 * 324, 12 * 160)
    assert (fp32.past, fp32.copies) == (0, 4 * entries)
    assert (four.past, four.copies) == (4 * 324, 0)  # never merged: no copy, an adapter per past task
    # The fullest moment of the toy is training: 4·324 + 12·160 + activations.
    activations = 2 * 10 * (2 * 236 + 16) + 2 * 2 * 12 * 7
    assert fp32.activations == activations
    assert fp32.device == 4000 + 4 * 324 + 12 * 160 + activations
    assert four.device - four.base - four.past == 4 * 324 + 12 * 160 + four.activations
    U = f.subspace_bytes(TARGETS, 0.5)
    assert fp32.host == fp32.copies + 2 * U + 3 * 4 * 324 + 8 * 36
    unprotected = f.memory(TOY, TARGETS, replace(SETTINGS, protects=False), ASSUME, "fp32")
    assert (unprotected.gradients, unprotected.covariances) == (0, 0)
    assert unprotected.host == fp32.host - 2 * U - 8 * 36
    assert f.memory(TOY, TARGETS, SKETCHED, ASSUME, "fp32").gradients == f.gradient_bytes(TARGETS, SKETCHED)
    assert f.memory(TOY, TARGETS, replace(SETTINGS, gradients=True), ASSUME, "fp32").covariances == 0
    every = Assumptions(tokens=10, answer_tokens=2, k=1.0)
    assert f.memory(TOY, TARGETS, SETTINGS, every, "fp32").host == fp32.host - 2 * U


def test_operations_and_seconds_by_hand():
    attention = 4 * 2 * 2 * 10**2 * 2
    forward = 2 * 240 * 10 + attention + 2 * 32 * 5 + 4 * 1 * 2 * 5**2 + 2 * 8 * 4
    assert f.forward_flops(TOY) == forward
    assert f.backward_flops(TOY) == 2 * 240 * 10 + 2 * attention
    assert f.adapter_flops([Linear(4, 6, 3, 10)]) == 10 * 3 * (4 * 10 + 2 * 6)
    assert f.vectors_flops(Linear(4, 6, 3, 10)) == 2 * 6 * 16 + 9 * 64  # out 6, in 4
    assert f.vectors_flops(Linear(6, 4, 3, 10)) == 4 * 6 * 16 + 9 * 64
    assume = replace(
        ASSUME, tflops=1e-12, fp32_tflops=1e-12, host_gflops=1e-9, bandwidth=1e-9
    )  # one operation per second
    out = f.seconds(TOY, TARGETS, SETTINGS, assume, "bf16")
    backward, head = f.backward_flops(TOY), 4 * 4 * 7 * 2
    step = forward + backward + head + f.adapter_flops(TARGETS)
    assert out["training"] == pytest.approx((10 * 1 + 20 * 2) * step)
    G = forward + backward + head + sum(2 * t.n_in * t.n_out * 10 for t in TARGETS)
    C = forward + 2 * 10 * 2 * (16 + 16 + 16 + 36)
    assert out["statistics"] == pytest.approx(10 * G + 30 * C)
    vectors = sum(f.vectors_flops(t) for t in TARGETS)
    assert out["decompositions"] == pytest.approx(vectors + 2 * (vectors + 9 * 2 * (6 * 64 + 216)))
    sketched = f.seconds(TOY, TARGETS, SKETCHED, assume, "bf16")
    products = 2 * 10 * 2 * (4 * (4 + 4) + 2 * 2 * (4 + 2) + 4 * (4 + 4) + 2 * 4 * (4 + 6) + 4 * (6 + 4))
    gradient = sum(2 * t.n_in * t.n_out * 10 for t in TARGETS)
    assert out["statistics"] - sketched["statistics"] == pytest.approx(10 * (gradient - products))
    lower = 2 * 2 * (f.vectors_flops(Linear(4, 6, 3, 10)) - f.vectors_flops(Linear(4, 4, 3, 10)))
    assert out["decompositions"] - sketched["decompositions"] == pytest.approx(2 * lower)
    # (2 + 1) evaluations of 3 + 4 + 2 questions in 1 + 2 + 1 batches, two tokens each, 2000 bytes of weights per token
    assert out["evaluation"] == pytest.approx(3 * 9 * forward + 3 * 4 * 2 * 2000)
    slower = f.seconds(TOY, TARGETS, replace(SETTINGS, checkpointing=True), assume, "bf16")
    assert slower["training"] - out["training"] == pytest.approx(50 * 2 * 240 * 10)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("tokns=3", "there is no 'tokns'; did you mean 'tokens'"),
        ("tokens=0", "tokens must be a whole number above 0"),
        ("tokens=x", "tokens must be a whole number above 0"),
        ("k=1.5", "k must be a share up to 1"),
        ("tflops=nan", "tflops must be a number above 0"),
    ],
)
def test_bad_assumptions_are_named(pair, message):
    with pytest.raises(ConfigError, match=message):
        Assumptions.parse([pair])
    assert Assumptions.parse(["tokens=5", "k=1"]) == replace(Assumptions(), tokens=5, k=1.0)


# -- against the real thing --------------------------------------------------------------------------------------------


def small_llava(kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=2,
        vocab_size=100,
    )  # fmt: skip
    eye = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = AutoModelForImageTextToText.from_config(LlavaConfig(text_config=text, vision_config=eye), dtype=dtype)
    model.set_attn_implementation("sdpa")
    return model.eval()


@pytest.mark.parametrize(
    ("base", "dtype", "kv_heads"), [("fp32", torch.float32, 4), ("fp32", torch.float32, 2), ("bf16", torch.bfloat16, 4)]
)
def test_activations_are_what_autograd_keeps(base, dtype, kv_heads):
    from keeplora.tuner import KeepLoraConfig
    from keeplora.tuner.adapter import TaskAdapter, random_factor
    from keeplora.tuner.targets import resolve_targets

    model = small_llava(kv_heads, dtype)
    targets = resolve_targets(model, KeepLoraConfig(r=4, target_modules=r"model\.language_model\..*_proj"))
    TaskAdapter(model, targets, {t.name: random_factor(t, torch.Generator().manual_seed(0)) for t in targets})
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return x

    x = torch.randn(2, 64, 128, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.model.language_model(inputs_embeds=x, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    tower = Tower(2, 128, 344, 4, kv_heads, 32, 0, 64)
    expected = 2 * 64 * (2 * f.block_token_bytes(tower, base, 7 * 4) + 4 * 128)
    assert found == pytest.approx(expected, rel=0.03)  # the rotary tables are the rest


def test_quantised_weights_are_what_bitsandbytes_stores():
    bnb = pytest.importorskip("bitsandbytes")
    from keeplora.tuner.quantised import stored_tensors

    four = bnb.nn.Linear4bit(
        128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False
    )
    eight = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    shape = replace(TOY, parameters=128 * 64, quantised=128 * 64, quantised_rows=64)
    for layer, base, table in ((four, "4bit", 16 * 4), (eight, "8bit", 0)):  # the 16 codes are one table for all
        layer.load_state_dict({"weight": torch.randn(64, 128)}, strict=False)
        held = stored_tensors(layer.to("cpu"))
        assert sum(t.numel() * t.element_size() for t in held.values()) - table == f.base_bytes(shape, base)


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory):
    from transformers import LlavaConfig

    folder = tmp_path_factory.mktemp("seven")
    LlavaConfig(dtype="float16").save_pretrained(folder / "llava")
    return folder


def config_of(folder: Any, **more: Any) -> Any:
    from keeplora.experiment.config import load_config
    from keeplora.methods import method_names

    task = {"name": "a", "source": "llava", "train": "a.json", "test": "b.json", "images": ".", "scorer": "contains"}
    values = {
        "model": "llava",
        "base_dir": str(folder),
        "tasks": [task],
        "method": "keeplora++",
        "tuner": {"r": 64},
        **more,
    }
    return load_config(values, known_methods=method_names())


def test_the_defaults_of_llavas_config_are_llava_7b(llava_7b):
    from keeplora.experiment.plan import make_footprint, needs_footprint

    config = config_of(llava_7b)
    assert needs_footprint(config)
    plan = make_footprint(config, Assumptions())
    t, v = plan.shape.language, plan.shape.vision
    assert (t.blocks, t.hidden, t.intermediate, t.heads, t.kv_heads, t.head_dim) == (32, 4096, 11008, 32, 32, 128)
    assert (v.blocks, v.hidden, v.tokens) == (24, 1024, 24 * 24 + 1)
    assert plan.shape.parameters == 7_062_902_784
    assert plan.shape.quantised == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan.shape.image_tokens == 576
    assert plan.base == "bf16"  # stored in half precision
    assert len(plan.linears) == 7 * 32 + 2
    assert sum(not linear.shared for linear in plan.linears) == 4 * 32 + 2
    assert plan.settings.trained == 64 * (32 * (4 * 4096 + 2 * 11008 + 4096) + 2 * 4096)
    assert plan.ledger_bytes == 4 * (plan.settings.trained + plan.settings.frozen)
    assert plan.missing is not None
    assert "a.json" in plan.missing
    assert plan.tasks[0] == {
        "name": "a", "scorer": "contains", "train": 10_000, "validation": 0, "test": 1_000, "epochs": 3, "steps": 3 * 313,
    }  # fmt: skip


def test_methods_differ_in_what_they_hold(llava_7b):
    from keeplora.experiment.plan import make_footprint

    plans = {
        name: make_footprint(config_of(llava_7b, method=name), Assumptions())
        for name in ("keeplora++", "lora", "zero-shot")
    }
    ours, lora, none = plans.values()
    assert lora.settings.trained == ours.settings.trained + ours.settings.frozen
    assert lora.memory["bf16"].gradients == 0
    assert ours.settings.sketch  # 52 GB of G are over the limit of `residual_gradient: auto`
    assert 2e9 < ours.memory["bf16"].gradients < 52e9 / 20
    exact = make_footprint(config_of(llava_7b, tuner={"r": 64, "residual_gradient": "exact"}), Assumptions())
    assert exact.memory["bf16"].gradients > 50e9
    assert exact.seconds["bf16"]["decompositions"] > ours.seconds["bf16"]["decompositions"]
    assert none.settings.trained == 0
    assert none.seconds["bf16"]["training"] == 0


def test_a_free_projector_is_counted(llava_7b):
    from keeplora.experiment.plan import make_footprint

    free = make_footprint(config_of(llava_7b, tuner={"r": 64, "parts": {"projector": "free"}}), Assumptions())
    own = 1024 * 4096 + 4096**2 + 2 * 4096  # two weights and two biases
    assert len(free.linears) == 7 * 32
    assert (free.settings.trained, free.settings.free) == (64 * 32 * 42496 + own, own)
    frozen = replace(free.settings, trained=free.settings.trained - own, free=0)
    without = f.memory(free.shape, free.linears, frozen, free.assume, "bf16")
    memory = free.memory["bf16"]
    assert memory.factors == without.factors
    assert memory.optimiser - without.optimiser == 12 * own
    assert memory.copies - without.copies == 2 * own
    assert memory.host - without.host == 2 * own + 4 * own  # its copy, and one task's change
    assert free.ledger_bytes == f.factor_bytes(free.linears) + 4 * own


@pytest.mark.parametrize("kind", ["qwen2-5-vl", "idefics3", "gemma3", "llava-onevision", "internvl"])
def test_other_classes_are_planned_from_their_config_alone(kind, tmp_path):
    from keeplora.experiment.plan import make_footprint, needs_footprint
    from tests.models.tiny_generative import BLOCKS, HIDDEN, tiny

    folder = tiny(kind, tmp_path / "whole")
    (tmp_path / "llava").mkdir()
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "llava/config.json").write_text(json.dumps(values))
    assert not needs_footprint(config_of(tmp_path, model="whole"))
    config = config_of(tmp_path)
    assert needs_footprint(config)
    plan = make_footprint(config, Assumptions(tokens=50))
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert plan.shape.parameters == sum(p.numel() for p in model.parameters())
    assert (plan.shape.language.blocks, plan.shape.language.hidden) == (BLOCKS, HIDDEN)
    assert plan.shape.vision.hidden > 0
    assert {m.tower for m in plan.targets} >= {plan.targets[0].tower}
    assert all(
        value > 0 for value in (plan.memory["bf16"].device, plan.memory["bf16"].host, *plan.seconds["bf16"].values())
    )
