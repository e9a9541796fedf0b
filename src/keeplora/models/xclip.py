"""X-CLIP: CLIP whose picture tower passes messages between the frames of a clip, and whose texts depend on the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.models.clip import CLIP
from keeplora.models.dual_encoder import frames_present, normalised

TEXTS = 256
"""Texts whose video-specific features are computed at a time: each takes N · 4D numbers in the prompt generator."""


class XCLIP(CLIP):
    """`transformers.XCLIPModel` (Ni et al., 2208.02816): videos alone, of the one number of frames it was made for.

    A text's feature for a video is the text's own plus what the prompt generator adds after a look at the video's patches,
    so that `compare` gives the logits and `logits` by itself cannot. Text features keep their length, which the sum needs;
    `class_features` is their mean over templates. Video features are normalised, as every family's.

    The prompt generator is not among the default targets: no feature of a video or a text alone passes through it.
    """

    family: ClassVar[str] = "xclip"

    @property
    def _pooled_token(self) -> Any:
        return 2  # whatever its config says, the text tower pools at the highest id

    @property
    def clip_frames(self) -> int | None:
        return int(self.vision_config.num_frames)

    @property
    def default_target_modules(self) -> list[str]:
        """The attention linears of the blocks, as names and suffixes: the picture tower's between patches (``self_attn``) and
        between frames (``message_attn``), the text tower's, and the ``self_attn`` of the transformer over frames (``mit``).

        The first block's messages are left out: made of the class token before it has seen a patch, they are the same in
        every frame of every video.
        """
        blocks = range(1, int(self.vision_config.num_hidden_layers))
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        return super().default_target_modules + [f"layers.{i}.message_attn.{part}" for i in blocks for part in parts]

    def _check_clip(self, pixel_values: Tensor) -> None:
        whose, wanted = self.name or "the model", self.clip_frames
        if not self.is_clip(pixel_values):
            raise KeepLoraError(
                f"{whose} reads videos of {wanted} frames, and was given pictures; take CLIP for pictures"
            )
        present = frames_present(pixel_values)
        if pixel_values.shape[1] != wanted or not bool(present.all()):
            found = sorted({int(n) for n in present.sum(dim=1)})
            raise KeepLoraError(
                f"{whose} reads videos of {wanted} frames (num_frames of its config.json), and was given "
                f"{' or '.join(map(str, found))}; sample {wanted} of each video"
            )

    def _watch(self, pixel_values: Tensor) -> Any:
        """The stock output: `pooler_output` [N, D] of the videos, `last_hidden_state` [N · F, 1 + P, width] of the frames."""
        self._check_clip(pixel_values)
        return self.model.get_video_features(pixel_values=pixel_values.to(self.device), **self._interpolate)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Features of videos from `preprocess_clip`: [N, F, 3, H, W] -> [N, D], float32, L2-normalised, differentiable.

        F is `clip_frames`. The order of the frames matters.
        """
        return normalised(self._watch(pixel_values))

    def text_features(self, text_batch: Mapping[str, Tensor]) -> Tensor:
        """Features of a batch from `tokenize`: [C, D], float32, differentiable; not normalised (see the class)."""
        batch = {key: value.to(self.device) for key, value in text_batch.items()}
        return self.model.get_text_features(**batch).pooler_output.float()

    def _class_feature(self, features: Tensor) -> Tensor:
        return features.mean(dim=1)

    def compare(self, pixel_values: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [N, C], video features [N, D]): [N, F, 3, H, W], [C, D] from `text_features` or `class_features`."""
        seen = self._watch(pixel_values)
        patches = (
            self.model.prompts_visual_layernorm(seen.last_hidden_state[:, 1:]) @ self.model.prompts_visual_projection
        )
        patches = patches.unflatten(0, pixel_values.shape[:2]).mean(dim=1)
        parts = []
        for part in text_features.split(TEXTS):  # texts do not look at one another
            texts = part.unsqueeze(0).expand(len(patches), -1, -1)
            texts = texts + self.model.prompts_generator(texts, patches)
            parts.append(nn.functional.normalize(texts.float(), dim=-1))
        videos = normalised(seen)
        return self.logits(videos, torch.cat(parts, dim=1)), videos

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """exp(logit_scale) · cos of videos [N, D] and of each one's own text features [N, C, D] -> [N, C], float32."""
        if text_features.ndim != 3:
            raise KeepLoraError(
                f"{self.name or 'the model'}: its text features depend on the video, so features alone give no logits; take "
                "compare()"
            )
        with torch.autocast(image_features.device.type, enabled=False):
            cosines = torch.einsum("nd,ncd->nc", image_features.float(), text_features.float())
            return cosines * self.model.logit_scale.float().exp()
