"""SigLIP and the fixed-size SigLIP 2 checkpoints: a bidirectional text tower that pools at the last position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeplora.models.dual_encoder import DualEncoder, normalised


class SigLIP(DualEncoder):
    """`transformers.SiglipModel`. The text tower was trained on texts padded to its full length, pads unmasked, and
    pools at the last position: so texts are always padded to `context_length`, and every position counts in C and G."""

    family: ClassVar[str] = "siglip"

    @property
    def _padding(self) -> str:
        return "max_length"

    def token_masks(self, text_batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{}; but where the checkpoint's tokenizer does give an attention mask, which its own processor then feeds the
        model: the unmasked positions and the last, the only others that reach the feature."""
        masks = super().token_masks(text_batch)
        for mask in masks.values():
            mask[:, -1] = True
        return masks


class SigLIP2(SigLIP):
    """`transformers.Siglip2Model` (NaFlex): pictures keep their aspect ratio and become a list of patches.

    So that pictures of every shape stack, `preprocess` packs one picture into one tensor [P, patch · patch · 3 + 2]:
    P patches at most, padded with zeros, and in the last two columns of each real patch the height and width of the
    grid in patches. `image_size` stands for (image_size / patch)² patches.
    """

    family: ClassVar[str] = "siglip2"
    _picture_dims: ClassVar[int] = 2

    def _set_image_size(self, image_size: int | None) -> int:
        patch = self.vision_config.patch_size
        if image_size is not None:
            self._check_patches(image_size)
            self._image_options = {"max_num_patches": (image_size // patch) ** 2}
            return image_size
        return round(self.images.max_num_patches**0.5 * patch)

    def preprocess(self, picture: Any) -> Tensor:
        """Turn one RGB picture into the packed float32 tensor [P, patch · patch · 3 + 2] of the class's docstring."""
        inputs = self.images(images=picture, return_tensors="pt", **self._image_options)
        real = inputs["pixel_attention_mask"][0].bool().unsqueeze(-1)
        shape = inputs["spatial_shapes"][0].to(torch.float32) * real
        return torch.cat([inputs["pixel_values"][0], shape], dim=-1)

    def picture_masks(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Real patches, bool [N, P] ([M, P] of the M frames of videos): padded ones are masked in the tower."""
        return {self.towers["vision"]: self._rows(pixel_values)[..., -1] > 0}

    def _picture_features(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.device)
        out = self.model.get_image_features(
            pixel_values=pixel_values[..., :-2],
            pixel_attention_mask=self.picture_masks(pixel_values)[self.towers["vision"]].long(),
            spatial_shapes=pixel_values[:, 0, -2:].long(),
        )
        return normalised(out)
