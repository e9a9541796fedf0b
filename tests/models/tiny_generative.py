"""Tiny randomly initialised image-text-to-text models of real classes, saved as ordinary Hugging Face folders.

`tiny("llava", tmp_path / "llava")` gives a folder that `AutoModelForImageTextToText`, the class's processor and
`keeplora.models.load_model` open. Each class keeps what makes it itself: its chat template, its placeholder tokens,
its image processor at small sizes, k/v heads narrower than the queries where the class has them. The folder is written
file by file, because a processor that owns a video processor cannot be built where torchvision is missing.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.models.tiny import CORPUS, _bpe
from tests.models.tiny_templates import TEMPLATES

KINDS = (
    "llava", "llava-next", "llava-onevision", "qwen2-5-vl", "idefics3", "gemma3", "internvl", "smolvlm", "video-llava",
    "llava-next-video", "qwen3-vl",
)  # fmt: skip
# SmolVLM's processor wants num2words (it spells the number of a video's frames).
AVAILABLE = tuple(k for k in KINDS if k != "smolvlm" or importlib.util.find_spec("num2words"))
OWNS_VIDEO_PROCESSOR = (
    "llava-onevision", "qwen2-5-vl", "internvl", "smolvlm", "video-llava", "llava-next-video", "qwen3-vl",
)  # fmt: skip
READS_VIDEOS = tuple(k for k in AVAILABLE if k in OWNS_VIDEO_PROCESSOR and k != "internvl")

HIDDEN, BLOCKS, VISION_HIDDEN, VISION_BLOCKS = 48, 2, 32, 2

_ROWS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
# The special tokens of each class: those with a name that its processor asks the tokenizer for, and the rest.
_NAMED: dict[str, dict[str, str]] = {
    "llava": {"image_token": "<image>"},
    "llava-next": {"image_token": "<image>"},
    "video-llava": {"image_token": "<image>", "video_token": "<video>"},
    "llava-next-video": {"image_token": "<image>", "video_token": "<video>"},
    "llava-onevision": {"image_token": "<image>", "video_token": "<video>"},
    "qwen2-5-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "idefics3": {},
    "smolvlm": {
        "fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}  # fmt: skip
_OTHERS = {
    "llava-onevision": ["<|im_start|>"],
    "qwen2-5-vl": ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
    "qwen3-vl": ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
    "idefics3": [
        "<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROWS,
    ],
    "smolvlm": ["<|im_start|>", *_ROWS],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "internvl": ["<|im_start|>"],
}  # fmt: skip
# beginning, end and pad of a text; then the token that ends a turn, where that is another
_LLAMA, _CHATML = ("<s>", "</s>", "<pad>"), (None, "<|im_end|>", "<|endoftext|>")
_ENDS = {
    "llava": _LLAMA, "llava-next": _LLAMA, "llava-onevision": _CHATML, "qwen2-5-vl": _CHATML, "internvl": _CHATML,
    "video-llava": _LLAMA, "llava-next-video": _LLAMA, "qwen3-vl": _CHATML,
    "idefics3": (None, "<|endoftext|>", "<|pad|>"), "smolvlm": (None, "<|endoftext|>", "<|pad|>"),
    "gemma3": ("<bos>", "<eos>", "<pad>"),
}  # fmt: skip
_TURN_ENDS = {"idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}


def tokenizer_of(kind: str) -> Any:
    """A fast BPE tokenizer in the layout of the class: SentencePiece-like with byte fallback, or byte level."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = _ENDS[kind]
    sentencepiece = bos is not None
    specials = [t for t in (pad, eos, bos, "<unk>" if sentencepiece else None) if t]
    if sentencepiece:
        alphabet = [*(f"<0x{b:02X}>" for b in range(256)), "▁", "\n", *(chr(c) for c in range(33, 127))]
        vocab, merges = _bpe(alphabet, specials, "▁", "")
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
        backend.decoder = decoders.Sequence(  # type: ignore[assignment]
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        vocab, merges = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), specials, "Ġ", "")
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    named = _NAMED[kind]
    backend.add_special_tokens([*specials, *named.values(), *_OTHERS.get(kind, [])])
    if bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = template
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad,
        unk_token="<unk>" if sentencepiece else None, padding_side="left", model_max_length=2048,
        extra_special_tokens=_OTHERS.get(kind, []), model_specific_special_tokens=named,
    )  # fmt: skip


