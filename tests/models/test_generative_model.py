"""The model behind the samples: its losses, its answers, and what it leaves behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from keeplora.errors import KeepLoraError
from keeplora.models import load_model
from tests.models.test_generative import CASES, PICTURES, encoded, turns
from tests.models.tiny_generative import OWNS_VIDEO_PROCESSOR

# -- losses ------------------------------------------------------------------------------------------------------


def test_losses_are_transformers_own(kind, generative):
    family = generative(kind)
    batch = family.join(encoded(family))
    inputs = {key: value for key, value in batch.items() if key not in ("token_kinds", "labels")}
    with torch.no_grad():
        own = family.model(**inputs, labels=batch["labels"]).loss
        losses = family.token_losses(batch)
    assert losses.shape == (int((batch["labels"] != -100).sum()),)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.mean(), own, atol=1e-5)


def test_logits_are_computed_for_answers_alone(generative):
    family = generative("llava")
    seen = []
    hook = family.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    batch = family.join(encoded(family))
    losses = family.token_losses(batch)
    family.forward(batch)
    hook.remove()
    vocabulary = family.model.lm_head.out_features
    assert seen == [(1, len(losses), vocabulary), (1, 1, vocabulary)]
    assert not family.model.lm_head._forward_pre_hooks


def test_the_feature_pass_sees_what_training_sees(generative):
    family = generative("qwen2-5-vl")
    seen = []
    name = family.target_modules()[-1]
    hook = family.model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    batch = family.join(encoded(family))
    with torch.no_grad():
        assert family.forward(batch) is None
    family.token_losses(batch)
    hook.remove()
    assert torch.equal(*seen)
    (mask,) = family.masks(batch).values()
    assert seen[0].shape[:2] == mask.shape


def test_another_module_answers_for_this_one(generative):
    family = generative("llava")
    item = family.encode(*CASES["two"])
    teacher = copy.deepcopy(family.model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)
        own, other = family.token_losses(item), family.token_losses(item, teacher)
        assert not torch.allclose(own, other)
        assert torch.equal(family.around(teacher).token_losses(item), other)
        assert torch.equal(family.token_losses(item), own)


def test_an_adapter_acts_through_every_method(fresh):
    from peft import LoraConfig, get_peft_model

    family = fresh("qwen2-5-vl")
    item = family.encode(*CASES["two"])
    targets = family.default_target_modules
    with torch.no_grad():
        before = family.token_losses(item)
    adapted = get_peft_model(family.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        after = family.token_losses(item)
        assert not torch.allclose(before, after)
        assert torch.equal(family.token_losses(item, adapted), after)
        with adapted.disable_adapter():
            assert torch.allclose(family.token_losses(item), before)
    assert family.default_target_modules == targets
    with pytest.raises(KeepLoraError, match="an adapter is attached"):
        family.save_pretrained("anywhere")


def test_bfloat16(kind, fresh):
    family = fresh(kind, dtype="bf16")
    assert family.dtype == torch.bfloat16
    assert {p.dtype for p in family.model.parameters()} == {torch.bfloat16}
    batch = family.join(encoded(family))
    assert family._inputs(batch)["pixel_values"].dtype == torch.bfloat16  # not every class casts pictures itself
    losses = family.token_losses(batch)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    with torch.no_grad():
        exact = fresh(kind).token_losses(batch)
    assert torch.allclose(losses.detach(), exact, rtol=0.1, atol=0.5)
    assert len(family.generate(family.join(encoded(family, answers=False), side="left"), max_new_tokens=2)) == 3


def test_gradient_checkpointing(kind, fresh):
    family = fresh(kind)
    batch = family.join(encoded(family))
    weight = family.model.get_submodule(family.target_modules()[0]).weight
    passes = []
    family.model.get_submodule(family.target_modules()[0]).register_forward_hook(lambda *_: passes.append(1))

    def step():
        passes.clear()
        family.model.zero_grad()
        losses = family.token_losses(batch)
        losses.sum().backward()
        return losses.detach(), weight.grad.clone(), len(passes)

    losses, gradient, once = step()
    family.gradient_checkpointing(True)
    again, checked, twice = step()
    assert (once, twice) == (1, 2)  # computed again in the backward pass, in eval mode
    assert torch.equal(losses, again)
    assert torch.allclose(gradient, checked, atol=1e-6)
    assert not any(m.training for m in family.model.modules())
    family.gradient_checkpointing(False)
    assert step()[2] == 1


# -- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_one_by_one(kind, generative, generative_folder):
    family = generative(kind)
    items = encoded(family, answers=False)
    stock = AutoModelForImageTextToText.from_pretrained(generative_folder(kind)).eval()
    own = []
    for item in items:
        inputs = {k: v for k, v in item.items() if k not in ("labels", "token_kinds")}
        found = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
        own.append(family.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    answers = family.generate(family.join(items, side="left"), max_new_tokens=6)
    assert answers == own
    assert len(set(answers)) > 1 or kind == "gemma3"


def test_an_answer_ends_where_the_class_ends_it(kind, fresh):
    family = fresh(kind)
    prompts = family.join(encoded(family, answers=False), side="left")
    end = family.tokenizer.convert_tokens_to_ids(family.chat.end)
    longest = []
    head = family.model.lm_head
    head.register_forward_hook(lambda m, args, out: longest.append(1))
    # A head that answers nothing but the end token: what was learned must be what stops the answer.
    head.register_forward_hook(lambda m, args, out: torch.zeros_like(out).index_fill_(-1, torch.tensor([end]), 1.0))
    assert family.generate(prompts, max_new_tokens=9) == ["", "", ""]
    assert len(longest) == 1


def test_training_goes_on_after_answers(kind, fresh):
    family = fresh(kind)
    family.gradient_checkpointing(True)
    family.model.train()
    frozen = next(family.model.modules()).get_submodule(family.towers["vision"])
    frozen.eval()
    flags = [m.training for m in family.model.modules()]
    config = family.model.config.to_dict()
    settings = family.model.generation_config.to_dict()
    batch = family.join(encoded(family))
    prompts = family.join(encoded(family, answers=False), side="left")
    random = torch.random.get_rng_state()
    with torch.no_grad():
        before = family.token_losses(batch)
    first = family.generate(prompts, max_new_tokens=4)
    with family.evaluating():
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in family.model.modules())
        assert family.generate(prompts, max_new_tokens=4) == first
    assert [m.training for m in family.model.modules()] == flags
    assert family.model.config.to_dict() == config
    assert family.model.generation_config.to_dict() == settings
    assert torch.equal(torch.random.get_rng_state(), random)
    losses = family.token_losses(batch)
    assert torch.allclose(losses, before, atol=1e-6)
    losses.sum().backward()
    family.gradient_checkpointing(False)
    family.model.eval()
    assert family.generate(prompts, max_new_tokens=4) == first


def test_the_last_prompts_positions_are_forgotten(generative):
    family = generative("qwen2-5-vl")
    family.model.model.rope_deltas = None
    family.generate(family.join(encoded(family, answers=False), side="left"), max_new_tokens=2)
    assert family.model.model.rope_deltas is None


def test_sampling(generative):
    family = generative("llava")
    prompts = family.join(encoded(family, answers=False), side="left")
    state = torch.random.get_rng_state()
    drawn = [family.generate(prompts, max_new_tokens=6, sample=True, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    greedy = family.generate(prompts, max_new_tokens=6)
    assert drawn[0] != greedy
    assert family.generate(prompts, max_new_tokens=6, sample=True, temperature=1e-4) == greedy
    assert family.generate(prompts, max_new_tokens=6, sample=True, top_p=1e-6) == greedy


def test_stop(generative):
    family = generative("llava-next")
    prompt = family.encode(*CASES["two"], answers=False)
    (answer,) = family.generate(prompt, max_new_tokens=6)
    stop = "-"
    assert stop in answer[1:]
    steps = []
    hook = family.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    (stopped,) = family.generate(prompt, max_new_tokens=6, stop=["never written", stop])
    hook.remove()
    assert stopped == answer[: answer.find(stop)].strip()
    assert len(steps) < 6


def test_right_padding_is_refused(generative):
    family = generative("llava")
    with pytest.raises(KeepLoraError, match='side="left"'):
        family.generate(family.join(encoded(family, answers=False)), max_new_tokens=2)


def test_nothing_grows(kind, fresh):
    family = fresh(kind)
    family.gradient_checkpointing(True)

    def round_of_training():
        batch = family.join(encoded(family, "two", "text"))
        with family.evaluating():
            family.generate(family.join(encoded(family, "two", "text", answers=False), side="left"), max_new_tokens=3)
        family.token_losses(batch).mean().backward()
        family.model.zero_grad()
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if torch.is_tensor(t))

    round_of_training()
    sizes = [round_of_training() for _ in range(3)]
    assert max(sizes) == min(sizes)


# -- on disk -----------------------------------------------------------------------------------------------------


def test_a_saved_model_answers_alike(kind, fresh, tmp_path):
    family = fresh(kind)
    with torch.no_grad():
        family.model.get_submodule(family.target_modules()[0]).weight.mul_(1.5)
    saved = family.save_pretrained(tmp_path / "out")
    items = encoded(family, answers=False)
    answers = family.generate(family.join(items, side="left"), max_new_tokens=5)
    again = load_model(saved)
    assert again.generate(again.join(encoded(again, answers=False), side="left"), max_new_tokens=5) == answers
    stock = AutoModelForImageTextToText.from_pretrained(saved).eval()
    own = []
    for name, item in zip(CASES, items):
        if kind in OWNS_VIDEO_PROCESSOR:
            inputs = {k: v for k, v in item.items() if k not in ("labels", "token_kinds")}
        else:
            processor = AutoProcessor.from_pretrained(saved)
            text = family.chat.prompt(CASES[name][0][:-1])[0]
            beginning = {"add_special_tokens": False} if text.startswith(family.tokenizer.bos_token or "\0") else {}
            inputs = processor(
                text=[text], images=[CASES[name][1]] if CASES[name][1] else None, return_tensors="pt", **beginning
            )
        found = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
        own.append(family.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert answers == own
    with pytest.raises(KeepLoraError, match="exists already"):
        family.save_pretrained(saved)


def test_settings_for_videos_are_kept(fresh, tmp_path):
    import json

    for kind in ("qwen2-5-vl", "llava-onevision", "internvl"):
        family = fresh(kind)
        folder = family.save_pretrained(tmp_path / kind)
        written = json.loads((folder / "processor_config.json").read_text())
        assert written["processor_class"].endswith("Processor")
        assert written["video_processor"]["video_processor_type"].endswith("VideoProcessor")


def test_pictures_of_another_size(fresh):
    small, large = (fresh("qwen2-5-vl", image_size=side) for side in (8, 32))
    shown = [len(f.encode(turns("<image>a", "b"), PICTURES[:1])["input_ids"][0]) for f in (small, large)]
    assert shown[0] < shown[1]
    tiles = [fresh("idefics3", image_size=side).encode(turns("<image>a", "b"), PICTURES[:1]) for side in (16, 32)]
    assert tiles[0]["pixel_values"].shape[1] < tiles[1]["pixel_values"].shape[1]
    assert fresh("llava", image_size=16).family == "llava"
    with pytest.raises(KeepLoraError, match="reads pictures at its own size"):
        fresh("llava", image_size=32)
    with pytest.raises(KeepLoraError, match="too small"):
        fresh("qwen2-5-vl", image_size=4)
