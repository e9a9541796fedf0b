"""Opening a generative checkpoint: weights in the dtype or quantisation that was asked for, and its processor."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from typing import Any

import torch

from keeplora.errors import KeepLoraError, did_you_mean
from keeplora.models.checkpoint import told_as, weights_options
from keeplora.models.parts import find_towers

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
QUANTISED = ("8bit", "4bit")


def is_generative(model_type: str) -> bool:
    """Whether transformers has an image-text-to-text class for a config's `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def check_options(dtype: str, quantize: str | None) -> None:
    """Refuse a dtype or quantisation that is not known, or that needs a package that is not there."""
    if dtype not in DTYPES:
        raise KeepLoraError(f"dtype is {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if quantize is not None and quantize not in QUANTISED:
        raise KeepLoraError(f"quantize is {quantize!r}{did_you_mean(quantize, QUANTISED)}")
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise KeepLoraError(
            f'quantize: {quantize} needs the package bitsandbytes, which is not installed: pip install "bitsandbytes>=0.49"'
        )


def open_config(name: str, source: str, options: dict[str, Any]) -> Any:
    """The checkpoint's config. An encoder-decoder is refused: it has no place in the text where a picture goes."""
    from transformers import AutoConfig

    with told_as(f"{name}: its config.json cannot be used"):
        config = AutoConfig.from_pretrained(source, **options)
    if getattr(config, "is_encoder_decoder", False) or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise KeepLoraError(
            f"{name} ({config.model_type}) is an encoder-decoder, which keeplora cannot train; choose a model whose decoder "
            "reads pictures and text in one sequence, such as LLaVA, Qwen2.5-VL or SmolVLM"
        )
    return config


def choose_dtype(dtype: str, config: Any, device: str) -> torch.dtype:
    """The dtype of the weights; "auto" is float32 on a CPU and for float32 checkpoints, else bfloat16.

    Never float16, in which training overflows without a loss scale.
    """
    if (wanted := DTYPES[dtype]) is not None:
        return wanted
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    half = str(stored).removeprefix("torch.") in ("float16", "bfloat16")
    return torch.bfloat16 if half and not device.startswith("cpu") else torch.float32


def open_weights(
    name: str,
    source: str,
    config: Any,
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    quantize: str | None,
    device: str,
) -> Any:
    """The stock model on `device`. Quantised, its language model's blocks are; towers, projector and head are not."""
    from transformers import AutoModelForImageTextToText

    extra: dict[str, Any] = {}
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        extra = {
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit", bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_not_quantised(name, config),
            ),
            "device_map": {"": device},
        }  # fmt: skip
    with told_as(f"{name}: its weights could not be loaded"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **weights_options(name, source, options),
            **extra,
        )
        model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers only warns, and goes on with random numbers in their place.
        raise KeepLoraError(
            f"{name}: {len(missing)} of its weights are missing from the file ({', '.join(missing[:3])}, ...); "
            "it is damaged, or not a whole image-text-to-text model"
        )
    if device.startswith("cpu"):
        # torch's fused CPU attention with a mask is several times slower backwards than plain products (docs/results.md).
        model.set_attn_implementation("eager")
    if quantize == "8bit":
        # It tells on every product that it rounds its inputs to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantize == "4bit":
        # Where the CPU has AVX512-BF16, the first forward pass without gradients would repack the weights for inference,
        # after which no gradient passes.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model if quantize is not None else model.to(device)


def _not_quantised(name: str, config: Any) -> list[str]:
    """Names of the head and of everything beside the language model, found on a copy without weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"), contextlib.suppress(Exception):
        model = AutoModelForImageTextToText.from_config(config)
        towers = find_towers(model, name)
        head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "lm_head")
        return [head, *(prefix for part, prefix in towers.items() if part != "language")]
    return ["lm_head"]


def length_limit(config: Any, wanted: int | None, name: str) -> int | None:
    made_for = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is not None and wanted < 1:
        raise KeepLoraError(f"max_length is {wanted}; it must be at least 1")
    if wanted is not None and made_for is not None and wanted > made_for:
        raise KeepLoraError(f"max_length is {wanted}, but {name} was made for {made_for} tokens at most")
    return made_for if wanted is None else wanted


def chat_template(processor: Any, name: str) -> str:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise KeepLoraError(
            f"{name} has no chat template, so there is no telling how it wants to be asked; put a chat_template.jinja into "
            "its folder"
        )
    if not processor.tokenizer.is_fast:
        raise KeepLoraError(f"{name} has no fast tokenizer, which is needed to find the answers' tokens")
    return template


def placeholders(processor: Any) -> list[str]:
    return [str(getattr(processor, key)) for key in ("image_token", "video_token") if getattr(processor, key, None)]


def end_tokens(model: Any, tokenizer: Any, end: str) -> list[int]:
    """Ids that end an answer: the chat template's, then the checkpoint's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list | tuple) else [own]
    ids = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id, *own]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))
