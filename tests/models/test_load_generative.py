"""Opening a generative model by name: what is chosen, what is refused, and how it is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora.errors import KeepLoraError
from keeplora.models import load_model
from keeplora.models.generative import Generative
from tests.models.test_generative import CASES

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def copied(generative_folder, tmp_path):
    """A copy of a tiny model's folder, to be damaged."""
    return lambda kind: shutil.copytree(generative_folder(kind), tmp_path / kind)


def edit(folder, file, **changes):
    values = json.loads((folder / file).read_text())
    for key, value in changes.items():
        values.pop(key) if value is None else values.__setitem__(key, value)
    (folder / file).write_text(json.dumps(values))
    return folder


def test_the_class_decides_the_kind(kind, generative, folders):
    family = generative(kind)
    assert isinstance(family, Generative)
    assert family.kind == "generation"
    assert family.family == kind.replace("-", "_")
    assert family.max_length == 2048
    assert not family.model.training
    assert family.dtype == torch.float32
    assert load_model(folders["clip"]).kind == "classification"


def test_the_stand_in_is_opened_by_name(generative_folder, monkeypatch):
    module = ModuleType("keeplora.models.stand_in")
    monkeypatch.setattr(module, "stand_in_path", lambda name: generative_folder("llava"), raising=False)
    monkeypatch.setitem(sys.modules, "keeplora.models.stand_in", module)
    family = load_model("stand-in")
    assert isinstance(family, Generative)
    assert family.name == "stand-in"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KeepLoraError, match="did you mean 'stand-in'"):
        load_model("stand-inn")


def test_dtypes(generative_folder, tmp_path):
    folder = generative_folder("llava")
    assert load_model(folder, dtype="fp32").dtype == torch.float32
    half = load_model(folder, dtype="bf16").save_pretrained(tmp_path / "half")
    assert load_model(half).dtype == torch.float32  # "auto" on a CPU
    with pytest.raises(KeepLoraError, match=r"dtype is 'bf61'; did you mean 'bf16'"):
        load_model(folder, dtype="bf61")

    from keeplora.models.opening import choose_dtype, open_config

    stored = open_config("half", str(half), {})
    assert choose_dtype("auto", stored, "cuda:0") == torch.bfloat16
    stored.dtype = "float16"
    assert choose_dtype("auto", stored, "cuda:0") == torch.bfloat16
    assert choose_dtype("auto", open_config("whole", str(folder), {}), "cuda:0") == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["llava", "qwen2-5-vl"])
def test_quantised(generative, generative_folder, kind, bits):
    family = load_model(generative_folder(kind), quantize=bits)
    name = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]
    by_name = dict(family.model.named_modules())
    quantised = {n for n, m in by_name.items() if type(m).__name__ == name}
    assert quantised == set(family.target_modules())
    assert family.target_modules(("language", "vision", "projector")) == generative(kind).target_modules(
        ("language", "vision", "projector")
    )
    item = family.encode(*CASES["two"])
    losses = family.token_losses(item)
    exact = generative(kind).token_losses(item)
    assert (losses - exact).abs().mean() < (0.2 if bits == "8bit" else 2.0)
    asked = family.encode(*CASES["two"], answers=False)
    assert len(family.generate(asked, max_new_tokens=2)) == 1
    # Answering has not spoiled the way back.
    again = family.token_losses(item | {"labels": item["labels"].clone()})
    assert again.requires_grad
    assert torch.allclose(losses, again, atol=1e-5)


def test_quantising_is_refused_where_it_cannot_be_done(generative_folder, monkeypatch):
    folder = generative_folder("llava")
    with pytest.raises(KeepLoraError, match=r"quantize is '3bit'; did you mean"):
        load_model(folder, quantize="3bit")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(KeepLoraError, match="4bit needs the package bitsandbytes, which is not installed: pip install"):
        load_model(folder, quantize="4bit")


def test_max_length(generative_folder):
    folder = generative_folder("llava")
    assert load_model(folder, max_length=100).max_length == 100
    with pytest.raises(KeepLoraError, match="made for 2048 tokens at most"):
        load_model(folder, max_length=4096)
    with pytest.raises(KeepLoraError, match="at least 1"):
        load_model(folder, max_length=0)


def test_what_dual_encoders_do_not_take(folders):
    for option in ({"dtype": "bf16"}, {"quantize": "4bit"}, {"max_length": 9}):
        ((name, value),) = option.items()
        with pytest.raises(KeepLoraError, match=f"{name}: {value} is for generative models"):
            load_model(folders["clip"], **option)


def test_what_is_neither(copied):
    folder = edit(copied("llava"), "config.json", model_type="llama")
    with pytest.raises(KeepLoraError, match=r"'llama', which is not a dual encoder.*nor an image-text-to-text model"):
        load_model(folder)
    edit(folder, "config.json", model_type="own", auto_map={"AutoModelForImageTextToText": "a.B"})
    with pytest.raises(KeepLoraError, match="needs Python code that comes with it"):
        load_model(folder)


def test_encoder_decoders_are_refused(tmp_path):
    from transformers import Florence2Config

    Florence2Config().save_pretrained(tmp_path)
    with pytest.raises(KeepLoraError, match=r"florence2\) is an encoder-decoder"):
        load_model(tmp_path)


def test_missing_parts(copied):
    folder = copied("llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(KeepLoraError, match="has no chat template"):
        load_model(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['text'] }}")
    with pytest.raises(KeepLoraError, match="does not write the assistant's text once"):
        load_model(folder)
    (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    with pytest.raises(KeepLoraError, match=r"the chat template of .* does not take"):
        load_model(folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "multi_modal_projector" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeepLoraError, match=r"1 of its weights are missing .*projector"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(KeepLoraError, match="weights could not be loaded"):
        load_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(KeepLoraError, match="its processor could not be loaded"):
        load_model(folder)


def test_an_older_checkpoint_keeps_one_file_for_pictures_and_videos(copied, tmp_path, generative):
    folder = copied("qwen2-5-vl")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    family = load_model(folder)
    expected = generative("qwen2-5-vl").encode(*CASES["two"])
    assert torch.equal(family.encode(*CASES["two"])["pixel_values"], expected["pixel_values"])
    again = load_model(family.save_pretrained(tmp_path / "again"))
    assert torch.equal(again.encode(*CASES["two"])["input_ids"], expected["input_ids"])
