"""A tiny stock language model, plain or quantised, with data of its own: what the generative side of the tuner is tested on."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from keeplora import KeepLoraConfig
from keeplora.tuner.adapter_store import PAST
from keeplora.tuner.quantised import dequantised, stored_tensors

SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 48
KINDS = ["8bit", "4bit", "4bit-nested"]
LAYERS = [f"model.layers.{i}.{part}.{n}" for i in (0, 1) for n in SUFFIXES
          for part in ["mlp" if n in ("gate_proj", "up_proj", "down_proj") else "self_attn"]]  # fmt: skip


@functools.cache
def folder() -> Path:
    """A saved checkpoint: 2 blocks, hidden 64, MLP 128, 4 heads over 2 for keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(tempfile.mkdtemp(prefix="keeplora-llama-"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.15,
        )  # fmt: skip
        LlamaForCausalLM(settings).save_pretrained(path)
    return path


def load(kind: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint in ``dtype``, or quantised: "8bit", "4bit" (nf4) or "4bit-nested" (quantised scales as well)."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    if kind is None:
        return LlamaForCausalLM.from_pretrained(folder(), dtype=dtype).eval()
    settings = (
        BitsAndBytesConfig(load_in_8bit=True) if kind == "8bit" else
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                           bnb_4bit_use_double_quant=kind == "4bit-nested")
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(
        folder(), quantization_config=settings, device_map={"": "cpu"}, dtype=dtype
    ).eval()


def batches(seed: int = 0, count: int = 3, size: int = 2, length: int = 9) -> list[dict[str, Tensor]]:
    """Token batches padded at the right, from a small vocabulary of the seed's own, answers in the last four places."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(VOCABULARY, generator=generator)[:10]
    out = []
    for _ in range(count):
        ids = words[torch.randint(10, (size, length), generator=generator)]
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        labels = ids.clone()
        labels[:, :-5] = -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)})
    return out


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss per answer token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return losses[labels != -100]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return token_losses(model, batch).mean()


def config(**kwargs) -> KeepLoraConfig:
    return KeepLoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": SUFFIXES, "energy_weights": 0.3,
                             "energy_features": 0.8, **kwargs})  # fmt: skip


def train(model: nn.Module, data, steps: int = 2, lr: float = 0.05) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        for batch in data:
            optimizer.zero_grad()
            mean_loss(model, batch).backward()
            optimizer.step()


def learn(learner, name: str, seed: int, **kwargs):
    data = batches(seed)
    with learner.task(name, data, token_losses, **kwargs) as model:
        train(model, data)
    return learner


def logits(model: nn.Module, seed: int = 9) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches(seed, 1)[0]["input_ids"], use_cache=False).logits


def plain_twin(model: nn.Module) -> nn.Module:
    """The unquantised model with the very weights that the quantised one stands for."""
    twin = load()
    with torch.no_grad():
        for name in LAYERS:
            twin.get_submodule(name).weight.copy_(dequantised(model.get_submodule(name)))
    return twin


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name in LAYERS
        for key, value in stored_tensors(model.get_submodule(name)).items()
    }


def past(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if PAST in n}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())