def _text(tokenizer: Any, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | extra  # fmt: skip


def _vision(model_type: str, **extra: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": VISION_HIDDEN, "intermediate_size": 40,
        "num_hidden_layers": VISION_BLOCKS, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    } | extra  # fmt: skip


Parts = tuple[Any, Any, str, dict[str, Any]]  # model, image processor, class of the processor, its arguments


def _llava(tokenizer: Any, which: str = "llava") -> Parts:
    import transformers as tf

    token, video = (tokenizer.convert_tokens_to_ids(f"<{what}>") for what in ("image", "video"))
    vision = _vision("clip_vision_model", num_hidden_layers=VISION_BLOCKS + 1, projection_dim=16)
    text = _text(tokenizer, model_type="llama")
    arguments = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    shared: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_index": token}
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    if which == "video-llava":
        model = tf.VideoLlavaForConditionalGeneration(tf.VideoLlavaConfig(**shared, video_token_index=video))
        return model, tf.VideoLlavaImageProcessor(**size), "VideoLlavaProcessor", arguments
    if which == "llava-next-video":
        config = tf.LlavaNextVideoConfig(
            **shared, video_token_index=video, image_grid_pinpoints=pinpoints, spatial_pool_mode="average"
        )
        images = tf.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints)
        return tf.LlavaNextVideoForConditionalGeneration(config), images, "LlavaNextVideoProcessor", arguments
    if which == "llava-next":
        config = tf.LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
        images = tf.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints)
        return tf.LlavaNextForConditionalGeneration(config), images, "LlavaNextProcessor", arguments
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**shared))
    return model, tf.CLIPImageProcessorPil(**size), "LlavaProcessor", arguments


