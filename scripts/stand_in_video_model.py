"""The video stand-in's parts: the picture stand-in's weights in a class that reads videos, and its small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stand_in_model import LAYERS, PATCH, PATCHES, SIDE, TEMPLATE
from transformers import AutoTokenizer, LlavaConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from keeplora.models.embedded import IMAGENET_MEAN, IMAGENET_STD
from keeplora.models.stand_in import PICTURES

VIDEO = "<video>"
_TEXT = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
_VIDEOS = "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
VIDEO_TEMPLATE = TEMPLATE.replace(_TEXT, _VIDEOS + _TEXT)


def build_tokenizer() -> Any:
    """The picture stand-in's, with one more special token."""
    named = {"image_token": "<image>", "video_token": VIDEO}
    tokenizer = AutoTokenizer.from_pretrained(PICTURES.files, extra_special_tokens=named)
    assert tokenizer.convert_tokens_to_ids(VIDEO) == len(tokenizer) - 1
    return tokenizer


def build_config(tokenizer: Any) -> LlavaOnevisionConfig:
    """The picture stand-in's tower and decoder; a frame's 8 x 8 places become 4 x 4."""
    picture = LlavaConfig.from_pretrained(PICTURES.files)
    text = picture.text_config
    text.vocab_size = len(tokenizer)
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlavaOnevisionConfig(
        vision_config=picture.vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_feature_layer=LAYERS,
        vision_feature_select_strategy="default",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )


def build_model(config: LlavaOnevisionConfig) -> LlavaOnevisionForConditionalGeneration:
    """With the picture stand-in's projector and decoder; the tower's weights are not loaded."""
    model = LlavaOnevisionForConditionalGeneration(config)
    state = {name: tensor.float() for name, tensor in load_file(PICTURES.files / PICTURES.weights).items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        own = state[name]
        extra = own.mean(dim=0, keepdim=True).expand(config.text_config.vocab_size - len(own), -1)
        state[name] = torch.cat([own, extra])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.startswith("model.vision_tower") or n == "model.image_newline" for n in missing)
    with torch.no_grad():
        model.model.image_newline.zero_()
    return model


def processor_settings() -> dict[str, Any]:
    """processor_config.json of the stock class: written by hand, for its constructor asks for torchvision."""
    size = {"height": SIDE, "width": SIDE}
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
    }
    return {
        "image_processor": {
            **shared,
            "do_pad": True,
            "image_grid_pinpoints": [[SIDE, SIDE]],
            "image_processor_type": "LlavaOnevisionImageProcessor",
        },
        "image_token": "<image>",
        "num_image_tokens": PATCHES + 1,
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor": {
            **shared,
            "do_sample_frames": False,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "video_token": VIDEO,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "default",
    }


def write_processor(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files, processor_config.json and chat_template.jinja."""
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "chat_template"):  # how it was loaded here
        settings.pop(key, None)
    settings["processor_class"] = "LlavaOnevisionProcessor"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(VIDEO_TEMPLATE, encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(processor_settings(), indent=2) + "\n", encoding="utf-8")


assert PATCH * round(PATCHES**0.5) == SIDE
