"""What is refused, and how it is told."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from keeplora.errors import ConfigError, KeepLoraError, TargetError
from keeplora.models import FAMILIES, load_model
from keeplora.models.templates import TEMPLATES, fill, resolve_templates

TEXTS = ["a cat", "a photo of the large red car.", "Zürich's 17 dogs", "art of the bird"]


def edit(folder, target, **changes):
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        (config[section] if inner else config)[inner or section] = value
    path.write_text(json.dumps(config))
    return target


def test_a_prompt_that_is_too_long_names_the_class(encoder):
    name = "x" * 90
    message = rf"class '{name}': the prompt 'a {name}' is \d+ tokens long.* reads \d+ at"
    with pytest.raises(KeepLoraError, match=message):
        encoder.class_features(["cat", name], ["a {}", "the {}"])
    with pytest.raises(KeepLoraError, match=r"prompt .* tokens long"):
        encoder.tokenize([name])


def test_the_longest_prompt_that_fits_is_taken(folders):
    encoder = load_model(folders["clip"])
    assert encoder.tokenize(["x" * 75])["input_ids"].shape == (1, 77)
    with pytest.raises(KeepLoraError, match="is 78 tokens long"):
        encoder.tokenize(["x" * 76])


def test_empty_lists(folders):
    encoder = load_model(folders["clip"])
    with pytest.raises(KeepLoraError, match="classes is empty"):
        encoder.class_features([], "photo")
    with pytest.raises(KeepLoraError, match="prompts is empty"):
        encoder.tokenize([])
    with pytest.raises(ConfigError, match="list is empty"):
        encoder.class_features(["cat"], [])


def test_templates():
    assert len(TEMPLATES["imagenet-7"].templates) == 7
    assert resolve_templates("imagenet-7")[0] == "itap of a {}."
    assert all(resolve_templates(name) == list(s.templates) for name, s in TEMPLATES.items())
    assert all(s.source for s in TEMPLATES.values())
    assert fill("{} or {c}", r"a{}\1") == r"a{}\1 or a{}\1"
    with pytest.raises(ConfigError, match="did you mean 'imagenet-7'"):
        resolve_templates("imagenet7")
    with pytest.raises(ConfigError, match="'a photo' has no place"):
        resolve_templates(["a {}", "a photo"])


def test_a_folder_that_is_no_dual_encoder_names_its_model_type(folders, tmp_path):
    with pytest.raises(
        KeepLoraError, match=r"model_type 'clip_text_model', which is not a dual encoder.*one of: clip, keep"
    ):
        load_model(edit(folders["clip"], tmp_path / "a", model_type="clip_text_model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeepLoraError, match=r"without a config\.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(KeepLoraError, match="cannot be read as JSON"):
        load_model(tmp_path / "empty")
    with pytest.raises(KeepLoraError, match="is a file"):
        load_model(tmp_path / "empty" / "config.json")


def test_missing_weights_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edit(folders["clip"], tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeepLoraError, match=r"1 of its weights are missing.*text_projection"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(KeepLoraError, match="weights could not be loaded"):
        load_model(folder)


def test_a_missing_tokenizer_or_image_processor_is_named(folders, tmp_path):
    folder = edit(folders["embedded"], tmp_path / "a")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(KeepLoraError, match="image processor could not be loaded"):
        load_model(folder)


def test_own_code_runs_only_when_asked(folders, tmp_path):
    marker = tmp_path / "ran"
    folder = edit(
        folders["clip"], tmp_path / "a", model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )  # fmt: skip
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import CLIPConfig, CLIPModel\nPath({str(marker)!r}).touch()\n"
        "class OwnConfig(CLIPConfig):\n    model_type = 'own'\n"
        "class OwnModel(CLIPModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(KeepLoraError, match=r"'own' and needs Python code.*trust_remote_code=True"):
        load_model(folder)
    assert not marker.exists()
    encoder = load_model(folder, trust_remote_code=True)
    assert marker.exists()
    assert encoder.text_features(encoder.tokenize(TEXTS)).shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"^no local folder is called 'nobody/nothing', and the hub could not be reached"),
        ("embeded", r"could not be reached.*did you mean 'embedded'\?$"),
        ("./not/here", r"^no local folder is called './not/here', and it is not a name on the hub"),
    ],
)
def test_an_unknown_name_offline(name, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KeepLoraError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_online(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError
    from transformers import PretrainedConfig

    def raises(*args, **kwargs):
        cause = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its __init__ wants a whole HTTP response
        raise OSError("nobody/nothing is not a model") from cause

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", raises)
    with pytest.raises(
        KeepLoraError, match="no local folder is called 'nobody/nothing', and the hub has no public model"
    ):
        load_model("nobody/nothing")


def test_clip_whose_pooled_token_is_never_written_is_refused(folders, tmp_path):
    with pytest.raises(KeepLoraError, match=r"pools texts at token 5, .*set text_config.eos_token_id to 703"):
        load_model(edit(folders["clip"], tmp_path / "a", text_config__eos_token_id=5))


def test_clip_with_the_old_end_token_pools_at_the_highest_id(folders, tmp_path):
    old, new = (
        load_model(edit(folders["clip"], tmp_path / "a", text_config__eos_token_id=2)),
        load_model(folders["clip"]),
    )
    assert torch.equal(old.text_features(old.tokenize(TEXTS)), new.text_features(new.tokenize(TEXTS)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # id 704, above the end token: the model would pool a pad
    tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(KeepLoraError, match="highest of a padded text"):
        load_model(tmp_path / "a")


def test_a_tower_without_known_linears_has_no_default_targets(folders):
    encoder = load_model(folders["clip"])
    assert encoder.default_target_modules == [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    encoder._targets = [t for t in encoder._targets if t[0].startswith("text_model")]
    with pytest.raises(TargetError, match=r"in its vision tower \(CLIPVisionModel\)"):
        encoder.default_target_modules  # noqa: B018


def test_every_registered_family_exists():
    for module, name in FAMILIES.values():
        assert getattr(importlib.import_module(module), name).family in {
            "clip",
            "siglip",
            "siglip2",
            "xclip",
            "vision-text",
            "embedded",
        }
