"""Models and batches that the training step is measured on: each with its loss, at the size that is asked for (step.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keeplora import KeepLoraConfig
from keeplora.tuner.targets import Target, resolve_targets

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"clip": 16, "llama": 32, "demo": 16}


@dataclass
class Work:
    """A model, the loss of one batch of it, the linears to adapt, and how many tokens or pictures the batch has."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    infer: Callable[[], Any]
    targets: list[Target]
    count: int = 0
    unit: str = "pictures"


def clip_work(options: argparse.Namespace) -> Work:
    """CLIP ViT-B/16 at random weights, q, k, v and o of both towers: 8 pictures against 20 prompts of 12 tokens."""
    from transformers import CLIPConfig, CLIPModel

    blocks = options.layers or 12
    settings = CLIPConfig(
        vision_config={"patch_size": 16, "num_hidden_layers": blocks}, projection_dim=512,
        text_config={"num_hidden_layers": blocks},
    )  # fmt: skip
    with options.device:
        model = CLIPModel(settings).eval()
    pixels = torch.randn(options.batch or 8, 3, 224, 224, device=options.device)
    words = torch.randint(1, 400, (20, 12), device=options.device)
    words[:, -1] = 49407  # the end token
    labels = torch.arange(len(pixels), device=options.device) % 20

    def logits() -> Tensor:
        return model(pixel_values=pixels, input_ids=words, attention_mask=torch.ones_like(words)).logits_per_image

    def loss() -> Tensor:
        return nn.functional.cross_entropy(logits().float(), labels)

    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    return Work("clip", model, loss, logits, targets_of(model, options.rank or RANKS["clip"], names), len(pixels))


def llama_work(options: argparse.Namespace) -> Work:
    """A LLaMA-style decoder of 98 M parameters at random weights, the 7 linears of each block: 4 sequences of 128 tokens.

    options: ``tokens`` in place of 128, where it has that.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12,
        num_hidden_layers=options.layers or 12,
    )  # fmt: skip
    with options.device:
        model = LlamaForCausalLM(settings).eval()
    ids = torch.randint(0, 8000, (options.batch or 4, getattr(options, "tokens", 128)), device=options.device)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def infer() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    targets = targets_of(model, options.rank or RANKS["llama"], LINEARS)
    return Work("llama", model, loss, infer, targets, ids.numel(), "tokens")


def demo_work(options: argparse.Namespace) -> Work:
    """The demo's model (`keeplora assets fetch`), q, k, v and o of both towers: 16 pictures of 112 pixels, 6 prompts."""
    from keeplora.models import load_model

    family: Any = load_model("embedded", device=str(options.device))
    pixels = torch.randn(options.batch or 16, 3, 112, 112, device=options.device)
    texts = family.tokenize(
        [f"a photo of the digit {word}." for word in ("zero", "one", "two", "three", "four", "five")]
    )
    labels = torch.arange(len(pixels), device=options.device) % len(texts["input_ids"])

    def logits() -> Tensor:
        return family.logits(family.image_features(pixels), family.text_features(texts))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(logits(), labels)

    rank = options.rank or RANKS["demo"]
    targets = targets_of(family.model, rank, family.default_target_modules)
    return Work("demo", family.model, loss, logits, targets, len(pixels))


def targets_of(model: nn.Module, rank: int, names: Sequence[str]) -> list[Target]:
    return resolve_targets(model, KeepLoraConfig(r=rank, lora_alpha=rank, gamma=1.0, target_modules=list(names)))


WORKS: dict[str, Callable[[argparse.Namespace], Work]] = {"clip": clip_work, "llama": llama_work, "demo": demo_work}


def prepared(name: str, options: argparse.Namespace) -> Work:
    torch.manual_seed(0)
    work = WORKS[name](options)
    if options.dtype == "bf16":
        work.model.to(torch.bfloat16)
        loss, infer = work.loss, work.infer  # the pictures follow by autocast; weights are bf16 already
        work.loss, work.infer = autocast(loss, options.device), autocast(infer, options.device)
    elif options.dtype == "autocast":
        work.loss, work.infer = autocast(work.loss, options.device), autocast(work.infer, options.device)
    return work


def autocast(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    def inside() -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return function()

    return inside