def _onevision(tokenizer: Any) -> Parts:
    import transformers as tf

    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = tf.LlavaOnevisionConfig(
        vision_config=_vision("siglip_vision_model", vision_use_head=False),
        text_config=_text(tokenizer, model_type="qwen2"), image_token_index=ids["image"],
        video_token_index=ids["video"], image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    images = tf.LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints)
    arguments = {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    return tf.LlavaOnevisionForConditionalGeneration(config), images, "LlavaOnevisionProcessor", arguments


def _qwen(tokenizer: Any, third: bool = False) -> Parts:
    import transformers as tf

    ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    names = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    vision: dict[str, Any] = {
        "depth": VISION_BLOCKS, "hidden_size": VISION_HIDDEN, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": HIDDEN,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 16 * 24})
    tokens = dict(zip(names, ids, strict=True))
    if third:
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        config = tf.Qwen3VLConfig(
            vision_config=vision, text_config=_text(tokenizer, rope_parameters=rope, head_dim=12), **tokens
        )
        return tf.Qwen3VLForConditionalGeneration(config), images, "Qwen3VLProcessor", {}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=_text(tokenizer, rope_parameters=rope), **tokens)
    return tf.Qwen2_5_VLForConditionalGeneration(config), images, "Qwen2_5_VLProcessor", {}


def _idefics3(tokenizer: Any, smol: bool = False) -> Parts:
    import transformers as tf

    vision = _vision("smolvlm_vision" if smol else "idefics3_vision")
    shared: dict[str, Any] = {
        "vision_config": vision, "text_config": _text(tokenizer, model_type="llama"), "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }  # fmt: skip
    size: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    if smol:
        images, model = (
            tf.SmolVLMImageProcessorPil(**size),
            tf.SmolVLMForConditionalGeneration(tf.SmolVLMConfig(**shared)),
        )
        return model, images, "SmolVLMProcessor", {"image_seq_len": 4}
    model = tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(**shared))
    return model, tf.Idefics3ImageProcessorPil(**size), "Idefics3Processor", {"image_seq_len": 4}


def _gemma3(tokenizer: Any) -> Parts:
    import transformers as tf

    config = tf.Gemma3Config(
        vision_config=_vision("siglip_vision_model", vision_use_head=False),
        text_config=_text(tokenizer, head_dim=12, query_pre_attn_scalar=12, sliding_window=64,
                          layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=4, image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    images = tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return tf.Gemma3ForConditionalGeneration(config), images, "Gemma3Processor", {"image_seq_length": 4}


def _internvl(tokenizer: Any) -> Parts:
    import transformers as tf

    config = tf.InternVLConfig(
        vision_config=_vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
        text_config=_text(tokenizer, model_type="qwen2"), image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return tf.InternVLForConditionalGeneration(config), images, "InternVLProcessor", {"image_seq_length": 4}


_BUILDERS = {
    "llava": _llava, "llava-next": lambda t: _llava(t, "llava-next"), "llava-onevision": _onevision,
    "video-llava": lambda t: _llava(t, "video-llava"), "llava-next-video": lambda t: _llava(t, "llava-next-video"),
    "qwen2-5-vl": _qwen, "qwen3-vl": lambda t: _qwen(t, third=True), "idefics3": _idefics3,
    "smolvlm": lambda t: _idefics3(t, smol=True), "gemma3": _gemma3,
    "internvl": _internvl,
}  # fmt: skip
_CROPPED = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
_VIDEO: dict[str, dict[str, Any]] = {
    "video-llava": {"video_processor_type": "VideoLlavaVideoProcessor", **_CROPPED},
    "llava-next-video": {"video_processor_type": "LlavaNextVideoVideoProcessor", **_CROPPED},
    "qwen3-vl": {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 4,
                 "size": {"shortest_edge": 64, "longest_edge": 2048}},
    "llava-onevision": {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 16, "width": 16}},
    "qwen2-5-vl": {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4,
                   "size": {"shortest_edge": 64, "longest_edge": 384}},
    "internvl": {"video_processor_type": "InternVLVideoProcessor", "size": {"height": 16, "width": 16}},
    "smolvlm": {"video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 32},
                "max_image_size": {"longest_edge": 16}},
}  # fmt: skip


def _liven(model: nn.Module) -> None:
    """Unit-gain weights: with the 0.02 of the configs, pictures and words would hardly move the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                table = "embed" in name and "patch" not in name
                parameter.normal_(0.0, 1.0 if table else parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
        head = model.get_output_embeddings().weight  # type: ignore[operator,union-attr]
        head.normal_(0.0, head.shape[1] ** -0.5)  # after the embeddings, which Gemma ties it to


def tiny(kind: str, folder: str | Path) -> Path:
    """Write the tiny model of `kind` (one of `KINDS`) with its processor to `folder` and return that path.

    The same kind always gets the same weights, whatever the global random state, which stays as it was.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    tokenizer = tokenizer_of(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(kind.encode()))
        model, images, processor_class, arguments = _BUILDERS[kind](tokenizer)
        _liven(model)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([t for t in [_TURN_ENDS.get(kind)] if t])]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    parts = {"processor_class": processor_class, "image_processor": images.to_dict()}
    if kind in _VIDEO:
        parts["video_processor"] = _VIDEO[kind]
    (folder / "processor_config.json").write_text(json.dumps(parts | arguments, indent=2), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class TinyClip:
    """Some frames of a video, as `keeplora.models.video_clips.Clip` wants them."""

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    duration: float
    fps: float
    indices: tuple[int, ...]


def clip(count: int, size: tuple[int, int] = (40, 24), *, seed: int = 0, fps: float = 10.0, step: int = 3) -> TinyClip:
    """`count` frames of noise, every `step`-th of a source of constant rate that goes on for a step after the last."""
    noise = np.random.default_rng([seed, count])
    pixels = noise.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    indices = tuple(step * i for i in range(count))
    return TinyClip(
        tuple(Image.fromarray(frame) for frame in pixels),
        tuple(i / fps for i in indices),
        step * count / fps,
        fps,
        indices,
    )


WORDS = sorted({w.strip(".,") for line in CORPUS for w in line.split()})
