"""What a model family is, and how to open one by name.

A new family is one file with a subclass of `DualEncoder` and one line in `FAMILIES`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import KeepLoraError, did_you_mean

if TYPE_CHECKING:
    from keeplora.models.dual_encoder import DualEncoder

__all__ = ["FAMILIES", "load_model"]

EMBEDDED = "embedded"

# model_type of config.json -> module and class
FAMILIES: dict[str, tuple[str, str]] = {
    "clip": ("keeplora.models.clip", "CLIP"),
    "siglip": ("keeplora.models.siglip", "SigLIP"),
    "siglip2": ("keeplora.models.siglip", "SigLIP2"),
    "vision-text-dual-encoder": ("keeplora.models.vision_text", "VisionText"),
    "keeplora_embedded": ("keeplora.models.vision_text", "Embedded"),
}
# Modules that register a class of ours with transformers' Auto classes, needed before such a folder is opened.
_REGISTERS = {"keeplora_embedded": "keeplora.models.embedded"}


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    image_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> DualEncoder:
    """Open a dual encoder with its tokenizer and image processor, in float32 and eval mode.

    Args:
        name_or_path: a local folder, a name on the Hugging Face hub, or "embedded" (keeplora's own default model).
        device: where to put it.
        image_size: side in pixels to read pictures at; None is the checkpoint's own. The position table is
            interpolated. A multiple of the patch size.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model. Off: a model that needs it is refused.

    Raises:
        KeepLoraError: nothing is found under that name, or it is not a dual encoder, or parts of it are missing.

    >>> encoder = load_model("openai/clip-vit-base-patch32")  # doctest: +SKIP
    >>> encoder.family, encoder.image_size  # doctest: +SKIP
    ('clip', 224)
    """
    name = str(name_or_path)
    source = name
    if name == EMBEDDED and not Path(name).is_dir():
        assets: Any = importlib.import_module("keeplora.models.assets")
        source = str(assets.embedded_path())
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    config = _read_config(name, source, revision)
    model_type = str(config.get("model_type", ""))
    family, own_code = FAMILIES.get(model_type), "AutoModel" in config.get("auto_map", {})
    if family is None and not own_code:
        kind = f"has model_type {model_type!r}" if model_type else "has no model_type in its config.json"
        raise KeepLoraError(
            f"{name} {kind}, which is not a dual encoder that keeplora knows{did_you_mean(model_type, FAMILIES)}"
        )
    if family is None and not trust_remote_code:
        raise KeepLoraError(
            f"{name} has model_type {model_type!r} and needs Python code that comes with it; if you trust its authors, "
            "pass trust_remote_code=True"
        )
    if model_type in _REGISTERS:
        importlib.import_module(_REGISTERS[model_type])

    from transformers import AutoImageProcessor, AutoTokenizer

    model = _load_weights(name, source, options)
    if str(device).startswith("cpu"):
        # torch's fused CPU attention is quick forwards and slow backwards: a training step of the embedded model takes
        # less than half the time with plain products (docs/results.md). The numbers agree to rounding.
        model.set_attn_implementation("eager")
    tokenizer = _load_part(name, "tokenizer", AutoTokenizer, source, options)
    # PIL whether torchvision is there or not: the two resize differently, and results must not depend on that.
    images = _load_part(name, "image processor", AutoImageProcessor, source, options | {"backend": "pil"})
    module, class_name = family or FAMILIES["vision-text-dual-encoder"]
    encoder = getattr(importlib.import_module(module), class_name)
    commit = getattr(model.config, "_commit_hash", None) or revision
    return encoder(model, tokenizer, images, name=name, revision=commit, image_size=image_size).to(device)


def _read_config(name: str, source: str, revision: str | None) -> dict[str, Any]:
    """config.json as it stands, before any class is chosen or any code of the model is run."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise KeepLoraError(f"{name} is a folder without a config.json, so not a saved model")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise KeepLoraError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise KeepLoraError(f"{path} is not a JSON object")
        return config
    if folder.exists():
        raise KeepLoraError(f"{name} is a file; give the folder that holds config.json and the weights")

    from huggingface_hub import errors
    from transformers import PretrainedConfig

    missing = f"no local folder is called {name!r}"
    hint = did_you_mean(name, [EMBEDDED]).split(" (one of")[0].rstrip(";")
    try:
        config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except Exception as error:
        causes = _causes(error)
        if any(isinstance(c, errors.HFValidationError) for c in causes):
            raise KeepLoraError(f"{missing}, and it is not a name on the hub (owner/model) either{hint}") from error
        if any(isinstance(c, errors.GatedRepoError) for c in causes):
            raise KeepLoraError(
                f"{missing}; the hub has it but wants its licence accepted and a login first"
            ) from error
        if any(isinstance(c, errors.RevisionNotFoundError) for c in causes):
            raise KeepLoraError(f"{missing}; the hub has the model but no revision {revision!r} of it") from error
        if any(isinstance(c, errors.RepositoryNotFoundError) for c in causes):
            raise KeepLoraError(f"{missing}, and the hub has no public model of that name{hint}") from error
        unreachable = errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError
        if any(isinstance(c, unreachable) for c in causes):
            raise KeepLoraError(
                f"{missing}, and the hub could not be reached to look there (nor is a copy in its local cache){hint}"
            ) from error
        if isinstance(error, OSError):
            raise KeepLoraError(f"{missing}, and the hub's could not be read: {_first_line(error)}") from error
        raise
    if not config:
        raise KeepLoraError(f"{missing}; the hub has {name}, but no config.json in it, so not a saved model")
    return config


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _load_weights(name: str, source: str, options: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise KeepLoraError(f"{name}: its weights could not be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        # transformers only warns, and goes on with random numbers in their place.
        raise KeepLoraError(
            f"{name}: {len(missing)} of its weights are missing from the file ({', '.join(missing[:3])}, ...); "
            "it is damaged, or not a whole dual encoder"
        )
    for part in ("get_image_features", "get_text_features", "vision_model", "text_model", "logit_scale"):
        if not hasattr(model, part):
            raise KeepLoraError(
                f"{name}: its class {type(model).__name__} has no {part!r}, so it is not a dual encoder"
            )
    return model


def _load_part(name: str, part: str, loader: Any, source: str, options: dict[str, Any]) -> Any:
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise KeepLoraError(f"{name}: its {part} could not be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
