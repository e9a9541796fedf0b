"""What a model family is, and how to open one by name.

A new dual encoder is one file with a subclass of `DualEncoder` and one line in `FAMILIES`. Generative models need none:
`Generative` opens whatever transformers has an image-text-to-text class for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import KeepLoraError, did_you_mean
from keeplora.models.checkpoint import EMBEDDED, OWN, load_part, read_config, told_as, weights_options

if TYPE_CHECKING:
    from keeplora.models.dual_encoder import DualEncoder
    from keeplora.models.generative import Generative

__all__ = ["FAMILIES", "load_model"]

# model_type of config.json -> module and class
FAMILIES: dict[str, tuple[str, str]] = {
    "clip": ("keeplora.models.clip", "CLIP"),
    "siglip": ("keeplora.models.siglip", "SigLIP"),
    "siglip2": ("keeplora.models.siglip", "SigLIP2"),
    "xclip": ("keeplora.models.xclip", "XCLIP"),
    "vision-text-dual-encoder": ("keeplora.models.vision_text", "VisionText"),
    "keeplora_embedded": ("keeplora.models.vision_text", "Embedded"),
}
# Modules that register a class of ours with transformers' Auto classes, needed before such a folder is opened.
_REGISTERS = {"keeplora_embedded": "keeplora.models.embedded"}
_GENERATIVE = "AutoModelForImageTextToText"


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    image_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    quantize: str | None = None,
    max_length: int | None = None,
    video_size: int | None = None,
) -> DualEncoder | Generative:
    """Open a dual encoder, or a generative (image-text-to-text) model, with its processors, in eval mode.

    Args:
        name_or_path: a local folder, a name on the Hugging Face hub, "embedded" (keeplora's own default dual encoder),
            "stand-in" or "stand-in-video" (small generative models for examples).
        device: where to put it.
        image_size: side in pixels to read pictures at; None is the checkpoint's own. For dual encoders a multiple of the
            patch size, to which the position table is interpolated.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model. Off: a model that needs it is refused.
        dtype: of the weights of a generative model: "fp32", "bf16" or "auto" (`load_generative`). Dual encoders are
            float32; "bf16" is refused.
        quantize, max_length, video_size: for generative models alone, as in `load_generative`.

    Returns a `DualEncoder` (`kind` is "classification") or a `Generative` (`kind` is "generation").

    Raises:
        KeepLoraError: nothing is found under that name, or it is neither, or parts of it are missing.

    >>> encoder = load_model("openai/clip-vit-base-patch32")  # doctest: +SKIP
    >>> encoder.family, encoder.image_size  # doctest: +SKIP
    ('clip', 224)
    """
    name = str(name_or_path)
    source = name
    if name in OWN and not Path(name).is_dir():
        module = "keeplora.models.assets" if name == EMBEDDED else "keeplora.models.stand_in"
        own: Any = importlib.import_module(module)
        source = str(own.embedded_path() if name == EMBEDDED else own.stand_in_path(name))
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    config = read_config(name, source, revision)
    model_type = str(config.get("model_type", ""))
    family, classes = FAMILIES.get(model_type), config.get("auto_map", {})
    answers, needs_code = _GENERATIVE in classes, _GENERATIVE in classes or "AutoModel" in classes
    if family is None and model_type:
        opening: Any = importlib.import_module("keeplora.models.opening")
        answers = answers or opening.is_generative(model_type)
        needs_code = needs_code and not opening.is_generative(model_type)
    if family is None and not answers and not needs_code:
        kind = f"has model_type {model_type!r}" if model_type else "has no model_type in its config.json"
        raise KeepLoraError(
            f"{name} {kind}, which is not a dual encoder that keeplora knows{did_you_mean(model_type, FAMILIES)}, nor an "
            "image-text-to-text model of transformers (such as llava, qwen2_5_vl, idefics3)"
        )
    if family is None and needs_code and not trust_remote_code:
        raise KeepLoraError(
            f"{name} has model_type {model_type!r} and needs Python code that comes with it; if you trust its authors, "
            "pass trust_remote_code=True"
        )
    if family is None and answers:
        from keeplora.models.generative import load_generative

        return load_generative(
            name, device=device, dtype=dtype, quantize=quantize, image_size=image_size, revision=revision,
            trust_remote_code=trust_remote_code, max_length=max_length, source=source, video_size=video_size,
        )  # fmt: skip
    for option, given in (
        ("dtype", dtype not in ("auto", "fp32") and dtype),
        ("quantize", quantize),
        ("max_length", max_length),
        ("video_size", video_size),
    ):
        if given:
            raise KeepLoraError(
                f"{option}: {given} is for generative models; {name} is a dual encoder, leave {option} out"
            )
    return _load_dual_encoder(name, source, options, model_type, family, device, image_size)


def _load_dual_encoder(
    name: str, source: str, options: dict[str, Any], model_type: str, family: tuple[str, str] | None, device: str,
    image_size: int | None,
) -> DualEncoder:  # fmt: skip
    if model_type in _REGISTERS:
        importlib.import_module(_REGISTERS[model_type])

    from transformers import AutoImageProcessor, AutoTokenizer

    model = _load_weights(name, source, options)
    if str(device).startswith("cpu"):
        # torch's fused CPU attention is quick forwards and slow backwards: a training step of the embedded model takes
        # less than half the time with plain products (docs/results.md). The numbers agree to rounding.
        model.set_attn_implementation("eager")
    tokenizer = load_part(name, "tokenizer", AutoTokenizer, source, options)
    # PIL whether torchvision is there or not: the two resize differently, and results must not depend on that.
    images = load_part(name, "image processor", AutoImageProcessor, source, options | {"backend": "pil"})
    module, class_name = family or FAMILIES["vision-text-dual-encoder"]
    encoder = getattr(importlib.import_module(module), class_name)
    commit = getattr(model.config, "_commit_hash", None) or options["revision"]
    from PIL import Image

    with told_as(f"{name}: its processors cannot be used with its weights"):
        opened = encoder(model, tokenizer, images, name=name, revision=commit, image_size=image_size).to(device)
        opened.preprocess(Image.new("RGB", (16, 16)))  # settings that cannot be used fail here, and not in a run
        opened.tokenize(["a"])
    return opened


def _load_weights(name: str, source: str, options: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModel

    with told_as(f"{name}: its weights could not be loaded"):
        safe = weights_options(name, source, options)
        model, info = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **safe)
    if missing := sorted(info["missing_keys"]):
        # transformers only warns, and goes on with random numbers in their place.
        raise KeepLoraError(
            f"{name}: {len(missing)} of its weights are missing from the file ({', '.join(missing[:3])}, ...); "
            "it is damaged, or not a whole dual encoder"
        )
    looks = "get_video_features" if hasattr(model, "get_video_features") else "get_image_features"
    for part in (looks, "get_text_features", "vision_model", "text_model", "logit_scale"):
        if not hasattr(model, part):
            raise KeepLoraError(
                f"{name}: its class {type(model).__name__} has no {part!r}, so it is not a dual encoder"
            )
    return model
