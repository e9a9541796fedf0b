"""Tiny randomly initialised dual encoders, saved as ordinary Hugging Face folders, with tokenizers built offline.

`make_tiny("clip", tmp_path / "clip")` gives a folder that `keeplora.models.load_model` and stock `transformers` open.
Vision and text towers differ in width and depth, so that a square-matrix mistake shows. The weights are drawn with
unit gain: with the 0.02 of the configs, every picture would get nearly the same feature.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

# of pictures; "xclip", which reads videos alone, is beside them
FAMILIES = ("clip", "siglip", "siglip2-fixed", "siglip2", "vision-text", "embedded")
IMAGE_SIZE = {"embedded": 28}  # a multiple of DINOv2's patch of 14; all others 32
VISION_WIDTH, TEXT_WIDTH, PROJECTION = 32, 24, 16
VISION_BLOCKS, TEXT_BLOCKS = 3, 2
CLIP_FRAMES = 4

CORPUS = [
    "a photo of a cat.", "a photo of a small dog.", "a photo of the large red car.", "a bad photo of the blue circle.",
    "an origami green square.", "itap of a yellow triangle.", "art of the bird flower texture sign digit number.",
    "a centered picture of one two three four five six seven eight nine zero", "this is a drawing of an animal",
    "itap of my class, a video game plant, fabric, emoji and symbol of the star, the letter and the colour",
]  # fmt: skip


def image_size(family: str) -> int:
    """Side in pixels that the tiny model of `family` reads."""
    return IMAGE_SIZE.get(family, 32)


def pictures(count: int = 4, side: int = 40, seed: int = 0) -> list[Any]:
    """`count` different RGB pictures, not square, so that the crop and the aspect ratio matter."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (count, 5, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(v).resize((side, side + 16), Image.Resampling.BICUBIC) for v in values]


def _bpe(alphabet: list[str], specials: list[str], space: str, suffix: str) -> tuple[dict[str, int], list[Any]]:
    """BPE with one chain of merges per word of CORPUS, left to right, `specials` last (CLIP's end token is the top id).

    Not trained: the trainer of `tokenizers` breaks ties by hash order, so two processes would get two vocabularies.
    """
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(a + suffix for a in alphabet if suffix)])}
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({w for line in CORPUS for w in re.findall(r"[a-z]+", line)}):
        symbols = [space, *word] if space else [*word]
        symbols[-1] += suffix
        left = symbols[0]
        for right in symbols[1:]:
            merges[left, right] = None
            left += right
            vocab.setdefault(left, len(vocab))
    for special in specials:
        vocab[special] = len(vocab)
    return vocab, list(merges)


def clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = _bpe(alphabet, ["<|startoftext|>", "<|endoftext|>"], "", "</w>")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _append_end(tokenizer: Any) -> Any:
    from tokenizers import processors

    end = tokenizer.eos_token
    template = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def siglip_tokenizer() -> Any:
    """As the released checkpoints have it: lower case, end token appended, which also pads; no attention mask."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), ["</s>", "<unk>"], "Ġ", "")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    return _append_end(PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>", padding_side="right",
        model_max_length=64, model_input_names=["input_ids"],
    ))  # fmt: skip


def siglip2_tokenizer() -> Any:
    """Gemma's layout (byte fallback, a pad token of its own), no attention mask; its own length limit is unset."""
    from transformers import Siglip2Tokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    alphabet = [*(f"<0x{b:02X}>" for b in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    vocab, merges = _bpe(alphabet, specials, "▁", "")
    return _append_end(
        Siglip2Tokenizer(vocab=vocab, merges=merges, padding_side="right", model_input_names=["input_ids"])
    )


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    words = sorted({w.strip(".,") for line in CORPUS for w in line.split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'\"/()"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    tokens += [w for w in words if w not in tokens]
    return BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, model_max_length=64)


def _towers(vision_extra: dict[str, Any], text_extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {"hidden_size": VISION_WIDTH, "intermediate_size": 48, "num_hidden_layers": VISION_BLOCKS}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 40, "num_hidden_layers": TEXT_BLOCKS}
    heads = {"num_attention_heads": 4}
    return vision | heads | vision_extra, text | heads | text_extra


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = clip_tokenizer()
    vision, text = _towers(
        {"image_size": 32, "patch_size": 8, "projection_dim": PROJECTION},
        {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": PROJECTION,
         "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
         "pad_token_id": tokenizer.pad_token_id},
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=PROJECTION))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(images, tokenizer)


def _xclip() -> tuple[Any, Any]:
    """With the image processor that the released checkpoints name."""
    from transformers import VideoMAEImageProcessorPil, XCLIPConfig, XCLIPModel, XCLIPProcessor

    tokenizer = clip_tokenizer()
    vision, text = _towers(
        {"image_size": 32, "patch_size": 8, "num_frames": CLIP_FRAMES, "mit_hidden_size": PROJECTION,
         "mit_intermediate_size": 24, "mit_num_attention_heads": 4},
        {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
    )  # fmt: skip
    config = XCLIPConfig(
        vision_config=vision, text_config=text, projection_dim=PROJECTION, prompt_num_attention_heads=4
    )
    images = VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return XCLIPModel(config), XCLIPProcessor(images, tokenizer)


def _siglip(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

    vision, text = _towers(
        {"image_size": 32, "patch_size": 8},
        {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": VISION_WIDTH,
         "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )  # fmt: skip
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    return model, SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


def _siglip2() -> tuple[Any, Any]:
    """SigLIP 2 NaFlex: pictures keep their aspect ratio, as 16 patches of 8 px at most."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model, Siglip2Processor

    tokenizer = siglip2_tokenizer()
    vision, text = _towers(
        {"num_patches": 16, "patch_size": 8},
        {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": VISION_WIDTH,
         "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )  # fmt: skip
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    return model, Siglip2Processor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), tokenizer)


def _vision_text() -> tuple[Any, Any]:
    from transformers import (
        BertConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
        ViTConfig,
        ViTImageProcessorPil,
    )

    tokenizer = bert_tokenizer()
    vision, text = _towers(
        {"image_size": 32, "patch_size": 8}, {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**vision), BertConfig(**text), projection_dim=PROJECTION
    )
    images = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return VisionTextDualEncoderModel(config), VisionTextDualEncoderProcessor(images, tokenizer)


def _embedded() -> tuple[Any, Any]:
    """No processor class of its own: an image processor and a tokenizer side by side, as the fetched model has them."""
    from transformers import BertConfig, CLIPImageProcessorPil, Dinov2Config

    from keeplora.models.embedded import EmbeddedDualEncoder, EmbeddedDualEncoderConfig

    tokenizer = bert_tokenizer()
    vision, text = _towers(
        {"image_size": 56, "patch_size": 14, "mlp_ratio": 2},
        {"vocab_size": len(tokenizer), "max_position_embeddings": 64},
    )
    del vision["intermediate_size"]
    config = EmbeddedDualEncoderConfig(
        Dinov2Config(**vision), BertConfig(**text), projection_dim=PROJECTION, image_size=28
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return EmbeddedDualEncoder(config), (images, tokenizer)


def _liven(model: nn.Module) -> None:
    """Unit-gain weights, embeddings of unit size, norms and biases a little off their neutral values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if "embed" not in name or "patch" in name else 1
                parameter.normal_(0.0, fan_in**-0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1 and parameter.numel() > 1:
                parameter.normal_(1.0, 0.1)
        model.logit_scale.fill_(2.6592)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-1.5)


def make_tiny(family: str, directory: str | Path) -> Path:
    """Write the tiny model of `family` (one of `FAMILIES`, or "xclip") with its processors to `directory` and return that path.

    The same family always gets the same weights, whatever the global random state, which stays as it was.
    """
    builders = {
        "clip": _clip, "siglip": lambda: _siglip(siglip_tokenizer()),
        "siglip2-fixed": lambda: _siglip(siglip2_tokenizer()), "siglip2": _siglip2,
        "vision-text": _vision_text, "embedded": _embedded, "xclip": _xclip,
    }  # fmt: skip
    directory = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        model, processor = builders[family]()
        _liven(model)
    model.save_pretrained(directory)
    for part in processor if isinstance(processor, tuple) else (processor,):
        part.save_pretrained(directory)
    return directory
