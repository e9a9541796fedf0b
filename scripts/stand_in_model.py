"""The stand-in's parts before they are taught: tokenizer, processor, configuration, and the tower's cached features."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from keeplora.models.embedded import IMAGENET_MEAN, IMAGENET_STD, image_processor
from keeplora.models.stand_in import tower_state

SIDE, PATCH = 112, 14
PATCHES = (SIDE // PATCH) ** 2
LAYERS = [-8, -4, -1]
"""The tower's blocks whose outputs the projector sees side by side: edges and colours live lower than subjects."""
VOCABULARY = 2048
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = """{{ '<s>' }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}\
{% endif %}\
{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` pieces; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The stock processor: pictures to 112 px, one <image> becomes 64 places."""
    return LlavaProcessor(
        image_processor=image_processor(SIDE),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, embedded: Path, **decoder: Any) -> LlavaConfig:
    """The embedded tower at 112 px and a small LLaMA."""
    from transformers import AutoConfig

    import keeplora.models.embedded  # noqa: F401  (registers the folder's class)

    vision: Dinov2Config = AutoConfig.from_pretrained(embedded).vision_config
    vision.image_size = SIDE
    ids = {
        f"{n}_token_id": tokenizer.convert_tokens_to_ids(t)
        for n, t in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=decoder.get("width", 256),
        intermediate_size=decoder.get("feed_forward", 704),
        num_hidden_layers=decoder.get("layers", 6),
        num_attention_heads=decoder.get("heads", 4),
        num_key_value_heads=decoder.get("heads", 4),
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=LAYERS,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )


def build_tower(config: LlavaConfig, embedded: Path) -> Dinov2Model:
    """The frozen tower in evaluation mode."""
    tower = Dinov2Model(config.vision_config)
    tower.load_state_dict(tower_state(embedded, SIDE))
    return tower.eval().requires_grad_(False)


def pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, 112, 112, 3] to what the processor gives for them, float32 [N, 3, 112, 112]."""
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (scaled - mean) / deviation


@torch.inference_mode()
def features(tower: Dinov2Model, pictures: np.ndarray, out: np.ndarray, batch: int = 64) -> None:
    """Fill `out` float16 [N, 64, 3 x 384] with the patches' outputs of `LAYERS`, as the LLaVA class selects them."""
    for start in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(pixels(pictures[start : start + batch]), output_hidden_states=True).hidden_states
        chosen = torch.cat([hidden[layer][:, 1:].float() for layer in LAYERS], dim=-1)
        out[start : start + len(chosen)] = chosen.half().numpy()
