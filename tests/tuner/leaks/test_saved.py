"""Exports on disk: told apart by what they hold, audited in their own precision, refused in a sentence where they cannot be."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.tuner.leaks.rows import judge
from keeplora.tuner.leaks.saved import SavedExport
from keeplora.tuner.persistence import concatenated, write_peft_adapter
from tests.tuner.blocks import make_net
from tests.tuner.leaks.learned import LAYER, three_tasks


@pytest.fixture(scope="module")
def learner():
    return three_tasks(keep_covariance=True)


def saved(audit):
    return [r for r in audit.exports if r.export == "saved"]


def adapter(learner, path, *indices):
    return write_peft_adapter(path, concatenated([learner.records[i] for i in indices]), "net")


def rewrite(path, change):
    """Apply ``change`` to the tensors of a safetensors file."""
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def checkpoint(learner, path, dtype=None, upto=3):
    """A merged model of the first tasks, as a Hugging Face folder's one file."""
    net = make_net()
    one = ContinualLearner(net, learner.config)
    one.store.restore({t.name: tuple(r.factors[t.name] for r in learner.records[:upto]) for t in learner.targets})
    path.mkdir()
    tensors = {name: value.to(dtype or value.dtype).contiguous() for name, value in net.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    return path


def test_the_adapter_of_all_tasks_does_not_leak(learner, tmp_path):
    audit = learner.audit("full", adapter(learner, tmp_path / "out", 0, 1, 2))
    assert f"{tmp_path / 'out'}: an adapter in fp32, holding all tasks." in audit.notes
    assert audit.passed
    assert {r.export for r in audit.exports} == {"running", "saved"}
    assert {(r.layer, r.basis) for r in saved(audit)} == {
        (t.name, b) for t in learner.targets for b in (None, "a", "b")
    }
    expected = {(r.layer, r.basis): r for r in learner.audit("full").exports if r.export == "adapter"}
    for row in saved(audit):
        assert row.leak is None or row.leak <= 1e-5
        assert row.worst == pytest.approx(expected[row.layer, row.basis].worst, abs=1e-6)
        assert row.floor is None


@pytest.mark.parametrize(("held", "named"), [((0,), "a"), ((0, 1), "a, b"), ((2,), "c"), ((1,), "b"), ((0, 2), "a, c")])
def test_an_adapter_of_some_tasks_is_told_by_its_content(learner, tmp_path, held, named):
    audit = learner.audit("full", adapter(learner, tmp_path / "out", *held))
    assert f"{tmp_path / 'out'}: an adapter in fp32, holding {named}." in audit.notes
    assert audit.passed
    last = max(held)
    assert {r.basis for r in saved(audit)} == {
        (None, "a", "b")[i] for i in range(last + 1)
    }  # what came before its last


def test_rank_and_alpha_are_read_as_peft_reads_them(learner, tmp_path):
    """The same update, with a scaling that differs by layer: the pattern must be applied, or the content would not fit."""
    path = adapter(learner, tmp_path / "out", 0, 1, 2)
    config = json.loads((path / "adapter_config.json").read_text())
    rank = len(load_file(path / "adapter_model.safetensors")[f"base_model.model.{LAYER}.lora_A.weight"])
    config["alpha_pattern"][f"^{LAYER}"] = rank * 2
    config["rank_pattern"][f"^{LAYER}"] = rank
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert "holding all tasks" not in " ".join(learner.audit("quick", path).notes)
    key = f"base_model.model.{LAYER}.lora_B.weight"
    rewrite(path / "adapter_model.safetensors", lambda tensors: {**tensors, key: tensors[key] / 2})
    assert "holding all tasks" in " ".join(learner.audit("quick", path).notes)


def test_an_adapter_in_bf16_leaks_what_rounding_its_factors_does(learner, tmp_path):
    path = adapter(learner, tmp_path / "out", 0, 1, 2)
    rewrite(path / "adapter_model.safetensors", lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    audit = learner.audit("full", path)
    assert "an adapter in bf16, holding all tasks" in " ".join(audit.notes)
    leaks = [r for r in saved(audit) if r.leak is not None]
    assert {judge(r.leak, r.floor) for r in leaks} == {"floor"}
    assert all(r.leak == pytest.approx(r.floor, rel=1e-6) for r in leaks)
    assert min(r.leak for r in leaks) > 1e-5
    assert audit.passed, "more is not to be had in bf16"


def test_an_adapter_that_was_changed_is_not_passed(learner, tmp_path):
    path = adapter(learner, tmp_path / "out", 0, 1, 2)
    key = f"base_model.model.{LAYER}.lora_A.weight"
    turn = 0.3 * learner.start_bases()[LAYER][:, 0]
    rewrite(path / "adapter_model.safetensors", lambda tensors: {**tensors, key: tensors[key] + turn})
    audit = learner.audit("quick", path)
    assert not audit.passed
    assert audit.factor_leak_max <= 1e-5, "the ledger's own factors are as they were"
    assert {r.layer for r in saved(audit) if judge(r.leak, r.floor) == "above"} == {LAYER}
    assert f"{LAYER} is not what the tasks in force add up to" in " ".join(audit.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_checkpoint_is_the_export_of_its_dtype(learner, tmp_path, dtype):
    audit = learner.audit("full", checkpoint(learner, tmp_path / "out", dtype))
    assert "a merged checkpoint in" in " ".join(audit.notes)
    assert "holding all tasks" in " ".join(audit.notes)
    assert audit.passed
    name = {torch.float32: "running", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    expected = {(r.layer, r.basis): r for r in learner.audit("full").exports if r.export == name}
    assert len(saved(audit)) == len(expected)
    for row in saved(audit):
        same = expected[row.layer, row.basis]
        assert (row.leak, row.floor, row.random, row.worst) == pytest.approx(
            (same.leak, same.floor, same.random, same.worst), rel=1e-9
        )


def test_a_checkpoint_of_the_first_tasks(learner, tmp_path):
    audit = learner.audit("full", checkpoint(learner, tmp_path / "out", upto=2))
    assert "holding a, b" in " ".join(audit.notes)
    assert {r.basis for r in saved(audit)} == {None, "a"}


def test_a_checkpoint_merged_task_by_task_in_bf16_is_found_out(learner, tmp_path):
    """The merge that METHOD warns of: each task rounds the weights anew."""
    path = checkpoint(learner, tmp_path / "out", torch.bfloat16)

    def successive(tensors):
        for t in learner.targets:
            W = learner.store.W0[t.name].bfloat16()
            for record in learner.records:
                for _ in range(4):  # four epochs' worth of merges
                    W = (W.float() + record.factors[t.name].delta / 4).bfloat16()
            tensors[f"{t.name}.weight"] = W
        return tensors

    rewrite(path / "model.safetensors", successive)
    audit = learner.audit("quick", path)
    assert max(r.leak / r.floor for r in saved(audit)) > 1.2
    once = learner.audit("quick", checkpoint(learner, tmp_path / "once", torch.bfloat16))
    assert max(r.leak / r.floor for r in saved(once)) < 1.1


def test_other_weights_under_the_same_names_leak(learner, tmp_path):
    path = checkpoint(learner, tmp_path / "out")
    rewrite(path / "model.safetensors", lambda tensors: {k: v + 0.01 * torch.randn_like(v) for k, v in tensors.items()})
    audit = learner.audit("quick", path)
    assert not audit.passed
    assert "does not hold the sum of any tasks of the ledger in fp32" in " ".join(audit.notes)


def test_renamed_and_sharded_checkpoints_are_read(learner, tmp_path):
    """As transformers writes some models: other parts before the blocks' list; and in several files."""
    path = checkpoint(learner, tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    renamed = {key.replace("encoder.layers.", "net.tower.layers."): value for key, value in tensors.items()}
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(renamed))}
    for file in set(files.values()):
        save_file({key: renamed[key] for key, at in files.items() if at == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    audit = learner.audit("full", path)
    assert audit.passed
    assert "holding all tasks" in " ".join(audit.notes)


def test_a_tower_that_looks_alike_is_told_by_the_rest_of_its_name(tmp_path):
    from keeplora.tuner.leaks.saved import _nearest

    candidates = [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
    ]
    language = ["model", "language_model", "layers", "0", "self_attn", "q_proj", "weight"]
    vision = ["model", "vision_tower", "vision_model", "encoder", "layers", "0", "self_attn", "q_proj", "weight"]
    assert _nearest(language, candidates) == candidates[:1]
    assert _nearest(vision, candidates) == candidates[1:2]
    assert len(_nearest(["model", "layers", "3", "self_attn", "q_proj", "weight"], candidates)) != 1


@pytest.mark.parametrize("kind", ["llava", "video-llava", "gemma3", "qwen3-vl"])
def test_what_transformers_renames_is_found_again(tmp_path, kind):
    """Every target's own weight, bit for bit, though all but one of these families are saved under other names."""
    from keeplora import KeepLoraConfig
    from keeplora.models import load_model
    from keeplora.tuner.targets import resolve_targets
    from tests.models.tiny_generative import tiny

    family = load_model(tiny(kind, tmp_path / "in"))
    out = family.save_pretrained(tmp_path / "out")
    linears = r".*\.(q_proj|k_proj|up_proj|fc1|qkv|linear_1)"
    targets = resolve_targets(family.model, KeepLoraConfig(r=2, target_modules=linears))
    saved = SavedExport(out, targets)
    assert len(targets) >= 6
    for t in targets:
        assert torch.equal(saved.weight(t), family.model.get_submodule(t.name).weight), t.name
    renamed = [t.name for t in targets if f"{t.name}.weight" not in load_file(out / "model.safetensors")]
    assert bool(renamed) == (kind != "qwen3-vl")


def refused(learner, path, sentence):
    with pytest.raises(KeepLoraError, match=sentence) as error:
        learner.audit("quick", path)
    assert "\n" not in str(error.value)


def test_what_is_no_export_is_refused_in_a_sentence(learner, tmp_path):
    refused(learner, tmp_path / "nowhere", "nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refused(learner, tmp_path / "empty", "holds no adapter_config.json and no model.safetensors$")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(learner, tmp_path / "empty", r"files of pickled tensors \(\.bin\) are never opened")


def test_damaged_exports_are_refused_in_a_sentence(learner, tmp_path):
    path = adapter(learner, tmp_path / "out", 0, 1, 2)
    config = json.loads((path / "adapter_config.json").read_text())

    def with_config(**changes):
        (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return path

    refused(learner, with_config(use_dora=True), "is an adapter of the type DoRA")
    refused(learner, with_config(peft_type="IA3"), "is an adapter of the type 'IA3'")
    refused(learner, with_config(r=None, rank_pattern={}), "r is None and lora_alpha")
    refused(learner, with_config(rank_pattern={"(": 3}), "rank_pattern is no mapping from patterns")
    refused(learner, with_config(rank_pattern=[1]), "rank_pattern is no mapping from patterns")
    with_config()
    (path / "adapter_config.json").write_text("[1, 2")
    refused(learner, path, "is not readable JSON")
    (path / "adapter_config.json").write_text("[1, 2]")
    refused(learner, path, "holds a list where an object is expected")
    with_config()
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    refused(learner, path, "is not a readable safetensors file")
    weights.unlink()
    refused(learner, path, "adapter_model.safetensors is missing")
    weights.write_bytes(whole)
    rewrite(weights, lambda tensors: {k.replace("encoder", "other"): v for k, v in tensors.items()})
    refused(learner, path, "adapts none of the layers that the run learned")
    weights.write_bytes(whole)
    rewrite(weights, lambda tensors: {k: v[:, :-1] if "lora_A" in k else v for k, v in tensors.items()})
    refused(learner, path, "which do not fit a layer of")


def test_damaged_checkpoints_are_refused_in_a_sentence(learner, tmp_path):
    path = checkpoint(learner, tmp_path / "out")
    whole = load_file(path / "model.safetensors")
    file = path / "model.safetensors"
    save_file({k: v for k, v in whole.items() if LAYER not in k}, file)
    refused(
        learner,
        path,
        re.escape(f"holds several weights that could be {LAYER}") + "|would share one weight|holds no weight",
    )
    save_file({**whole, f"{LAYER}.weight": torch.zeros(3, 3)}, file)
    refused(learner, path, r"has shape \(3, 3\), but encoder.layers.1.up has \(18, 12\)")
    save_file({"x": torch.zeros(1)}, file)
    refused(learner, path, "holds no weight that could be encoder.layers.0.q")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    refused(learner, path, "secret.safetensors is missing")
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    refused(learner, path, "names no files in 'weight_map'")


def test_no_file_outside_the_folder_is_opened(learner, tmp_path):
    path = checkpoint(learner, tmp_path / "out")
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../outside.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(learner, path, "outside.safetensors is missing: the export is not complete")


def test_a_merged_checkpoint_of_a_quantised_run_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from tests.tuner import llama

    learner = ContinualLearner(llama.load("4bit"), llama.config())
    llama.learn(learner, "a", 0)
    (tmp_path / "out").mkdir()
    shapes = {f"{t.name}.weight": torch.zeros(t.n_out, t.n_in) for t in learner.targets}
    save_file(shapes, tmp_path / "out" / "model.safetensors")
    refused(learner, tmp_path / "out", "the run learned on a quantised base")
    path = write_peft_adapter(tmp_path / "adapter", concatenated(learner.records), "tiny")
    assert learner.audit("full", path).passed
