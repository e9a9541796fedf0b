"""What a dual encoder's training step computes of its two towers: nothing twice, and prompts in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.prompts import PromptBatches
from keeplora.models.row_memory import RowMemory

KEPT_BYTES = 256 << 20
"""Of features of pictures in a tower that does not train: 130,000 of 512 numbers."""
KEPT_SETS = 64
"""Sets of prompts that are remembered: one for each task of joint training, another in every step of a reference set."""


class StepFeatures:
    """Features of pictures and prompts while one task trains.

    Where nothing that trains lies in the text tower, each set of prompts goes through it once and not in every step; where
    all that trains lies in the text tower, so does each picture (pictures are not augmented). What trains is read off
    ``requires_grad`` at the start. The features of a picture are those of this picture alone (`row_memory`), so that a run
    that is resumed, and has lost them, reads the same bits.

    Args:
        prompt_tokens: see `PromptBatches`.
    """

    def __init__(self, family: DualEncoder, prompt_tokens: int | None) -> None:
        self._family, self._prompt_tokens = family, prompt_tokens
        trained = [name for name, p in family.model.named_parameters() if p.requires_grad]
        self.texts_fixed = _all_in(trained, family.towers["vision"])
        # A family with a comparison of its own reads more of the picture tower than its features. A sharded tower is called by
        # all processes, whatever one of them remembers.
        plain = type(family).compare is DualEncoder.compare and not family.in_step
        self.pictures_fixed = plain and _all_in(trained, family.towers["text"])
        self._prompts: dict[bytes, PromptBatches] = {}
        self._texts: dict[bytes, Tensor] = {}
        self._pictures = RowMemory(KEPT_BYTES)

    def texts(self, text_batch: Mapping[str, Tensor]) -> Tensor:
        """As `DualEncoder.text_features`."""
        key = text_batch["input_ids"].cpu().numpy().tobytes()
        if (found := self._texts.get(key)) is not None:
            return found
        if (prompts := self._prompts.get(key)) is None:
            family = self._family
            lengths = family.text_lengths(text_batch)
            prompts = _remember(
                self._prompts, key, PromptBatches(text_batch, lengths, family.device, self._prompt_tokens)
            )
        if not self.texts_fixed:
            return prompts.features(self._family)
        with torch.no_grad():
            return _remember(self._texts, key, prompts.features(self._family))

    def pictures(self, pixel_values: Tensor) -> Tensor:
        """As `DualEncoder.image_features`, without a gradient; only where `pictures_fixed`."""

        def compute(rows: list[tuple[Tensor, ...]]) -> Tensor:
            return self._family.image_features(torch.cat([pixels for (pixels,) in rows]))

        form = f"{pixel_values.dtype} {tuple(pixel_values.shape[1:])}"
        with torch.no_grad():
            return torch.cat(self._pictures(form, [(row,) for row in pixel_values.split(1)], compute))


def _all_in(names: Sequence[str], tower: str) -> bool:
    return all(name.startswith(f"{tower}.") for name in names)


def _remember(kept: dict[bytes, Any], key: bytes, value: Any) -> Any:
    if len(kept) >= KEPT_SETS:
        del kept[next(iter(kept))]
    kept[key] = value
    return value
