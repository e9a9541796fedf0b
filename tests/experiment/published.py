"""What the tests of publishing look at: a repository's files, a card's code, a model's features."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def held(hub, repo_id: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(repo_id).items() if path != ".gitattributes"}


def run_card(text: str, **namespace: Any) -> dict[str, Any]:
    """Every Python block of a card, one after another, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "card", "exec"), namespace)
    return namespace


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))


def features(model: nn.Module) -> torch.Tensor:
    """Of the same pictures and texts, whatever the model is wrapped in."""
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([[3, 9, 12, 1]])
        out = model.get_image_features(pixel_values=pictures()), model.get_text_features(input_ids=ids)
    return torch.cat([getattr(o, "pooler_output", o) for o in out])


def tells(files: dict[str, bytes], *words: str) -> list[str]:
    """The files that hold one of the words, in their text, their pictures' headers or their tensors' names."""
    return [path for path, content in files.items() if any(word.encode() in content for word in words)]
