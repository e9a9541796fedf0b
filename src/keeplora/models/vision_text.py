"""Dual encoders made of two separate towers: VisionTextDualEncoder, and the embedded default."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from keeplora.errors import KeepLoraError
from keeplora.models.dual_encoder import DualEncoder


class VisionText(DualEncoder):
    """`transformers.VisionTextDualEncoderModel`: any picture tower with any text tower that has a pooler."""

    family: ClassVar[str] = "vision-text"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            with torch.no_grad():
                self.text_features(self.tokenize(["a"]))
        except AttributeError as error:  # transformers reads `pooler_output`, which not every tower returns
            kind = type(self.model.get_submodule(self.towers["text"])).__name__
            raise KeepLoraError(
                f"{self.name}: its text tower {kind} has no pooled output for the projection ({error}); take a tower "
                "with a pooler, such as BertModel"
            ) from error


class Embedded(DualEncoder):
    """keeplora's own default: DINOv2 ViT-S/14 and all-MiniLM-L6-v2, aligned by a small head."""

    family: ClassVar[str] = "embedded"
